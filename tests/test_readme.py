"""README's claims about the code: lines, files, options and commands must exist."""
import inspect
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

import bench
import evaluate
import sample
import train
from configurator import configure
from tasks import TASKS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", DOCS, re.S)
            for line in block.splitlines()]
CONFIGS = {"train.py": train.Config, "sample.py": sample.Config, "evaluate.py": evaluate.Config,
           "bench.py": bench.Config}


def test_readme_has_at_most_160_lines_of_at_most_120_characters():
    lines = README.splitlines()
    assert len(lines) <= 160 and max(map(len, lines)) <= 120


def test_every_line_reference_points_at_what_it_names():
    """`diffusion.py:45` noise: line 45 of diffusion.py holds the word noise."""
    references = re.findall(r"`(\w+\.py):(\d+)` `([\w.]+)`", README)
    assert len(references) >= 12
    for file, line, name in references:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert name.split(".")[-1] in text, f"{file}:{line} is {text!r}, README says {name}"


def test_every_file_and_test_named_exists():
    quoted = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|md|txt|svg|png))`", DOCS)
    for name in {*quoted, *re.findall(r"\]\(([\w/-]+\.\w+)\)", DOCS)}:
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "docs", ROOT / "experiments")), name
    for name in set(re.findall(r"`(test_\w+)`", DOCS)):
        assert any(f"def {name}(" in path.read_text() for path in (ROOT / "tests").glob("test_*.py")), name


SCRIPTS = r"\b(train|sample|evaluate|bench)\.py"


@pytest.mark.parametrize("command", [command for command in COMMANDS if re.search(SCRIPTS, command)])
def test_every_command_parses(command):
    """Every script call has options that exist, of the right type, and config files that exist."""
    words = shlex.split(command)
    i = next(i for i, word in enumerate(words) if word in CONFIGS)
    options = [str(ROOT / w) if w.endswith(".py") else w for w in words[i + 1:]]
    if "--help" in options:
        with pytest.raises(SystemExit) as stop:
            configure(CONFIGS[words[i]], options)
        assert stop.value.code == 0
    else:
        configure(CONFIGS[words[i]], options)


def test_every_experiment_parses():
    """The commands behind docs/RESULTS.md, and no evaluation of a run before its training."""
    script = [ROOT / "experiments/experiments.sh", "--list"]
    listed = subprocess.run(["bash", *script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(listed) > 100 and len(set(listed)) == len(listed)
    trained = set()
    for command in listed:
        if not re.search(r"\b(train|evaluate)\.py", command):
            continue
        test_every_command_parses(command)
        words = dict(word[2:].partition("=")[::2] for word in shlex.split(command) if word.startswith("--"))
        if "train.py" in command:
            trained.add(words["out_dir"])
        assert "evaluate.py" not in command or words["out_dir"] in trained | {"out/demo_trunk"}   # by demo.sh
        assert "/best.pt" not in command or words["trunk"].removesuffix("/best.pt") in trained


def test_there_are_commands():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("config", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_every_config_is_one_of_train(config):
    configure(train.Config, [str(config)])


def test_every_option_is_explained():
    """--help says something about every option but those whose name says it all."""
    plain = {"learning_rate", "num_samples", "max_new_tokens", "batch_size", "seed", "device", "dtype",
             "checkpoint", "min_lr", "log_every", "train_split", "val_split", "out_dir", "n_head", "n_embd",
             "beta1", "beta2", "lora_alpha", "trunk_mode", "repeats", "split", "model", "decode", "train", "path_mode",
             "train_batch"}
    for cls in CONFIGS.values():
        source = "\n".join(inspect.getsource(base) for base in cls.__mro__ if base is not object)
        for field in fields(cls):
            if field.name not in plain:
                assert re.search(rf"^    {field.name}:.*(\n {{8,}}.*)?#", source, re.M), f"{cls.__module__}: {field.name}"


def test_every_task_that_is_prepared_exists():
    for command in COMMANDS:
        for task in re.findall(r"prepare_data\.py (\w+)", command):
            assert task in TASKS
