"""configurator.py against hand-written expectations: the command line, config files, errors, --help."""

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import configurator
from configurator import UserError, configure


@dataclass(frozen=True)
class Config:
    """A field of every type."""
    # where things go
    out_dir: str = "out"  # checkpoints # and logs
    prompt: str = ""

    # optimisation
    batch_size: int = 8  # sequences per step
    learning_rate: float = 1e-3  # -1 = none
    compile: bool = False  # torch.compile
    solver: Literal["euler", "midpoint",
                    "heun"] = "euler"  # of the ODE

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}, expected at least 1")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config(text) writes a config file x.py and reads it."""
    monkeypatch.chdir(tmp_path)

    def read(text, *more):
        Path("x.py").write_bytes(text if isinstance(text, bytes) else text.encode())
        return configure(Config, ["x.py", *more])
    return read


def message(call, *args):
    """The line of the UserError that call(*args) raises."""
    with pytest.raises(UserError) as e:
        call(*args)
    line = e.value.code
    assert line.startswith("error: ") and len(line.splitlines()) == 1
    return line


def cli_error(*argv):
    return message(configure, Config, argv)


# ---- the command line

def test_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert configure(Config) == Config()
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch_size=3"])
    assert configure(Config) == Config(batch_size=3)


@pytest.mark.parametrize("arg, name, value", [
    ("--batch_size=32", "batch_size", 32),
    ("--batch-size=32", "batch_size", 32),
    ("--batch_size=1_000", "batch_size", 1000),
    ("--learning_rate=1e-4", "learning_rate", 1e-4),
    ("--learning_rate=-0.5", "learning_rate", -0.5),
    ("--learning_rate=1", "learning_rate", 1.0),
    ("--compile=True", "compile", True),
    ("--compile=true", "compile", True),
    ("--compile", "compile", True),
    ("--compile=False", "compile", False),
    ("--compile=false", "compile", False),
    ("--solver=heun", "solver", "heun"),
    ("--prompt=a=b", "prompt", "a=b"),
    ("--prompt=", "prompt", ""),
    ("--prompt=--x=1", "prompt", "--x=1"),
    ("--prompt='1'\n", "prompt", "'1'\n"),
])
def test_command_line(arg, name, value):
    got = getattr(configure(Config, [arg]), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("arg, line", [
    ("--learnng_rate=1", "unknown option --learnng_rate; did you mean --learning_rate? (--help lists all)"),
    ("--Batch-Size", "unknown option --Batch_Size; did you mean --batch_size? (--help lists all)"),
    ("--zzz=1", "unknown option --zzz (--help lists all)"),
    ("--=1", "unknown option -- (--help lists all)"),
    ("--batch_size=8.0", "--batch_size is '8.0', expected an integer such as 8"),
    ("--batch_size=1e3", "--batch_size is '1e3', expected an integer such as 8"),
    ("--batch_size=True", "--batch_size is 'True', expected an integer such as 8"),
    ("--batch_size=", "--batch_size is '', expected an integer such as 8"),
    ("--batch_size=9223372036854775808", "--batch_size is 9223372036854775808, expected an integer such as 8"),
    ("--batch_size", "--batch_size needs =VALUE, as in --batch_size=8"),
    ("--prompt", "--prompt needs =VALUE, as in --prompt=''"),
    ("--learning_rate=fast", "--learning_rate is 'fast', expected a finite number such as 0.001"),
    ("--learning_rate=nan", "--learning_rate is nan, expected a finite number such as 0.001"),
    ("--learning_rate=-inf", "--learning_rate is -inf, expected a finite number such as 0.001"),
    ("--learning_rate=1e999", "--learning_rate is inf, expected a finite number such as 0.001"),
    ("--compile=1", "--compile is '1', expected True or False"),
    ("--compile=yes", "--compile is 'yes', expected True or False"),
    ("--solver=huen", "--solver is 'huen', expected one of euler, midpoint, heun; did you mean heun?"),
    ("--solver=", "--solver is '', expected one of euler, midpoint, heun"),
    ("-b", "'-b' is neither --key=value nor a config file, x.py (see --help)"),
    ("-x.py", "'-x.py' is neither --key=value nor a config file, x.py (see --help)"),
    ("batch_size=3", "'batch_size=3' is neither --key=value nor a config file, x.py (see --help)"),
    ("config", "'config' is neither --key=value nor a config file, x.py (see --help)"),
    ("", "'' is neither --key=value nor a config file, x.py (see --help)"),
])
def test_command_line_errors(arg, line):
    assert cli_error(arg) == "error: " + line


def test_a_hint_says_what_to_do_instead_of_an_option_that_is_elsewhere(config):
    """It is no field, and it is inherited."""
    @dataclass(frozen=True)
    class Base:
        seed: int = 0
        hints: ClassVar = {"sigma": "sigma was fixed in training"}

    @dataclass(frozen=True)
    class Hinted(Base):
        steps: int = 1

    line = "error: unknown option --sigma: sigma was fixed in training"
    assert message(configure, Hinted, ["--sigma=8"]) == line == message(configure, Hinted, ["--sigma"])
    Path("y.py").write_text("sigma = 8\n")
    assert message(configure, Hinted, ["y.py"]) == "error: y.py:1: unknown option sigma: sigma was fixed in training"
    assert message(configure, Hinted, ["--hints=1"]) == "error: unknown option --hints (--help lists all)"
    assert configure(Hinted, ["--seed=3"]) == Hinted(seed=3)


def test_space_instead_of_equals():
    assert cli_error("--batch_size", "32") == "error: --batch_size needs =VALUE, as in --batch_size=8"
    assert cli_error("--compile", "False").startswith("error: 'False' is neither --key=value nor")


def test_messages_stay_short_and_on_one_line():
    assert len(cli_error("--batch_size=" + "x\n" * 9999)) < 150
    assert cli_error("--a\nb\u2028c=1").startswith("error: unknown option --a b c")


def test_post_init_may_refuse():
    assert cli_error("--batch_size=0") == "error: batch_size is 0, expected at least 1"


# ---- config files

def test_config_file(config):
    assert config('"""Docstring."""\n'
                  "batch_size = 8  # a comment\n"
                  "learning_rate = 2.5e-1\n"
                  "out_dir = ('a'\n"
                  "           'b')\n"
                  "prompt = 'back\\\\slash' \n"
                  "compile = True; solver = 'heun'\n",
                  ) == Config(out_dir="ab", prompt="back\\slash", batch_size=8, learning_rate=0.25,
                              compile=True, solver="heun")


@pytest.mark.parametrize("text", ["", "# only a comment\n", '"""only a docstring"""', "\ufeff", "\r\n"])
def test_config_file_that_sets_nothing(config, text):
    assert config(text) == Config()


def test_int_becomes_float(config):
    value = config("learning_rate = 3").learning_rate
    assert value == 3.0 and type(value) is float


def test_left_to_right(config):
    Path("y.py").write_text("batch_size = 2\nout_dir = 'y'\n")
    assert config("batch_size = 1", "y.py", "--out_dir=cli") == Config(batch_size=2, out_dir="cli")
    assert configure(Config, ["--batch_size=3", "x.py"]) == Config(batch_size=1)
    assert configure(Config, ["--batch_size=3", "--batch_size=4"]) == Config(batch_size=4)


ALLOWED = 'expected a number of 64 bits, a "string", True or False, found '


@pytest.mark.parametrize("text, line", [
    # names and types
    ("\nlearnng_rate = 1", "2: unknown option learnng_rate; did you mean learning_rate? (--help lists all)"),
    ("batch_size = '8'", "1: batch_size is '8', expected an integer such as 8"),
    ("batch_size = True", "1: batch_size is True, expected an integer such as 8"),
    ("batch_size = 8.0", "1: batch_size is 8.0, expected an integer such as 8"),
    ("learning_rate = '1'", "1: learning_rate is '1', expected a finite number such as 0.001"),
    ("learning_rate = False", "1: learning_rate is False, expected a finite number such as 0.001"),
    ("compile = 1", "1: compile is 1, expected True or False"),
    ("compile = 'True'", "1: compile is 'True', expected True or False"),
    ("out_dir = 1", "1: out_dir is 1, expected a string such as 'out'"),
    ("solver = 'huen'", "1: solver is 'huen', expected one of euler, midpoint, heun; did you mean heun?"),
    ("solver = 0", "1: solver is 0, expected one of euler, midpoint, heun"),
    ("batch_size = 1\n\nbatch_size = 1", "3: batch_size is already set on line 1; keep one of the two"),
    # statements
    ("import os", "1: expected name = value, found import os"),
    ("'doc'\n'string'", "2: expected name = value, found 'string'"),
    ("batch_size += 1", "1: expected name = value, found batch_size += 1"),
    ("batch_size: int = 1", "1: expected name = value, found batch_size: int = 1"),
    ("a, b = 1, 2", "1: expected name = value, found a, b = (1, 2)"),
    ("_a = 2", "1: unknown option _a (--help lists all)"),
    ("_a = _b = 2", "1: expected name = value, found _a = _b = 2"),
    ("if True:\n  batch_size = 1", "1: expected name = value, found if True:     batch_size = 1"),
    # expressions
    ("batch_size = int(3)", "1: " + ALLOWED + "int(3)"),
    ("prompt = f'{1}'", "1: " + ALLOWED + "f'{1}'"),
    ("prompt = 'a'.b", "1: " + ALLOWED + "'a'.b"),
    ("prompt = 'a'[0]", "1: " + ALLOWED + "'a'[0]"),
    ("prompt = None", "1: " + ALLOWED + "None"),
    ("prompt = b''", "1: " + ALLOWED + "b''"),
    ("prompt = ['a']", "1: " + ALLOWED + "['a']"),
    ("compile = not True", "1: " + ALLOWED + "not True"),
    ("compile = true", "1: " + ALLOWED + "true; did you mean True?"),
    ("batch_size = 1 << 3", "1: " + ALLOWED + "1 << 3"),
    ("batch_size = 8 * 4", "1: " + ALLOWED + "8 * 4"),
    ("learning_rate = 1 + 2j", "1: " + ALLOWED + "1 + 2j"),
    ("prompt = {[]: 1}", "1: " + ALLOWED + "{[]: 1}"),
    ("learning_rate = 1j", "1: " + ALLOWED + "1j"),
    ("prompt = gpt2", "1: " + ALLOWED + "gpt2"),
    ("batch_size = batch_size", "1: " + ALLOWED + "batch_size"),
    ("prompt = 'a' * 1000000000", "1: " + ALLOWED + "'a' * 1000000000"),
    ("batch_size = -True", "1: " + ALLOWED + "-True"),
    ("learning_rate = 1e999", "1: " + ALLOWED + "1e309"),
    ("batch_size = 9223372036854775808", "1: " + ALLOWED + "9223372036854775808"),
    # text
    ("\nbatch_size = = 3", "2: invalid syntax; expected lines of name = value"),
])
def test_config_file_errors(config, text, line):
    assert message(config, text) == "error: x.py:" + line


def test_number_limits(config):
    assert config("batch_size = 9223372036854775807").batch_size == 2**63 - 1
    assert config("batch_size = 0x10").batch_size == 16
    assert config("learning_rate = -1e-400").learning_rate == 0.0


@pytest.mark.parametrize("text", ["(" * 9999, "batch_size = " + "-" * 99999 + "1", "batch_size = " + "1+" * 9999 + "1",
                                  "batch_size = " + "9" * 9999, "batch_size = 0x" + "9" * 9999])
def test_monstrous_files(config, text):
    assert len(message(config, text)) < 300


def test_unreadable_files(config, tmp_path):
    Path("config").mkdir()
    Path("config/l2d_gsm8k.py").touch()
    Path("dir.py").mkdir()
    assert cli_error("no.py") == "error: cannot read no.py: No such file or directory"
    assert cli_error("config/l2dgsm8k.py") == ("error: cannot read config/l2dgsm8k.py: No such file or directory; "
                                               "did you mean config/l2d_gsm8k.py?")
    assert cli_error("dir.py") == "error: cannot read dir.py: Is a directory"
    assert cli_error("x" * 999 + ".py").endswith(": File name too long")
    assert message(config, "prompt = '\0'").startswith("error: x.py:1: source code string cannot contain null bytes")
    assert message(config, b"prompt = '\xff'").startswith("error: x.py:1: 'utf-8' codec can't decode byte 0xff")


def test_never_executes(config):
    for code in ['__import__("os").system("touch hacked")', 'open("hacked", "w")', "(lambda: open('hacked', 'w'))()",
                 "[open(c, 'w') for c in ['hacked']]", "f'{open(\"hacked\", \"w\")}'"]:
        for text in code, f"prompt = {code}", f"prompt = 'a' + {code}", f"def f(x={code}): pass", f"prompt: {code} = 1":
            message(config, text)
            assert not Path("hacked").exists()


# ---- properties

relaxed = settings(deadline=None)  # a busy machine is no bug

VALUES = {
    "batch_size": st.integers(1, 2**63 - 1),
    "learning_rate": st.floats(allow_nan=False, allow_infinity=False),
    "compile": st.booleans(),
    "solver": st.sampled_from(["euler", "midpoint", "heun"]),
    "prompt": st.text(),
    "out_dir": st.text().filter(lambda text: not text.startswith("~")),       # a home directory
}


@relaxed
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_round_trip_on_the_command_line(values):
    assert configure(Config, [f"--{k}={v}" for k, v in values.items()]) == Config(**values)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("property") / "x.py"


@relaxed
@given(values=st.fixed_dictionaries({}, optional=VALUES))
def test_round_trip_in_a_file(path, values):
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in values.items()), encoding="utf-8")
    assert configure(Config, [str(path)]) == Config(**values)


