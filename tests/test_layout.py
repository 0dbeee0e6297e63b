"""The house: what imports what, how large it is, and where names of tasks and solvers may stand.

    python tests/test_layout.py            # prints the lines that each script pulls in
"""
import ast
import importlib
import re
import sys
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import child, error_of, says

SCRIPTS = ["train", "sample", "evaluate", "prepare_data"]
CORE = ["configurator", "model", "diffusion", "adaptive", "decode", "fast", "speculate"]

# For each module of the top level and each folder: what of the project it may import. Imports point down.
MAY_IMPORT = {
    "configurator": set(),
    "model": {"configurator"},
    "llama": {"configurator", "model"},
    "diffusion": {"configurator", "model"},
    "adaptive": {"diffusion", "model"},
    "decode": {"configurator", "model", "diffusion", "adaptive"},
    "fast": {"model", "diffusion", "adaptive", "decode", "fast", "plumbing.costs", "plumbing.graphs"},
    "speculate": {"model", "diffusion", "decode", "fast", "plumbing.costs"},
    "plumbing": {"configurator", "model", "llama", "plumbing"},
    "tasks": {"configurator", "plumbing", "tasks"},
    "train": {"configurator", "model", "diffusion", "plumbing"},
    "sample": {*CORE, "plumbing"},
    "evaluate": {*CORE, "plumbing", "tasks"},
    "prepare_data": {"configurator", "plumbing", "tasks"},
}
ANYTHING = {"bench", "experiments", "demo"}                       # they measure and show all the rest
LONGEST_FUNCTION = 60


# ------------------------------------------------------------------------------------------- reading the source
@lru_cache
def modules():
    """{name: path} of every module of the project, tests left out."""
    found = {}
    for path in [*ROOT.glob("*.py"), *(p for folder in ("plumbing", "fast", "tasks", *ANYTHING)
                                       for p in ROOT.glob(f"{folder}/*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


@lru_cache
def tree_of(path):
    return ast.parse(path.read_text())


@lru_cache
def imports_of(name):
    """The modules of the project that a module imports, those inside functions included."""
    named = set()
    for node in ast.walk(tree_of(modules()[name])):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}      # of a package, or names in it
            named |= parts if parts <= modules().keys() else parts | {node.module}
    return named & modules().keys()


def closure(name):
    """All modules of the project that a module pulls in by its imports, itself and their packages included."""
    found, new = set(), {name}
    while new:
        one = new.pop()
        found.add(one)
        package = {one.rpartition(".")[0]} & modules().keys()
        new |= (imports_of(one) | package) - found
    return found


def count_lines(names):
    return sum(len(modules()[name].read_text().splitlines()) for name in names)


@lru_cache
def loaded_by(script):
    """The modules of the project that a fresh process has loaded after `import script`."""
    code = f"import sys, {script}; print(*sys.modules)"
    done = child(["-c", code])
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split()) & modules().keys()


def strings_in(tree):
    """(line, text) of the strings in code: neither docstrings nor defaults of options."""
    skipped = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            skipped.add(id(body[0].value))                        # a docstring
        if isinstance(node, ast.ClassDef):
            skipped |= {id(inner) for field in node.body if isinstance(field, ast.AnnAssign) and field.value
                        for inner in ast.walk(field.value)}
    return [(node.lineno, node.value) for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped]


# -------------------------------------------------------------------------------------------------- imports
@pytest.mark.parametrize("name", modules())
def test_imports_point_down(name):
    place = name.partition(".")[0]
    if place in ANYTHING:
        return
    allowed = MAY_IMPORT[place]
    up = {one for one in imports_of(name) if one not in allowed and one.partition(".")[0] not in allowed}
    assert not up, f"{name} imports {up}"


def test_no_modules_import_each_other():
    """Not even inside of functions, nor by way of others."""
    reached = {}

    def reach(name, above):
        assert name not in above, f"{' -> '.join([*above, name])} is a circle"
        if name not in reached:
            reached[name] = [reach(other, [*above, name]) for other in imports_of(name)]
    for name in modules():
        reach(name, [])


@pytest.mark.parametrize("script", ["train", "sample"])
def test_what_trains_and_samples_knows_no_task(script):
    loaded = loaded_by(script)
    assert {script, "model", "diffusion", "configurator"} <= loaded <= closure(script)
    assert not [name for name in closure(script) if name.partition(".")[0] in ("tasks", *ANYTHING)]


# The redesign wanted 2,000 and 2,200. These are what was reached; they may only fall.
@pytest.mark.parametrize("script, most", [("train", 2390), ("sample", 2700)])
def test_a_script_loads_few_lines(script, most):
    sizes = {name: count_lines([name]) for name in sorted(loaded_by(script))}
    assert sum(sizes.values()) <= most, sizes


def test_the_count_sees_imports_of_every_kind():
    """Inside functions, of packages, and of names from them; against what is known of the project."""
    assert imports_of("configurator") == set()
    assert {"diffusion", "plumbing.dataset", "plumbing.checkpoint", "plumbing"} <= closure("train")
    assert {"tasks", "tasks.scoring", "speculate"} <= closure("evaluate")
    inside = [name for name in modules() for node in ast.walk(tree_of(modules()[name]))
              if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)
              if isinstance(inner, ast.ImportFrom) and inner.module in modules()
              and inner.module not in imports_of(name)]
    assert not inside


