"""
What a GPU has to show, in two minutes on a slow host: `python -m bench --gpu_report`.

First the checks. Each prints a line when it ends:
    logits      against float64 on the CPU, and T = 1 against the trunk
    compiled    the loss compiled by block against the eager one: graphs, breaks, seconds. A small model
    drafts      the same tokens with drafts and evaluations ahead, and without
    graphs      the same tokens with CUDA graphs and without
    attention   which kernels ran
Then the timings, the most important first:
    training    an optimizer step, eager and compiled by block; seconds to the first one; memory
    decoding    one text: T = 1, T = 16, and T = 16 with drafts; with and without CUDA graphs
    batch       the same for 64 texts, with their memory
    ranks       the gradients of two ranks against those of one process (a check, but a slow one)
    controls    a training step of L2D and of its controls, with the memory that bench/memory.py counts

Each has a time limit. They run in a process of their own: where one hangs, that process is ended, and a new
one goes on with the rest. The results are written after each. `--only=NAME,NAME` runs these alone.
"""
import gc
import multiprocessing
import os
import re
import signal
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import diffusion
import train
from bench.baseline import make_baseline
from bench.compact_json import write_json
from bench.decoding import write
from bench.models import SIZES, Trainee, random_pair
from bench.timing import print_table, spread, time_by_turns
from bench.training import measure_training, random_batch
from configurator import UserError
from decode import DecodingConfig
from diffusion import Tables
from fast.fixed_shapes import STORES
from plumbing.batches import count_cache_bytes
from plumbing.dataset import load_batch
from plumbing.device import pick_device, pick_dtype
from plumbing.kernels import compile_blocks, use_kernels_for_training

TINY = SIZES["tiny"]


# -------------------------------------------------------------------------------------- what is compared
def stirred_pair(size, seed=0):
    """A pair whose path predicts something else than its trunk."""
    model = random_pair(size, "frozen", "full", seed, path_init="paper")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.path.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return model


def random_targets(size, n_rows, length, device="cpu", seed=0):
    """A random batch, (idx, at, y, group, t, x_0), with a target at every position."""
    generator = torch.Generator().manual_seed(seed)
    idx, y = torch.randint(size.vocab_size, (2, n_rows, length), generator=generator)
    rows, columns = torch.ones(n_rows, length).nonzero(as_tuple=True)
    group = torch.zeros(n_rows, dtype=torch.long)
    t, x_0 = diffusion.draw(y.numel(), train.Config(), generator)
    tensors = [idx, rows, columns, y.flatten(), group, t, x_0]
    idx, rows, columns, y, group, t, x_0 = (z.to(device) for z in tensors)
    return idx, (rows, columns), y, group, t, x_0


@torch.no_grad()
def compute_logits(model, batch, dtype):
    """Logits (N, V_size) of the pair at the batch's t and at t = 0, and of the trunk; weights in dtype."""
    idx, at, _, group, t, x_0 = batch
    model = model.to(idx.device, dtype)
    c = model.read_context(idx, at)
    group = group[at[0]]
    logits = model(x_0, t, c, group), model(x_0, torch.zeros_like(t), c, group), model.trunk.head(c.h)
    return [z.double().cpu() for z in logits]


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------- checks
# Each yields lines of its own: (name, whether it passed, what was found).
def check_logits(config, device, dtype):
    """Against float64 on the CPU, as a share of the spread of the logits; and T = 1 bit for bit."""
    size = SIZES[config.model]
    expected, _, _ = compute_logits(stirred_pair(size), random_targets(size, 2, 32), torch.float64)
    for kind in sorted({torch.float32, dtype}, key=str):
        logits, at_0, trunk = compute_logits(stirred_pair(size), random_targets(size, 2, 32, device), kind)
        error = ((logits - expected).abs().max() / expected.std()).item()
        limit = 0.3
        if kind == torch.float32:
            limit = 0.01 if device.type == "cuda" else 1e-4       # CUDA multiplies in TF32
        found = f"off by {error:.1e} of their spread, allowed {limit}"
        yield f"logits, {name_of(kind)}", error < limit, found
        off = (at_0 - trunk).abs().max().item()
        yield f"T = 1, {name_of(kind)}", off == 0, f"the trunk's logits, off by {off}"


