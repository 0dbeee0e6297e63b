"""
The command line of every script, which is nanoGPT's, made strict:

    python train.py [config/x.py ...] [--key=value ...]

Arguments apply from left to right, so the last one wins. The options are the fields of a frozen dataclass,
of type int, float, bool, str or Literal["a", "b"]. `--batch-size` equals `--batch_size`, and a bare `--flag`
is `--flag=True`. A config file holds lines `name = value`; a value is a number, a string, True or False. The
file is parsed, never executed.

`--help` prints the comments in that dataclass: a comment above a field as a heading, one behind it as its
explanation. A class attribute `hints: ClassVar = {name: text}` says what to do instead of an option that does
not exist.
"""
import ast
import difflib
import errno
import glob
import inspect
import io
import math
import os
import shlex
import signal
import sys
import tokenize
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

BOOLS = {"True": True, "true": True, "False": False, "false": False}


class UserError(SystemExit):
    """A mistake of the user's. Uncaught, it prints one line to stderr, no traceback, and exits with 1."""

    def __init__(self, message):
        line = " ".join(message.splitlines())         # whatever the user's text held
        super().__init__(f"error: {line.removeprefix('error: ')}")


def discard_output():
    """Throw away what is printed from here on: the reader of a pipe has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main, remedy="use a smaller model, or a machine with more of it"):
    """
    Run a script's main, and end as a program should.

    Ends quietly where a pipe is closed; with one line and status 130 or 143 on Ctrl-C or SIGTERM; with a line
    that names the file where a disk is full; with a line and the remedy where memory runs out. What the
    terminal cannot encode is replaced.
    """
    def terminate(number, frame):
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGTERM, terminate)
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))    # closed ones
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()                             # Python flushes once more at its end
    except KeyboardInterrupt as e:
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_DFL)         # a second one ends at once
        print("stopped; what was finished is kept", file=sys.stderr)
        raise SystemExit(128 + (e.args or (signal.SIGINT,))[0]) from None
    except (OSError, RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            raise UserError(f"out of memory; {remedy} ({first_line(e)})") from None
        if not isinstance(e, OSError):
            raise
        raise UserError(f"{e.filename or 'a file'}: {e.strerror or e}") from None


def first_line(error):
    """Return the first line of an error's text, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error):
    """Return whether the error says that memory ran out, on a CPU or on a GPU."""
    signs = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc",
             "Storage size calculation overflowed")
    if isinstance(error, RuntimeError):
        return any(sign in str(error) for sign in signs)
    return isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM


def at_least(config, **limits):
    """Raise UserError for the first field of config that is below its limit."""
    for name, low in limits.items():
        if getattr(config, name) < low:
            raise UserError(f"{name}={getattr(config, name)}, but it must be at least {low}")


def require(holds, message):
    """Raise UserError with the message unless holds."""
    if not holds:
        raise UserError(message)


def without_effect(config, needs, holds, *names):
    """Raise UserError for the first of these fields that was set, unless what it needs holds."""
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in names and value != f.default and not holds:
            raise UserError(f"{f.name}={value} does nothing without {needs}; leave it out")


def configure(cls, argv=None, usage="", defaults=None):
    """Return the instance of the dataclass cls that the command line argv (default: sys.argv[1:]) asks for.

    defaults: a dict of options that hold unless the command line says otherwise, in place of the fields' own.
    `--help` prints usage and every field, then exits with 0. Raises UserError for any mistake.
    cls.__post_init__ may raise it too, for combinations that cannot work.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(_help(cls, usage))
        raise SystemExit(0)
    kinds = get_type_hints(cls)
    examples = {f.name: f.default for f in fields(cls)}
    values = dict(defaults or {})

    def put(name, value, place="", dashes="--"):  # place: "config/x.py:3: " for a line of a file
        if name not in examples:
            hint = getattr(cls, "hints", {}).get(name)
            advice = f": {hint}" if hint else f"{_did_you_mean(name, examples, dashes)} (--help lists all)"
            raise UserError(f"{place}unknown option {dashes}{name}{advice}")
        values[name] = _checked(value, kinds[name], examples[name], place + dashes + name)
        if kinds[name] is str and name != "prompt":              # paths: a shell does not expand --key=~/x
            values[name] = os.path.expanduser(values[name])

    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")  # --start=a=b: the value is a=b
            name = key.replace("-", "_")
            if not equals and kinds.get(name) in (bool, bool | str):
                text = "True"
            elif not equals and name in examples:
                example = shlex.quote(str(examples[name]))
                raise UserError(f"--{name} needs =VALUE, as in --{name}={example}")
            put(name, _from_text(text, kinds.get(name)))
        elif arg.endswith(".py") and not arg.startswith("-"):
            for name, (value, line) in _read_config(arg).items():
                put(name, value, f"{arg}:{line}: ", dashes="")
        else:
            raise UserError(f"{arg!r} is neither --key=value nor a config file, x.py (see --help)")
    return cls(**values)


def _did_you_mean(word, known, dashes=""):
    """Return '; did you mean --learning_rate?', or '' if nothing known looks like the word."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {dashes}{near[0]}?" if near else ""


