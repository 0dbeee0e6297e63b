"""
tasks/sandbox.py, and the scores of code. Truths: the benchmarks' reference solutions; programs that Python itself runs.

L2D_FULL=1 runs every reference solution of HumanEval and MBPP; without it a sample that changes from day to day.
"""
import itertools
import os
import random
import re
import socket
import subprocess
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_scoring import BENCHMARKS, needs_benchmarks, problem

from configurator import UserError
from tasks import TASKS, Problem, allow_code, check_gold, sandbox, score
from tasks.sandbox import run


# ---------------------------------------------------------------------------------- code
def code_problems(name):
    file = {"humaneval": "HumanEval.jsonl.gz", "mbpp": "mbpp.jsonl"}[name]
    splits = TASKS[name].load(TASKS[name].options(source=str(BENCHMARKS / file)), None)[0]
    problems = list(itertools.chain(*splits.values()))
    counts = dict(humaneval={"test": 164}, mbpp={"dev": 10, "test": 500, "val": 90, "train": 374})
    assert {k: len(v) for k, v in splits.items()} == counts[name]
    return problems if os.environ.get("L2D_FULL") else random.Random(time.strftime("%j")).sample(problems, 6)


@needs_benchmarks
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_reference_solutions_pass_and_empty_and_perturbed_ones_fail(name):
    for p in code_problems(name):
        check_gold(p)
        assert score(p, p.answer, run_code=True) == (True, True, True), p.place
        assert not score(p, "", run_code=True).right, p.place
        assert score(p, p.answer + "\nQuestion: Next?\nAnswer:", run_code=True).right or name == "humaneval"
        wrong = re.sub(r"\breturn\b", "return 0.125,", p.answer)          # every result is another one
        if wrong != p.answer:
            assert not score(p, wrong, run_code=True).right, p.place


ATTACKS = {
    "sys.exit": ("import sys\nsys.exit(0)", True), "os._exit": ("import os\nos._exit(0)", True),
    "an exception": ("1 / 0", True), "no Python": ("def f(:", False), "nothing": ("raise SystemExit", True),
    "a crash": ("import ctypes\nctypes.string_at(0)", True), "abort": ("import os\nos.abort()", True),
    "an endless loop": ("while True: pass", True),
    "a loop that catches everything": ("while True:\n try:\n  while True: pass\n except BaseException: pass",
                                       True),
    "ignored signals": ("import signal\nfor s in range(1, 32):\n try: signal.signal(s, signal.SIG_IGN)\n"
                        " except OSError: pass\nwhile True: pass", True),
    "sleep": ("import time\ntime.sleep(1000)", True),
    "a flood of print": ("while True: print('x' * 10_000)", True),
    "a flood of every descriptor": ("import os\nwhile True:\n for fd in range(64):\n"
                                    "  try: os.write(fd, b'x' * 10_000)\n  except OSError: pass", True),
    "a fork bomb": ("import os\nwhile True:\n try: os.fork()\n except OSError: pass", True),
    "a thread bomb": ("import threading, time\nwhile True:\n"
                      " threading.Thread(target=time.sleep, args=(99,)).start()", True),
    "memory": ("x = []\nwhile True: x.append(bytearray(10_000_000))", True),
    "a big number": ("9 ** 9 ** 9", True), "deep recursion": ("def f(): f()\nf()", True),
    "deep brackets": ("(" * 100_000 + ")" * 100_000, False),
    "a full disk": ("f = open('f', 'wb')\nwhile True: f.write(bytes(1_000_000)); f.flush()", True),
    "many files": ("i = 0\nwhile True:\n open(f'{i}', 'wb').write(bytes(100_000)); i += 1", True),
    "a deleted working directory": ("import os, shutil\nshutil.rmtree(os.getcwd())\nopen('f', 'w')", True),
    "kill all": ("import os\nos.kill(-1, 9)", True),
    "kill the parent": ("import os\nos.kill(os.getppid(), 9)\n1 / 0", True),
    "stop": ("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nos.kill(0, signal.SIGSTOP)\n"
             "while True: pass", True),
    "the network": ("import socket\nsocket.create_connection(('127.0.0.1', 80), 1)", True),
    "patched exits": ("import os, sys\nos._exit = sys.exit = lambda *_: None\n1 / 0", True),
    "an early end of one of two": ("import os\nif os.fork(): os._exit(0)\n1 / 0", True),
    "a hook for what is raised": ("import os, sys\ndef hook(kind, error, tb):\n while tb:\n  for x in tb.tb_frame.f_locals.values():\n"
                                  "   for fd in range(9):\n    try: os.write(fd, f'\\n{x}\\n'.encode())\n    except OSError: pass\n"
                                  "  tb = tb.tb_next\nsys.excepthook = hook\n1 / 0", True),
    "the words of success": ("print('compiled\\npassed\\nTrue', flush=True)\nimport os\nfor fd in range(64):\n"
                             " try: os.write(fd, b'\\ncompiled\\n')\n except OSError: pass\nos._exit(0)", True),
    "a surrogate": ("'\ud800'", False), "a NUL": ("x = '\0'", False), "input": ("input()", True),
}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """{attack: (its Outcome, seconds it took)}, several at a time; run by a copy, known by its name to ps."""
    def attack(item):
        started = time.monotonic()
        return item[0], (run(item[1][0], seconds=1.5), time.monotonic() - started)

    copy, original = tmp_path_factory.mktemp("attacked") / "attacked_sandbox.py", sandbox.__file__
    copy.write_text(Path(original).read_text())
    sandbox.__file__ = str(copy)
    try:
        with ThreadPoolExecutor(6) as pool:
            return dict(pool.map(attack, ATTACKS.items()))
    finally:
        sandbox.__file__ = original


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_costs_one_problem(name, attacked):
    """It fails within its time, and so do those that run beside it, each for itself."""
    outcome, seconds = attacked[name]
    assert outcome[:2] == (ATTACKS[name][1], False) and seconds < 10