def write_some(config, device, **options):
    """The tokens of eight short texts by a pair in float32, whose path changes what the trunk says."""
    model = stirred_pair(SIZES[config.model]).requires_grad_(False).to(device)
    prompts = torch.randint(TINY.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    texts = write(model, prompts, 8, -1, DecodingConfig(steps=4, max_new_tokens=24, **options))
    return [text.tokens for text in texts]


def compare_texts(name, plain, found, device, than):
    same = sum(a == b for a, b in zip(plain, found))
    least = 8 if device.type == "cpu" else 7                      # a GPU rounds by the shape of a product
    return name, same >= least, f"{same} of 8 texts as without {than}"


def check_drafts(config, device, dtype):
    """The same tokens with speculation (drafts, evaluations ahead) and without, in float32."""
    plain = write_some(config, device, draft=0, ahead=0, graphs="off")
    found = write_some(config, device, draft=8, graphs="off")
    yield compare_texts("drafts", plain, found, device, "speculation")


def check_graphs(config, device, dtype):
    """The same tokens in fixed shapes (on a GPU as CUDA graphs) and without, in float32."""
    for draft in (0, 8):
        plain = write_some(config, device, draft=draft, graphs="off")
        found = write_some(config, device, draft=draft, graphs="on")
        yield compare_texts(f"graphs, drafts up to {draft}", plain, found, device, "CUDA graphs")


def check_compiled(config, device, dtype):
    """The loss of a small model at four lengths: values, graph breaks, graphs, seconds to compile."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    eager = train.Loss(stirred_pair(TINY).to(device))
    compiled = train.Loss(stirred_pair(TINY).to(device))
    compile_blocks(compiled.model, backend="inductor" if device.type == "cuda" else "aot_eager")
    batches = [random_targets(TINY, 2, length, device) for length in (24, 40, 31, 17)]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    error = 0.0
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        with autocast:
            losses = compiled(*batch)
        losses.sum().backward()
        seconds.append(time.perf_counter() - start)
        with torch.no_grad(), autocast:
            error = max(error, (losses - eager(*batch)).abs().max().item())
    breaks = sum(counters["graph_break"].values())
    graphs = counters["stats"]["unique_graphs"]
    limit = 1e-3 if dtype == torch.float32 else 0.3
    found = (f"losses off by {error:.1e}; {graphs} graphs, {breaks} breaks, {seconds[0]:.0f} s for the first "
             f"length, {sum(seconds[1:]):.0f} s for three more")
    yield "compiled", error < limit and not breaks and graphs <= 4, found


def compute_gradient(rank, world, device):
    """The gradient of the mean loss over four rows, as a vector. This rank computes its share of the rows."""
    model = stirred_pair(TINY).to(device)
    idx, (rows, columns), y, group, t, x_0 = random_targets(TINY, 4, 24, device)
    mine = rows % world == rank
    at = rows[mine] // world, columns[mine]
    loss = train.Loss(model)
    if dist.is_initialized():
        loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
    losses = loss(idx[rank::world], at, y[mine], group[rank::world], t[mine], x_0[mine])
    (losses.sum() / len(y) * world).backward()                    # as in train.py: DDP takes the mean
    return torch.cat([p.grad.flatten().cpu() for p in train.trained_parameters(model)])


def save_gradient(rank, world, kind, path):
    """In a process of its own: compute the gradient as one rank of `world`. Rank 0 writes it to path."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", f"file://{path}.store", rank=rank,
                            world_size=world, device_id=device if kind == "cuda" else None)
    gradient = compute_gradient(rank, world, device)              # when it returns, DDP is gone
    if rank == 0:
        torch.save(gradient, path)
    dist.barrier()                                                # leaving early may abort the other rank
    dist.destroy_process_group()


def check_ranks(config, device, dtype):
    """Two processes against this one: on two GPUs by NCCL, else on the CPU by gloo."""
    kind = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    one = compute_gradient(0, 1, torch.device(kind))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "gradient.pt")
        torch.multiprocessing.spawn(save_gradient, (2, kind, path), nprocs=2)
        two = torch.load(path)
    error = ((one - two).norm() / one.norm()).item()
    yield "ranks", error < 1e-4, f"two ranks ({kind}) against one process: gradients off by {error:.1e}"


def count_kernels(f):
    """Which attention ran in f(), and how often: {name of torch's operator or of a GPU's kernel: times}."""
    with torch.profiler.profile() as profile:
        f()
    names = re.compile(r"aten::_scaled_dot_product\w+|(?!aten|autograd).*(flash|fmha|cutlass[FB]|sdpa).*")
    return Counter(event.name[:80] for event in profile.events() if names.fullmatch(event.name))


def check_attention(config, device, dtype):
    """Which kernels ran, in decoding and in training."""
    def describe(kernels):
        return ", ".join(f"{times} x {kernel}" for kernel, times in kernels.items())
    size = SIZES[config.model]
    model = random_pair(size, "frozen", "full").requires_grad_(False).to(device, dtype)
    for name, steps, n in (("reading", 1, 1), ("plain", 1, 3), ("T = 4", 4, 3)):
        decoding = DecodingConfig(steps=steps, max_new_tokens=n)
        kernels = count_kernels(lambda: write(model, [[1] * 8], 1, -1, decoding))
        yield f"attention, {name}", True, describe(kernels)
    use_kernels_for_training(device, dtype)
    batch = random_targets(size, 2, 24, device)[:4]
    trainee = Trainee(random_pair(size, "frozen", "full").to(device), batch, dtype)
    kernels = count_kernels(trainee.step)
    slow = device.type == "cuda" and any("_math" in kernel for kernel in kernels)
    yield "attention, training", not slow, describe(kernels)