def _from_text(text, kind):
    """Return the value of a text for a field of that type, or the text itself if it is not one."""
    try:
        if kind in (bool, bool | str):
            return BOOLS.get(text, text)
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text  # _checked refuses it


def _is_number(value):
    """Return whether value is a 64-bit int or a finite float; a bool or nan is neither."""
    return type(value) is int and abs(value) < 2**63 or type(value) is float and math.isfinite(value)


def _checked(value, kind, default, name):
    """Return value if it is of type kind; an int becomes a float where one is wanted. Raises UserError."""
    choices = get_args(kind)
    if kind is float and type(value) is int:
        value = float(value)
    if kind == bool | str and type(value) in choices and value != "":
        return value
    if value in choices or type(value) is kind and (kind in (bool, str) or _is_number(value)):
        return value
    expected = {int: f"an integer such as {default}", float: f"a finite number such as {default}",
                str: f"a string such as {default!r}", bool: "True or False",
                bool | str: "True, False or the name of a file"}.get(kind)
    if not expected:
        expected = f"one of {', '.join(choices)}{_did_you_mean(str(value), choices)}"
    raise UserError(f"{name} is {value!r:.80}, expected {expected}")


def _read_config(path):
    """Return {name: (value, line number)} of a config file. Raises UserError."""
    values = {}
    line = 1
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
        for node in tree.body[ast.get_docstring(tree) is not None:]:
            line = node.lineno
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=expression) if name not in values:
                    values[name] = _literal(expression), line
                case ast.Assign(targets=[ast.Name(id=name)]):
                    raise ValueError(f"{name} is already set on line {values[name][1]}; keep one of the two")
                case _:
                    raise ValueError(f"expected name = value, found {ast.unparse(node):.80}")
    except OSError as e:
        near = _did_you_mean(path, glob.glob("config/*.py"))
        raise UserError(f"cannot read {path}: {e.strerror}{near}")
    except SyntaxError as e:
        raise UserError(f"{path}:{e.lineno or 1}: {e.msg}; expected lines of name = value")
    except (ValueError, RecursionError, MemoryError) as e:
        raise UserError(f"{path}:{line}: {str(e) or 'nested too deeply'}")
    return values


def _literal(node):
    """Return the value of a number, a string, True or False. Raises ValueError for anything else."""
    with suppress(ValueError, TypeError):            # of an expression that is no literal
        value = ast.literal_eval(node)
        if type(value) in (str, bool) or _is_number(value):
            return value
    near = _did_you_mean(node.id, ["True", "False"]) if isinstance(node, ast.Name) else ""
    raise ValueError('expected a number of 64 bits, a "string", True or False, found '
                     f"{ast.unparse(node):.80}{near}")


def _help(cls, usage):
    """Return usage, then each field under its heading: option and default, type, the comment behind it."""
    notes = {}
    for base in (c for c in reversed(cls.__mro__) if is_dataclass(c)):
        source = inspect.getsource(base)  # `cls` stands at the top level of a file
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}
        tree = ast.parse(source).body[0]
        above = tree.lineno
        for node in tree.body:
            if isinstance(node, ast.AnnAssign):
                headings = ["\n" + comments[i] for i in range(above + 1, node.lineno) if i in comments]
                notes[node.target.id] = headings, comments.get(node.end_lineno, "")
            above = node.end_lineno
    rows = [(usage or "").strip(), "\nOptions, with their defaults:"]
    for f in fields(cls):
        headings, comment = notes.get(f.name, ([], ""))
        kind = get_type_hints(cls)[f.name]
        option = f"--{f.name}={shlex.quote(str(f.default))}"
        names = [getattr(choice, "__name__", choice) for choice in get_args(kind) or (kind,)]
        kind = "|".join(names)
        rows += [*headings, f"  {option:<30} {kind:<5}  {comment}".rstrip()]
    return "\n".join(rows).strip()