def test_nothing_is_left_of_an_attack_and_the_next_problem_is_judged_as_before(attacked):
    alive = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "attacked_sandbox.py" not in alive
    assert run("assert sorted([2, 1]) == [1, 2]")[:2] == (True, True)
    assert run("assert sorted([2, 1]) == [2, 1]")[:2] == (True, False)


def test_a_program_that_leaves_processes_behind_takes_them_along():
    """Even one in a session of its own, which no signal to a group reaches."""
    code = "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n" \
           "  open('/proc/self/comm', 'w').write('left-behind')\n  time.sleep(99)"
    outcome = run(code)
    if "processes of its own" in outcome.lacks:
        pytest.skip("this system grants no process namespace")
    time.sleep(0.2)
    assert "left-behind" not in subprocess.run(["ps", "-eo", "comm"], capture_output=True, text=True).stdout


def test_a_program_starts_in_an_empty_directory_that_it_may_write():
    assert run("import os\nassert os.listdir() == []\nopen('f', 'w').write('x')\n"
               "assert open('f').read() == 'x'").passed
    assert run("import os\nassert os.listdir() == []").passed            # of its own, each time


def test_a_program_sees_nothing_of_the_evaluating_process(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "token")
    assert run("import os, sys\nassert 'SECRET' not in os.environ and 'torch' not in sys.modules").passed
    assert run(f"import os, sys\nassert {str(Path.cwd())!r} not in sys.path").passed


def test_no_file_outside_is_changed(tmp_path):
    """Not as the user who may: the files themselves can only be read, where the system grants it."""
    target = tmp_path / "precious"
    target.write_text("precious")
    tmp_path.chmod(0o777)
    target.chmod(0o666)
    old, new = str(target), str(tmp_path / "new")
    outcome = run(f"import os\nfor do in (lambda: open({old!r}, 'w'), lambda: os.remove({old!r}),\n"
                  f"           lambda: open({new!r}, 'w')):\n try: do()\n except OSError: pass")
    if "read-only files" in outcome.lacks:
        pytest.skip("this system grants no read-only view of the files")
    assert outcome.passed and target.read_text() == "precious" and list(tmp_path.iterdir()) == [target]


