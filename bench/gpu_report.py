"""
What a new device has to show first, before its timings: `python -m bench --gpu_report`.

Each check prints one line:
    logits      against float64 on the CPU
    T = 1       against the trunk
    drafts      the same tokens with drafts and evaluations ahead, and without
    compiled    the compiled loss against the eager one; its graphs and its compile time
    ranks       the gradients of two ranks against those of one process
    attention   which kernels ran
Then decoding is timed at T = 1 and 16, and training steps with their memory.
"""
import os
import re
import tempfile
import time
from collections import Counter

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import diffusion
import train
from bench.decoding import write
from bench.models import SIZES, Trainee, random_pair
from decode import DecodingConfig
from plumbing.device import use_kernels_for_training

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


def check_drafts(config, device, dtype):
    """The same tokens with speculation (drafts, evaluations ahead) and without, in float32."""
    model = stirred_pair(SIZES[config.model]).requires_grad_(False).to(device)
    prompts = torch.randint(TINY.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    plain = write(model, prompts, 8, -1, DecodingConfig(steps=4, max_new_tokens=24, draft=0, ahead=0))
    found = write(model, prompts, 8, -1, DecodingConfig(steps=4, max_new_tokens=24, draft=8))
    same = sum(a.tokens == b.tokens for a, b in zip(plain, found))
    yield "drafts", same >= (8 if device.type == "cpu" else 7), f"{same} of 8 texts as without speculation"


def check_compiled(config, device, dtype):
    """The loss at three lengths: values, graph breaks, graphs, seconds to compile."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    size = SIZES[config.model]
    model = stirred_pair(size).to(device)
    eager = train.Loss(model)
    compiled = train.Loss(model)
    compiled.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    batches = [random_targets(size, 2, length, device) for length in (24, 40, 31)]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    start = time.perf_counter()
    for batch in batches:
        with autocast:
            losses = compiled(*batch)
        losses.sum().backward()
    seconds = time.perf_counter() - start
    with torch.no_grad(), autocast:
        error = max((compiled(*batch) - eager(*batch)).abs().max().item() for batch in batches)
    breaks = sum(counters["graph_break"].values())
    graphs = counters["stats"]["unique_graphs"]
    limit = 1e-3 if dtype == torch.float32 else 0.3
    yield ("compiled", error < limit and not breaks,
           f"losses off by {error:.1e}; {graphs} graphs, {breaks} breaks, {seconds:.0f} s for three lengths")


def compute_gradient(rank, world, device):
    """The gradient of the mean loss over four rows, as a vector. This rank computes its share of the rows."""
    model = stirred_pair(TINY).to(device)
    idx, (rows, columns), y, group, t, x_0 = random_targets(TINY, 4, 24, device)
    mine = rows % world == rank
    at = rows[mine] // world, columns[mine]
    loss = train.Loss(model)
    if world > 1:
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


def run_checks(config, device, dtype):
    """Run all checks and print their lines. Returns {name: (passed, what was found)}."""
    results = {}
    for check in (check_logits, check_drafts, check_compiled, check_ranks, check_attention):
        for name, passed, found in check(config, device, dtype):
            results[name] = passed, found
            print(f"{'ok    ' if passed else 'FAILED'} {name}: {found}", flush=True)
    return results
