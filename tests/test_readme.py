"""README's claims about the code: lines, files, options and commands must exist."""
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

import evaluate
import prepare_data
import results
import sample
import train
from configurator import configure

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
CONFIGS = {"train.py": train.Config, "sample.py": sample.Config, "evaluate.py": evaluate.Config, "results.py": results.Config}


def test_every_line_reference_points_at_what_it_names():
    """`diffusion.py:45` noise: line 45 of diffusion.py holds the word noise."""
    references = re.findall(r"`(\w+\.py):(\d+)` `([\w.]+)`", README)
    assert len(references) >= 8
    for file, line, name in references:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert name.split(".")[-1] in text, f"{file}:{line} is {text!r}, README says {name}"


def test_every_file_named_exists():
    for name in set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|md|txt))`", README)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"(train|sample|evaluate)\.py", c)])
def test_every_command_parses(command):
    """Every script call of README has options that exist, of the right type, and config files that exist."""
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
    listed = subprocess.run(["bash", ROOT / "docs/experiments.sh", "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(listed) > 100 and len(set(listed)) == len(listed)
    trained = set()
    for command in listed:
        test_every_command_parses(command)
        words = dict(word[2:].partition("=")[::2] for word in shlex.split(command) if word.startswith("--"))
        if "train.py" in command:
            trained.add(words["out_dir"])
        assert "evaluate.py" not in command or words["out_dir"] in trained | {"out/demo_trunk"}           # by demo.sh
        assert "/best.pt" not in command or words["trunk"].removesuffix("/best.pt") in trained


def test_there_are_commands():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("config", sorted(Path(ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_config_is_one_of_train(config):
    configure(train.Config, [str(config)])


def test_every_option_is_explained():
    """--help says something about every option but those whose name says it all."""
    plain = {"learning_rate", "num_samples", "max_new_tokens", "batch_size", "seed", "device", "dtype", "checkpoint", "min_lr",
             "log_every", "train_split", "val_split", "out_dir", "n_head", "n_embd", "beta1", "beta2", "lora_alpha", "trunk_mode",
             "path_mode"}
    import inspect
    for cls in CONFIGS.values():
        source = "\n".join(inspect.getsource(base) for base in cls.__mro__ if base is not object)
        for field in fields(cls):
            if field.name not in plain:
                assert re.search(rf"^    {field.name}:.*#", source, re.M), field.name


def test_prepare_data_commands_exist():
    for command in COMMANDS:
        if "prepare_data.py" in command:
            assert shlex.split(command.split("prepare_data.py")[1].split("&&")[0])[0] in prepare_data.TASKS