# ------------------------------------------------------------------------------------------------ timings
# Each prints a table, and yields (name, None, what was measured).
def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_training(config, device, dtype):
    """An optimizer step of L2D with a full path, on a batch of GSM8K's lengths: eager, and compiled."""
    use_kernels_for_training(device, dtype)
    data, ids = random_batch(config)
    batch = load_batch(data, ids, device)
    rows = {}
    steps = {}
    trainees = {}
    names = ("eager", "compiled") if config.compile or device.type == "cuda" else ("eager",)
    for name in names:
        trainees[name] = Trainee(random_pair(SIZES[config.model], "frozen", "full").to(device), batch, dtype)
        if name == "compiled":
            compile_blocks(trainees[name].model)
        start = time.perf_counter()
        trainees[name].step()
        synchronize(device)
        rows[name] = {"first step, s": time.perf_counter() - start}
        steps[name] = trainees[name].step
    seconds, peaks = time_by_turns(steps, 2 * config.repeats, device, "training")
    for name, row in rows.items():
        row["ms"] = spread(1e3 * s for s in seconds[name])
        row["targets/s"] = spread(len(batch[2]) / s for s in seconds[name])
        row["GB of a step"] = peaks[name] / 1e9 if peaks else None
    print(f"\ntraining {config.model}, L2D with a full path, {len(ids)} rows of {batch[0].size(1)} tokens, "
          f"{len(batch[2])} targets, {name_of(dtype)}")
    print_table(rows)
    yield "training", None, rows


def time_decoding(config, device, dtype, batch=1):
    """`batch` texts side by side, with random weights whose guess stays: time per token, and memory."""
    size = SIZES[config.model]
    model = random_pair(size, "frozen", "full", path_init="paper").requires_grad_(False).to(device, dtype)
    tables = Tables(model)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(size.vocab_size, (batch, config.prompt), generator=generator).tolist()
    options = {"max_new_tokens": config.new_tokens}
    ways = {"T = 1": (DecodingConfig(steps=1, draft=0, ahead=0, **options), 1.0),
            "T = 16": (DecodingConfig(steps=16, draft=0, **options), 1.0),
            "T = 16, drafts, 95% kept": (DecodingConfig(steps=16, draft=16, **options), 0.95)}
    runs = {}
    rows = {}
    for way, (decoding, acceptance) in ways.items():
        for graphs in ("off", "on"):
            name = f"{way}, graphs {graphs}"
            with_graphs = replace(decoding, graphs=graphs)
            runs[name] = partial(write, model, prompts, batch, -1, with_graphs, acceptance, tables=tables)
            rows[name] = first_run(runs[name], device)
    if config.baseline:
        baseline = make_baseline(model.trunk, -1, config.new_tokens)
        runs["transformers, T = 1"] = partial(baseline, prompts, batch)
        rows["transformers, T = 1"] = first_run(runs["transformers, T = 1"], device)
    seconds, _ = time_by_turns(runs, config.repeats, device, "decoding")
    needed = count_needed(model, batch, config.prompt + config.new_tokens)
    for name, row in rows.items():
        eager = seconds[name.replace("graphs on", "graphs off")]
        row["ms a token"] = spread(1e3 * s / row["tokens"] * batch for s in seconds[name])
        row["tokens/s"] = spread(row["tokens"] / s for s in seconds[name])
        row["x as fast"] = spread(a / b for a, b in zip(eager, seconds[name]))
        taken = measure_memory(runs[name], model, device)
        row["GB"] = taken and taken / 1e9
        row["x needed"] = taken and taken / needed
    print(f"\ndecoding {config.model}, batch {batch}, {name_of(dtype)}")
    print_table(rows)
    yield f"decoding {batch}", None, rows


def count_weights(model):
    """Bytes of the parameters."""
    return sum(p.nbytes for p in model.parameters())


def count_needed(model, batch, length):
    """Bytes that decoding needs at least: weights, keys and values of all texts, and their logits."""
    weights = count_weights(model)
    logits = 4 * batch * len(model.trunk.wte.weight)
    return weights + batch * count_cache_bytes(model, length) + logits


def measure_memory(f, model, device):
    """Bytes that the allocator takes from a GPU for the model and for a first run of f. None on a CPU."""
    if device.type != "cuda":
        return None
    STORES.clear()                                                # what graphs of earlier runs hold
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()                        # with other models in this process
    torch.cuda.reset_peak_memory_stats()
    f()
    return torch.cuda.max_memory_reserved() - before + count_weights(model)


