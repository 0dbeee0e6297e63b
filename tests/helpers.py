"""Tools of the tests: tiny models, a naive Algorithm 1, short runs, and processes that may be killed."""
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

import diffusion
from configurator import UserError
from decode import draw_noise
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig

ROOT = Path(__file__).resolve().parent.parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(*shape, seed=0, vocab=31):
    return torch.randint(vocab, shape, generator=generator(seed))


def everywhere(B, S):
    """at = (rows, columns) of every position."""
    return torch.arange(B).repeat_interleave(S), torch.arange(S).repeat(B)


def error_of(function, *args, **kwargs):
    """The message of the UserError that function raises: one line that begins with error:."""
    try:                                                          # no pytest.raises: its traceback would keep
        function(*args, **kwargs)                                 # what the call held open, such as a lock
    except UserError as e:
        message = str(e)
    else:
        raise AssertionError("no UserError")
    assert message.startswith("error: ") and "\n" not in message and len(message) < 5000, message
    return message


def says(message, *parts):
    missing = [part for part in parts if str(part) not in message]
    assert not missing, f"{missing} not in {message!r}"


def same_tensors(a, b):
    """Whether two nests of dicts, lists and tensors are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# --------------------------------------------------------------- a pair whose guesses change on the way
WILD = GPTConfig(block_size=24, vocab_size=29, n_layer=2, n_head=3, n_embd=24)
EOT = 4


def wild_pair(seed=1, config=WILD, **path):
    """A tiny pair with large random weights: what the trunk would write and what the path makes of it differ."""
    torch.manual_seed(0)
    trunk = GPT(config)
    path = PathConfig(**dict(x_dim=8, t_dim=16, sigma=2.0, time_scale=10.0) | path)
    pair = L2D(trunk, DiffusionPath(trunk, path, 3))
    std = {"trunk.wpe": 1.0, "trunk.wte": 0.5, "trunk.h": 0.2, "trunk.ln_f": 0.2,
           "path.w": 0.6, "path.x_in": 0.6, "path.group": 1.0}
    g = generator(seed)
    with torch.no_grad():
        for name, p in pair.named_parameters():
            p.copy_(std.get(".".join(name.split(".")[:2]), 0.25) * torch.randn(p.shape, generator=g)
                    + ("ln_" in name and name.endswith("weight")))
    return pair.requires_grad_(False)


# Ways to predict a token, as options of SamplerConfig.
SETTINGS = {
    "trunk": dict(steps=1), "trunk sampled": dict(steps=1, temperature=1.0, top_k=5),
    "two": dict(steps=2), "euler": dict(steps=8), "euler late": dict(steps=7, t_end=0.99),
    "many": dict(steps=17), "euler to 1": dict(steps=5, t_end=1.0),
    "midpoint": dict(steps=9, solver="midpoint"), "midpoint odd": dict(steps=6, solver="midpoint", t_end=0.95),
    "midpoint to 1": dict(steps=15, solver="midpoint", t_end=1.0), "heun": dict(steps=7, solver="heun"),
    "heun to 1": dict(steps=8, solver="heun", t_end=1.0), "fixed_point": dict(steps=8, solver="fixed_point"),
    "fixed_point late": dict(steps=6, solver="fixed_point", relaxation=0.3, t_hold=0.6, t_end=0.9, guess="mean"),
    "adaptive": dict(steps=12, solver="adaptive", tol=0.3),
    "adaptive short": dict(steps=4, solver="adaptive", tol=0.05),
    "adaptive to 1": dict(steps=12, solver="adaptive", tol=0.5, t_end=1.0),
    "stop": dict(steps=8, stop=0.5), "sampled stop": dict(steps=8, stop=0.1, guess="sample"),
    "stop midpoint": dict(steps=9, solver="midpoint", stop=0.3),
    "stop fixed_point": dict(steps=9, solver="fixed_point", stop=0.2, guess="mean"),
    "adaptive stop": dict(steps=12, solver="adaptive", stop=0.3),
    "temperature": dict(steps=6, temperature=0.8),
    "sampled guesses": dict(steps=6, guess="sample", temperature=1.0, top_k=7),
    "sampled adaptive": dict(steps=9, solver="adaptive", guess="sample", tol=0.5),
    "mean": dict(steps=6, solver="heun", guess="mean"), "guidance": dict(steps=6, guidance=2.5),
    "guidance stop": dict(steps=6, guidance=2.5, stop=0.9, solver="midpoint"),
    "guidance adaptive": dict(steps=6, guidance=1.5, solver="adaptive")}
SOLVERS = [*diffusion.SOLVERS, "fixed_point"]                     # those with times that are known in advance


def example(B=3, S=9, seed=0):
    """idx (B, S), at, y (N,) and group (B,) of a batch for a wild pair."""
    g = generator(seed)
    idx = torch.randint(WILD.vocab_size, (B, S), generator=g)
    is_target = torch.rand(B, S, generator=g) >= 0.4
    is_target[:, -1] = False
    at = is_target.nonzero(as_tuple=True)
    return idx, at, idx.roll(-1, 1)[at], torch.tensor([0, 3, 2])[:B]


class Naive:
    """Algorithm 1 from the paper's text for one prompt: no cache, no batch, no table, no draft.

    Every evaluation runs the trunk over the whole text. s: a DecodingConfig. group: one number. eot: ends a text.
    """
    def __init__(self, model, s, group, eot=EOT):
        self.model, self.s, self.group, self.eot = model, s, group, eot
        V = model.trunk.wte.weight @ model.path.W.weight.T
        self.V = math.sqrt(model.path.config.x_dim) * V / V.norm(dim=1, keepdim=True)

    def path_logits(self, x, t, group):
        self.nfe += 1
        at = torch.tensor([0]), torch.tensor([len(self.ids) - 1])
        c = self.model.read_context(torch.tensor([self.ids]), at)
        return self.model(x[None], torch.tensor([t]), c, torch.tensor([group]))[0]

    def pick(self, logits, u):
        p = logits.softmax(-1)
        if self.s.guess == "mean":
            return logits.argmax().item(), p @ self.V
        sampled = self.s.guess == "sample"
        guess = min(int((p.cumsum(0) <= u).sum()), len(p) - 1) if sampled else logits.argmax().item()
        return guess, self.V[guess]

    def f(self, x, t, last=False):
        """x_1_hat, and the logits of the latest evaluation in self.logits."""
        if self.stopped:
            return self.x_1_hat
        self.calls += 1
        u = self.u[self.calls] if self.s.guess == "sample" else None
        if t == 0:
            self.logits = self.model.trunk.head(self.model.trunk(torch.tensor([self.ids]))[0])[0, -1]
            self.guess, self.x_1_hat = self.pick(self.logits, u)
            return self.x_1_hat
        self.logits = self.path_logits(x, t, self.group)
        guess, x_1_hat = self.pick(self.logits, u)
        if self.s.guidance != 1 and not last:
            free = self.pick(self.path_logits(x, t, self.model.no_group), u)[1]
            x_1_hat = self.s.guidance * x_1_hat + (1 - self.s.guidance) * free
        if self.s.stop and not last and guess == self.guess:
            m = (x - (1 - t) * self.x_0) / t                      # the mean guess that x points to
            self.stopped = float(((x_1_hat - m) ** 2).mean().sqrt()) <= self.s.stop
        self.guess, self.x_1_hat = guess, x_1_hat
        return x_1_hat

    def v(self, x, t):
        return (self.f(x, t) - x) / (1 - t)

    def adapt(self, x, end):
        t, dt, v = 0.0, 0.25, self.v(x, 0.0)
        for _ in range(self.s.steps - 1):
            dt = end - t if t + 1.01 * dt > end else dt
            x_new = x + dt * v
            if t + dt == 1:                                       # no slope there: the step stands
                self.f(x_new, 1.0)
                break
            v_new = self.v(x_new, t + dt)
            error = float(dt / 2 * ((v_new - v) ** 2).mean().sqrt())
            factor = min(2.0, max(0.3, 0.9 * math.sqrt(self.s.tol / max(error, 1e-9))))
            if error <= self.s.tol:
                x, v, t = x_new, v_new, t + dt
            dt *= factor
            if t >= end - 1e-6:
                break

    def solve(self, x_0):
        s, T, x, self.x_0 = self.s, self.s.steps, x_0, x_0
        end = s.t_end or (0.9 if s.solver == "fixed_point" else min((T - 1) / T, 15 / 16))
        if s.solver == "adaptive":
            return self.adapt(x, end)
        per = 1 if s.solver in ("euler", "fixed_point") else 2
        n = (T - 1) // per + (T - 1) % per
        grid = [end * i / n for i in range(n)] + [end]
        if s.solver == "fixed_point" and s.t_hold:                # 0, and every call but the last at t_hold
            grid = [0.0] + [s.t_hold] * (n - 1) + [end]
        m = None
        for i in range(n):
            a, b = grid[i], grid[i + 1]
            h = b - a
            if s.solver == "fixed_point":                             # on the line from x_0 to a mean of the guesses
                m = self.f(x, a) if m is None else (1 - s.relaxation) * m + s.relaxation * self.f(x, a)
                x = (1 - b) * x_0 + b * m
            elif s.solver == "euler" or (i == 0 and (T - 1) % 2):
                x = x + h * self.v(x, a)
            elif s.solver == "midpoint":
                x = x + h * self.v(x + h / 2 * self.v(x, a), a + h / 2)
            else:
                v = self.v(x, a)
                x = x + h * v if b == 1 else x + h / 2 * (v + self.v(x + h * v, b))
        self.f(x, end, last=True)

    @torch.no_grad()
    def predict(self, ids, x_0, u):
        """Logits of the token after ids, from noise x_0 (D,) and uniform numbers u (T + 1,), or (1,)."""
        self.ids, self.u, self.calls, self.nfe, self.stopped = ids, u, 0, 0, False
        self.f(None, 0.0) if self.s.steps == 1 else self.solve(x_0)
        return self.logits

    def choose(self, logits, u):
        if not self.s.temperature:
            return logits.argmax().item()
        p = (logits / self.s.temperature).softmax(-1)
        if self.s.top_k:
            p = torch.where(p >= p.topk(min(self.s.top_k, len(p))).values[-1], p, 0)
        return min(int(((p / p.sum()).cumsum(0) <= u).sum()), len(p) - 1)

    def generate(self, prompt, id):
        """The new tokens, whether they ended, and path calls of each prediction."""
        x_0, u = (z[0] for z in draw_noise(self.model, [id], self.s))
        ids, new, total, self.differ = list(prompt), [], [], []
        for n in range(self.s.max_new_tokens):
            logits = self.predict(ids, x_0[n], u[n])
            y = self.choose(logits, u[n, 0])
            trunk = self.model.trunk.head(self.model.trunk(torch.tensor([ids]))[0])[0, -1]
            self.differ += [n] if y != self.choose(trunk, u[n, 0]) else []    # from plain decoding's choice
            total.append(self.nfe)
            if y == self.eot:
                return new, True, total
            new.append(y)
            ids.append(y)
            if len(ids) > self.model.trunk.config.block_size:
                break
        return new, False, total


# ------------------------------------------------------------------------------------------ short runs
TINY = dict(block_size=128, x_dim=16, t_dim=32, sigma=4, lora_rank=4, batch_size=16, max_iters=40, warmup_iters=2,
            learning_rate=1e-2, min_lr=1e-3, eval_interval=1000, eval_examples=32, log_interval=1)
FROM_SCRATCH = dict(trunk="scratch", trunk_mode="full", n_layer=2, n_head=2, n_embd=32)


def argv(**options):
    """The words of a short run of train.py. TINY | FROM_SCRATCH has no pretrained trunk."""
    return [f"--{key}={value}" for key, value in (TINY | options).items()]


def metrics(out_dir):
    """The records of metrics.jsonl, as strict JSON: NaN and Infinity are not."""
    def refuse(word):
        raise AssertionError(f"{word} in metrics.jsonl is not JSON")
    lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def timeless(out_dir):
    """The same without what a clock has to do with."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in metrics(out_dir)]