PIECES = st.sampled_from([
    "batch_size", "prompt", "_a", " = ", "=", "\n", "1", "2.5", "'s'", "True", "+", "**", "-", "(", ")", "[", "]", ".",
    ",", ":", "f''", "import os", "lambda", "if", "\\", "\0", "\t", "#", '"""', '__import__("os").system("touch x")'])


@pytest.mark.filterwarnings("ignore:invalid")  # Python on 1if, "\\d"
@given(text=st.text() | st.lists(PIECES).map("".join) | st.lists(PIECES).map(lambda p: "prompt = " + "".join(p)))
@example(text='__import__("os").system("touch x")')
@example(text='prompt = __import__("os").system("touch x")')
@settings(relaxed, max_examples=300)
def test_any_text_parses_or_is_refused(path, text):
    path.write_bytes(text.encode())
    try:
        assert isinstance(configure(Config, [str(path)]), Config)
    except UserError as e:
        assert e.code.startswith("error: ") and len(e.code.splitlines()) == 1


@relaxed
@given(st.binary())
def test_any_bytes_parse_or_are_refused(path, data):
    path.write_bytes(data)
    try:
        configure(Config, [str(path)])
    except UserError:
        pass


@relaxed
@given(st.lists(st.text() | st.text().map("--{}".format) | st.sampled_from(["--batch_size=", "--compile"])))
def test_any_command_line_is_read_or_refused(argv):
    argv = [arg for arg in argv if arg not in ("-h", "--help")]
    try:
        configure(Config, argv)
    except UserError:
        pass