def first_run(f, device):
    """Of a first run, which warms up, and records the graphs: its seconds, and what it wrote."""
    start = time.perf_counter()
    texts = f()
    synchronize(device)
    n = sum(text.predicted for text in texts)
    rounds = sum(text.rounds for text in texts)
    seconds = time.perf_counter() - start
    return {"first run, s": seconds, "tokens": n, "a round": n / rounds if rounds else None}


def time_batch(config, device, dtype):
    yield from time_decoding(config, device, dtype, batch=64 if device.type == "cuda" else 4)


def time_controls(config, device, dtype):
    yield "train", None, measure_training(config, device, dtype)


# ---------------------------------------------------------------------------------------------- the report
ITEMS = {                                                         # name: (function, seconds that it may take)
    "logits": (check_logits, 40),
    "compiled": (check_compiled, 45),
    "drafts": (check_drafts, 30),
    "graphs": (check_graphs, 30),
    "attention": (check_attention, 30),
    "training": (time_training, 75),
    "decoding": (time_decoding, 60),
    "batch": (time_batch, 60),
    "ranks": (check_ranks, 45),
    "controls": (time_controls, 90),
}


def work(connection, config):
    """In a process of its own: run the functions that come, and send back what they yield, then None.

    Where one fails, its traceback is sent, a text.
    """
    os.setpgrp()                                                  # to be ended together with what it starts
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    while True:
        try:
            function = connection.recv()
        except EOFError:                                          # nobody asks any more
            return
        try:
            for found in function(config, device, dtype):
                connection.send(found)
            connection.send(None)
        except (Exception, UserError):
            connection.send(traceback.format_exc())
        if device.type == "cuda":
            torch.cuda.empty_cache()


class Worker:
    """A process that runs the items of the report."""
    def __init__(self, config):
        context = multiprocessing.get_context("forkserver")       # a new one starts without importing torch
        context.set_forkserver_preload(["bench.gpu_report"])
        self.connection, theirs = context.Pipe()
        options = SimpleNamespace(**vars(config))                 # its class belongs to the script that runs
        self.process = context.Process(target=work, args=(theirs, options))
        self.process.start()
        theirs.close()

    def ask(self, function, seconds):
        """Yield what the function yields. TimeoutError after `seconds`, RuntimeError where it fails."""
        end = time.monotonic() + seconds
        self.connection.send(function)
        while True:
            if not self.connection.poll(max(0.0, end - time.monotonic())):
                raise TimeoutError
            try:
                found = self.connection.recv()
            except (EOFError, ConnectionError):
                self.process.join()
                raise RuntimeError(f"its process ended with status {self.process.exitcode}") from None
            if found is None:
                return
            if isinstance(found, str):
                raise RuntimeError(found)
            yield found

    def end(self, patience=0.0):
        """End it, with all that it has started: at once, or by itself within `patience` seconds."""
        self.connection.close()
        self.process.join(patience)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:                                # it has not come to setpgrp, or has ended
            self.process.kill()
        self.process.join()


def run_report(config, result, items):
    """Run the items and print their lines. Adds to result, and writes it to config.out after each item.

    result["checks"] becomes {name: (passed, what was found)}, result["not_reached"] a list of names.
    """
    left = list(items)
    result |= {"checks": {}, "seconds_of": {}, "not_reached": left}
    write_json(config.out, result, levels=4)
    worker = None
    end = time.monotonic() + config.time_limit
    try:
        for name, (function, seconds) in items.items():
            started = time.monotonic()
            if started >= end:
                break
            worker = worker or Worker(config)
            try:
                for found in worker.ask(function, min(seconds, end - started)):
                    note(result, *found)
            except TimeoutError:
                worker.end()
                worker = None
                if time.monotonic() >= end:                       # the time of all of them is over
                    break
                note(result, name, False, f"no end within {seconds} s")
            except RuntimeError as e:
                note(result, name, False, str(e).strip())
                worker.end()
                worker = None
            left.remove(name)
            result["seconds_of"][name] = round(time.monotonic() - started, 1)
            write_json(config.out, result, levels=4)
        if worker:
            worker.end(patience=5.0)
            worker = None
    finally:
        if worker:
            worker.end()
    write_json(config.out, result, levels=4)
    if left:
        print(f"\nnot reached within {config.time_limit} s: {', '.join(left)}; --only=NAME runs one")


def note(result, name, passed, found):
    """Keep a line of a check, and print it; or keep what was measured, where passed is None."""
    if passed is None:
        result[name] = found
        return
    result["checks"][name] = passed, found
    print(f"{'ok    ' if passed else 'FAILED'} {name}: {found}", flush=True)