def losses(out_dir):
    return [r["loss"] for r in metrics(out_dir) if "loss" in r]


def evaluations(out_dir):
    return [r for r in metrics(out_dir) if "val_loss" in r]


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


# ------------------------------------------------------------------------------------------- processes
ENV = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def child(words, *args, timeout=120, **env):
    """A Python of its own, one thread: as fast, and as exact, as this one."""
    return subprocess.run([sys.executable, *map(str, words), *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout, env=os.environ | ENV | env)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _script(module, words, env, log, before):
    """In the process: what `python module.py words` does, with before() run first."""
    os.environ.update(env)
    os.chdir(ROOT)
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    torch.set_num_threads(1)
    import configurator
    script = __import__(module)
    sys.argv = [f"{module}.py", *words]
    if before:
        before()
    configurator.run(script.main)


class Process:
    """`python module.py words` in a process that begins at once: it is forked from one that has imported torch.

    before: a function of a test file, called in it first, that puts a fault in.
    """
    def __init__(self, log, module, words, before=None, **env):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "train", "sample", "helpers", "pytest"])
        self.log, arguments = log, (module, words, env, str(log), before)
        for name in ("out", "err"):                               # of a process before
            Path(f"{log}.{name}").unlink(missing_ok=True)
        self.process = context.Process(target=_script, args=arguments, daemon=True)
        self.process.start()

    @property
    def pid(self):
        return self.process.pid

    def out(self):
        return Path(f"{self.log}.out").read_text(errors="replace") if Path(f"{self.log}.out").exists() else ""

    def err(self):
        return Path(f"{self.log}.err").read_text(errors="replace") if Path(f"{self.log}.err").exists() else ""

    def wait(self, timeout=60):
        """The exit status; minus the signal's number, if that ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"it hangs: {self.out()[-500:]} {self.err()[-500:]}")
        return self.process.exitcode

    def until(self, happened, timeout=60):
        """Wait until happened(self) while it runs."""
        end = time.monotonic() + timeout
        while not happened(self):
            assert self.process.is_alive() and time.monotonic() < end, (self.out()[-500:], self.err()[-900:])
            time.sleep(0.005)
        return self

    def signal(self, number):
        os.kill(self.pid, number)
        return self


def script(tmp_path, module, *words, before=None, timeout=60, **env):
    """Run one to its end: (status, stdout, stderr)."""
    process = Process(tmp_path / f"script{time.monotonic_ns()}", module, list(words), before, **env)
    status = process.wait(timeout)
    return status, process.out(), process.err()


def start_ranks(tmp_path, n, words, before=None):
    """n ranks of train.py under gloo, as torchrun starts them."""
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [Process(tmp_path / f"rank{r}", "train", words, before, RANK=str(r), LOCAL_RANK=str(r), **shared)
            for r in range(n)]


def slow():
    """In the process of train.py: iterations that leave time for a signal."""
    import train
    report = train.report
    def slowly(*args):
        report(*args)
        time.sleep(0.03)
    train.report = slowly
