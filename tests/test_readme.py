"""README's and docs' claims about the code: lines, files, options and commands must exist."""
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
from helpers import ROOT

import evaluate
import sample
import train
from configurator import configure
from tasks import TASKS

sys.path.append(str(ROOT / "experiments"))
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "demo/README.md", *(ROOT / "docs").rglob("*.md")]
DOCS = "".join(path.read_text() for path in PAGES)
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", DOCS, re.S)
            for line in block.splitlines()]
BENCH = import_module("bench.__main__")
CONFIGS = {"train.py": train.Config, "sample.py": sample.Config, "evaluate.py": evaluate.Config, "bench": BENCH.Config}
EXPERIMENTS = [import_module(name).Config for name in ("chains", "guidance", "results", "animate", "cost", "smollm2", "word_chains")]


def test_every_line_reference_points_at_what_it_names():
    """`diffusion.py:45` `noise`: line 45 of diffusion.py holds the word noise."""
    references = re.findall(r"`(\w+\.py):(\d+)`\s+`([\w.]+)`", README)
    assert len(references) >= 12
    for file, line, name in references:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert name.split(".")[-1] in text, f"{file}:{line} is {text!r}, README says {name}"


def test_every_file_link_and_test_named_exists():
    for name in set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|md|txt|svg|png))`", DOCS)):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "docs", ROOT / "experiments")), name
    for page in PAGES:
        for link in re.findall(r"\]\(([\w/.-]+\.\w+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for name in set(re.findall(r"`(test_\w+)`", DOCS)):
        assert any(f"def {name}(" in path.read_text() for path in (ROOT / "tests").glob("test_*.py")), name


def test_every_option_named_exists():
    """`--name` in docs is an option of some script, or stands beside the words "removed option"."""
    known = {f.name for cls in [*CONFIGS.values(), *EXPERIMENTS] for f in fields(cls)}
    known |= {f.name for task in TASKS.values() for f in fields(task.options) if is_dataclass(task.options)}
    known |= {"help", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "list"}
    for page in PAGES:
        for line in page.read_text().splitlines():
            unknown = set(re.findall(r"--([a-z_]\w+)", line)) - known
            assert not unknown or "removed option" in line, f"{page.name}: {unknown} in {line!r}"


def options_of(command):
    """The script of a command and its words, with config files that exist."""
    words = shlex.split(command)
    i = next(i for i, word in enumerate(words) if word in CONFIGS)
    return CONFIGS[words[i]], [str(ROOT / w) if w.endswith(".py") else w for w in words[i + 1:]]


SCRIPTS = r"\b(train|sample|evaluate)\.py|-m bench\b"


@pytest.mark.parametrize("command", [command for command in COMMANDS if re.search(SCRIPTS, command)])
def test_every_command_parses(command):
    configure(*options_of(command))


def test_every_experiment_parses():
    """The commands behind docs/RESULTS.md, and no evaluation of a run before its training."""
    script = [ROOT / "experiments/experiments.sh", "--list"]
    listed = subprocess.run(["bash", *script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(listed) > 100 and len(set(listed)) == len(listed)
    trained = set()
    for command in listed:
        if not re.search(r"\b(train|evaluate)\.py", command):
            continue
        configure(*options_of(command))
        words = dict(word[2:].partition("=")[::2] for word in shlex.split(command) if word.startswith("--"))
        if "train.py" in command:
            trained.add(words["out_dir"])
        assert "evaluate.py" not in command or words["out_dir"] in trained | {"out/demo_trunk"}   # by demo.sh
        assert "/best.pt" not in command or words["trunk"].removesuffix("/best.pt") in trained


@pytest.mark.parametrize("config", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_every_config_is_one_of_train(config):
    configure(train.Config, [str(config)])


def test_every_task_that_is_prepared_exists():
    found = [task for command in COMMANDS for task in re.findall(r"prepare_data\.py (\w+)", command)]
    assert len(found) > 3 and set(found) <= TASKS.keys()


def test_every_experiment_runs_as_readme_writes_it():
    """`python experiments/x.py` needs no PYTHONPATH."""
    env = {"PATH": "/usr/bin:/bin"}
    for path in sorted(Path(ROOT / "experiments").glob("*.py")):
        if path.name != "probe.py":                               # which has no --help
            found = subprocess.run([sys.executable, path, "--help"], cwd=ROOT, env=env, capture_output=True, text=True)
            assert found.returncode == 0 and "Options" in found.stdout, found.stderr