def test_limits_hold():
    """As the program itself sees them."""
    limits = dict(CORE=0, NOFILE=64, FSIZE=sandbox.DISK, AS=sandbox.MEMORY, CPU=11)
    assert run("import resource as r\n" + "\n".join(f"assert r.getrlimit(r.RLIMIT_{name}) == ({n}, {n})"
                                                    for name, n in limits.items())).passed
    assert run("import os\nassert os.getuid() != 0 and os.geteuid() != 0").passed
    assert run("import os\ntry: os.setuid(0)\nexcept OSError: pass\nassert os.getuid() != 0").passed


def test_what_the_system_does_not_grant_is_said(monkeypatch, tmp_path, capsys):
    """A system without namespaces: a sandbox.py whose unshare always fails."""
    text = Path(sandbox.__file__).read_text().replace("libc.unshare(", "bool(").replace("libc.syscall(",
                                                                                        "bool(")
    (tmp_path / "sandbox.py").write_text(text)
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    assert run("assert True") == (True, True, ("network", "processes of its own", "read-only files"))
    allow_code([problem("x", task="mbpp", test="x")], run_code=True)
    assert "lacks here: network, processes of its own, read-only files" in capsys.readouterr().out
    assert run("while True: pass", seconds=1)[:2] == (True, False)       # the limits hold all the same
    assert run("import os\nwhile True: os.fork()", seconds=1)[:2] == (True, False)


def test_code_is_run_only_where_the_user_says_so():
    p = problem("pass", task="mbpp", test="assert True")
    with pytest.raises(UserError, match="mbpp is scored by running .* --run_code"):
        allow_code([problem("#### 1"), p], run_code=False)
    with pytest.raises(ValueError):
        score(p, "pass")
    allow_code([problem("#### 1")], run_code=False)


def test_what_is_written_behind_the_code_does_not_count():
    """As the authors of HumanEval cut it."""
    p = Problem("def f(x):\n", "    return x", "humaneval", test="assert f(3) == 3")
    for more in ("", "\n\ndef g(:", "\nclass", "\nprint(f(", "\nif __name__", "\n# comment (", "\n    y = 1"):
        assert score(p, "    return x" + more, run_code=True).right, more
    assert not score(p, "    return x +", run_code=True).well_formed
    assert score(p, "    return x + 1", run_code=True) == (False, False, True)

FORGERIES = {   # find whatever looks like a secret, write it to every descriptor, end before the tests
    "in frames": """
        todo, frame = [], sys._getframe()
        while frame:
            todo += [*frame.f_locals.values(), *frame.f_globals.values()]
            frame = frame.f_back
        for _ in range(3):
            found += todo
            todo = [y for x in todo for y in ([*x.values()] if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ())]
        """,
    "in the garbage collector": """
        todo, seen, frame = gc.get_objects(), set(), sys._getframe()
        while frame:
            todo.append(frame)
            frame = frame.f_back
        while todo:
            x = todo.pop()
            if id(x) not in seen:
                seen.add(id(x))
                todo += gc.get_referents(x)
                found.append(x)
        """,
    "in other processes": """
        for path in [*glob.glob("/proc/*/fd/*"), *glob.glob("/proc/*/environ"), *glob.glob("/proc/*/mem")]:
            try:
                found.append(open(path, "rb").read(100_000))
            except OSError:
                pass
        """,
}


def forge(name):
    return "import gc, glob, os, re, sys\nfound = []" + textwrap.dedent(FORGERIES[name]) + textwrap.dedent("""
        for text in {t for x in found if isinstance(x, (str, bytes)) for t in re.findall("[0-9a-f]{32}", str(x))}:
            for fd in range(64):
                try:
                    os.write(fd, f"\\n{text}\\n".encode())
                except OSError:
                    pass
        os._exit(0)
        """)


@pytest.mark.parametrize("name", FORGERIES)
def test_the_secret_of_success_is_not_found(name):
    assert run(forge(name))[:2] == (True, False)


def test_the_forgeries_would_find_a_secret(monkeypatch, tmp_path):
    """In a sandbox.py that leaves it in a frame."""
    text = Path(sandbox.__file__).read_text()
    (tmp_path / "sandbox.py").write_text(text.replace("    del secret\n", "    kept = [secret]\n"))
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    tmp_path.chmod(0o755)
    assert run(forge("in frames")).passed and run(forge("in the garbage collector")).passed