# ---- --help, and the exit status

@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--nonsense", "--help"]])
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as e:
        configure(Config, argv, usage="\nTrains.\n")
    assert e.value.code == 0 and not isinstance(e.value, UserError)
    assert capsys.readouterr().out == """\
Trains.

Options, with their defaults:

where things go
  --out_dir=out                  str    checkpoints # and logs
  --prompt=''                    str

optimisation
  --batch_size=8                 int    sequences per step
  --learning_rate=0.001          float  -1 = none
  --compile=False                bool   torch.compile
  --solver=euler                 euler|midpoint|heun  of the ODE
"""


def test_exit_status(tmp_path):
    script = tmp_path / "script.py"
    script.write_text('"""Usage."""\n'
                      "from __future__ import annotations\n"
                      "from dataclasses import dataclass\n"
                      "from configurator import configure\n"
                      "@dataclass(frozen=True)\n"
                      "class Config:\n"
                      "    steps: int = 4  # evaluations per token\n"
                      "print(configure(Config, usage=__doc__))\n")

    def run(*args):
        done = subprocess.run([sys.executable, script, *args], capture_output=True, text=True,
                              env={"PYTHONPATH": str(Path(configurator.__file__).parent)})
        return done.returncode, done.stdout, done.stderr

    assert run("--steps=2") == (0, "Config(steps=2)\n", "")
    assert run("--step=2") == (1, "", "error: unknown option --step; did you mean --steps? (--help lists all)\n")
    assert run("--help") == (0, "Usage.\n\nOptions, with their defaults:\n"
                                "  --steps=4                      int    evaluations per token\n", "")


def test_a_second_signal_after_the_last_line_ends_at_once_without_a_traceback():
    code = ("import atexit, configurator, os, signal, time\n"
            "def end(): os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n"
            "def main(): atexit.register(end); os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
            "configurator.run(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "stopped; what was finished is kept\n")