# ----------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize("name", modules())
def test_no_function_is_long(name):
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree_of(modules()[name]))
             if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert not {f: n for f, n in sizes.items() if n > LONGEST_FUNCTION}


def test_algorithm_1_stands_in_one_place():
    """Sampling, training through it and the texts all call the one function."""
    callers = {name for name in modules() for node in ast.walk(tree_of(modules()[name]))
               if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "algorithm_1"}
    assert callers <= {"diffusion", "fast.ahead"} and "diffusion" in callers
    defined = [name for name in modules() for node in ast.walk(tree_of(modules()[name]))
               if isinstance(node, ast.FunctionDef) and node.name == "algorithm_1"]
    assert defined == ["diffusion"]


# ------------------------------------------------------------------------------------------------------ names
def test_only_tasks_name_a_task():
    """In code: a docstring, a comment and the default of an option may."""
    from tasks import TASKS
    word = re.compile(rf"(?<![.\w])({'|'.join(TASKS)})\b")       # jsonl is a task, .jsonl the end of a file's name
    named = {f"{name}:{line} {text!r}" for name in modules() if name.partition(".")[0] not in ("tasks", *ANYTHING)
             for line, text in strings_in(tree_of(modules()[name])) if word.search(text)}
    assert not named
    known = {f"tasks.{task}" for task in TASKS}
    assert not {name for name in modules() if name.partition(".")[0] not in ("tasks", *ANYTHING)
                and imports_of(name) & known}


def test_only_diffusion_and_adaptive_name_a_solver():
    from diffusion import SamplerConfig
    solvers = get_args(get_type_hints(SamplerConfig)["solver"])
    assert len(solvers) > 3
    named = {f"{name}:{line} {text!r}" for name in modules()
             if name not in ("diffusion", "adaptive") and name.partition(".")[0] not in ANYTHING
             for line, text in strings_in(tree_of(modules()[name])) if text in solvers}
    assert not named


# -------------------------------------------------------------------------------------- an option's right script
def configs():
    return {script: importlib.import_module(script).Config for script in ("train", "sample", "evaluate")}


@pytest.mark.parametrize("script, words, parts", [
    ("train", ["--steps=4"], ["unknown option --steps", "--max_iters", "T"]),
    ("train", ["--solver=midpoint"], ["unknown option --solver", "sample.py"]),
    ("train", ["--label_dropout=0.1"], ["--group_dropout"]),
    ("sample", ["--sigma=8"], ["unknown option --sigma", "training"]),
    ("sample", ["--label=easy"], ["--group"]),
    ("sample", ["--max_iters=8"], ["train.py"]),
    ("evaluate", ["--sigma=8"], ["unknown option --sigma", "training"]),
])
def test_an_option_of_another_script_gets_a_line_that_says_so(script, words, parts):
    says(error_of(importlib.import_module(script).main, words), *parts)


def test_a_hint_is_of_no_option_and_names_options_that_there_are():
    known = {f.name for config in configs().values() for f in fields(config)}
    for script, config in configs().items():
        own = {f.name for f in fields(config)}
        for name, text in config.hints.items():
            assert name not in own, f"{script}.py has --{name}"
            assert set(re.findall(r"--(\w+)", text)) <= known, text


if __name__ == "__main__":
    for one in SCRIPTS:
        parts = closure(one)
        print(f"{one}.py: {count_lines(parts)} lines in {len(parts)} files, "
              f"{count_lines(loaded_by(one))} of them loaded at its start")
        print("    " + ", ".join(f"{name} {count_lines([name])}" for name in sorted(parts)))