RIGHT = {   # what `python program.py` runs to its end
    "a dataclass with a quoted annotation": "from dataclasses import dataclass\nfrom typing import Optional\n@dataclass\nclass Node:\n"
        "    next: 'Optional[Node]' = None\nassert Node().next is None",
    "a dataclass with postponed annotations": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
        "class A:\n    x: int = 1\nassert A(2).x == 2",
    "pickle": "import pickle\nclass A: pass\nassert isinstance(pickle.loads(pickle.dumps(A())), A)",
    "type hints": "import typing\nclass A:\n    x: 'A'\nassert typing.get_type_hints(A) == {'x': A}",
    "a pool": "from multiprocessing import Pool\ndef f(x): return x * x\nwith Pool(2) as p:\n    assert p.map(f, [1, 2]) == [1, 4]",
    "executors": "from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor\nfor E in ThreadPoolExecutor, "
        "ProcessPoolExecutor:\n    with E(2) as e: assert list(e.map(abs, [-1, 2])) == [1, 2]",
    "asyncio": "import asyncio\nasync def f(): return 1\nassert asyncio.run(f()) == 1",
    "__main__": "import __main__, sys\nx = 3\nassert __main__.x == 3 and __name__ == '__main__' and vars(__main__) is globals()",
    "if main": "done = []\nif __name__ == '__main__':\n    done.append(1)\nassert done",
    "its own source": "import inspect\ndef f(): return 1\nassert inspect.getsource(f) == 'def f(): return 1\\n'",
    "doctest": "import doctest\ndef f():\n    '''\n    >>> f()\n    1\n    '''\n    return 1\nassert doctest.testmod() == (0, 1)",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\nunittest.main(exit=False)",
    "a byte order mark": "\ufeffx = 1", "standard input": "import sys\nassert sys.stdin.read() == ''",
    "files": "import os, tempfile\nopen(os.path.expanduser('~/f'), 'w').write('x')\ntempfile.NamedTemporaryFile().write(b'x')",
    "subprocess": "import subprocess\nassert subprocess.run(['echo', 'x'], capture_output=True).stdout == b'x\\n'",
    "an exit handler": "import atexit, os\natexit.register(lambda: os._exit(1))", "300 MB": "assert len(bytearray(300_000_000))",
}


def test_right_programs_pass():
    with ThreadPoolExecutor(3) as pool:
        outcomes = dict(zip(RIGHT, pool.map(run, RIGHT.values())))
    assert all(outcome.passed for outcome in outcomes.values()), outcomes


def test_a_dataclass_in_an_answer_is_right():
    """As the harness of HumanEval runs it."""
    code = RIGHT["a dataclass with a quoted annotation"]
    assert score(Problem("q", "", "mbpp", test="assert Node(1).next == 1"), code, run_code=True) == (True, True, True)


def test_sockets_of_the_file_system_are_out_of_reach(tmp_path):
    """One that everybody may use, by its path; those of the machine itself, such as the system bus, are no different."""
    path = str(tmp_path / "socket")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        os.chmod(path, 0o777)
        server.listen()
        server.settimeout(0.2)
        outcome = run(f"import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({path!r})\ns.send(b'hello')")
        if "no sockets of the file system" in outcome.lacks:
            pytest.skip("this system filters no system calls")
        with pytest.raises(TimeoutError):
            server.accept()
    assert outcome[:2] == (True, False)
    assert run("import socket\na, b = socket.socketpair()\na.send(b'x')\nassert b.recv(1) == b'x'").passed
    fork = "import os, socket\npid = os.fork()\nif not pid:\n try: socket.socket(socket.AF_UNIX)\n except OSError: os._exit(7)\n"
    assert run(fork + "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7").passed            # nor a child's


def test_other_processes_are_not_seen():
    outcome = run("import os\nassert [p for p in os.listdir('/proc') if p.isdigit()] == ['1']")
    assert outcome.passed or "processes of its own" in ", ".join(outcome.lacks)
