"""
What a new device has to show first: `python bench.py --gpu_report`, before its timings.

Each check prints a line: logits against float64 on the CPU; T = 1 against the trunk; drafts against none; the
compiled loss against the eager one, its graphs and its compile time; two ranks against one process; and which
attention kernels ran. bench.py then times decoding, at T = 1 and 16, and training steps with their memory.
"""
import os
import tempfile
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train
from decode import Decoding
from measure import SIZES, attention_of
from measure.decoding import write
from measure.memory import Trainee, random_pair

TINY = SIZES["tiny"]


def stirred_pair(size, seed=0):
    """A pair whose path says something else than its trunk."""
    model = random_pair(size, "frozen", "full", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.path.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return model


def random_targets(size, n_rows, length, device="cpu", seed=0):
    """A batch as from batch_of, a target at every position, and t and x_0 for it."""
    generator = torch.Generator().manual_seed(seed)
    idx, y = torch.randint(size.vocab_size, (2, n_rows, length), generator=generator)
    at = torch.ones(n_rows, length).nonzero(as_tuple=True)
    label, config = torch.zeros(n_rows, dtype=torch.long), train.Config()
    t, x_0 = train.diffusion.draw(y.numel(), config, generator)
    move = lambda z: z.to(device)  # noqa: E731
    return move(idx), tuple(map(move, at)), move(y.flatten()), move(label), move(t), move(x_0)


def logits_of(model, batch, dtype):
    """Logits (N, V_size) of the pair at the batch's t, at t = 0, and of the trunk; weights in dtype."""
    idx, at, _, label, t, x_0 = batch
    model = model.to(idx.device, dtype)
    with torch.no_grad():
        c = model.read(idx, at)
        zero = model(x_0, torch.zeros_like(t), c, label[at[0]])
        return [z.double().cpu() for z in (model(x_0, t, c, label[at[0]]), zero, model.trunk.head(c.h))]


def check_logits(config, device, dtype):
    """Against float64 on the CPU, by the spread of the logits; and T = 1 bit for bit."""
    size = SIZES[config.model]
    want = logits_of(stirred_pair(size), random_targets(size, 2, 32), torch.float64)[0]
    for kind in sorted({torch.float32, dtype}, key=str):
        got, zero, trunk = logits_of(stirred_pair(size), random_targets(size, 2, 32, device), kind)
        error, name = ((got - want).abs().max() / want.std()).item(), str(kind)[6:]
        limit = 0.3 if kind != torch.float32 else 0.01 if device.type == "cuda" else 1e-4      # cuda: TF32
        yield f"logits, {name}", error < limit, f"off by {error:.1e} of their spread, allowed {limit}"
        off = (zero - trunk).abs().max().item()
        yield f"T = 1, {name}", off == 0, f"the trunk's logits, off by {off}"


def check_drafts(config, device, dtype):
    """The same tokens with drafts and without, in float32."""
    model = stirred_pair(SIZES[config.model]).requires_grad_(False).to(device)
    prompts = torch.randint(TINY.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    configs = [Decoding(steps=4, max_new_tokens=24, draft=draft) for draft in (0, 8)]
    plain, drafts = (write(model, prompts, 8, -1, c) for c in configs)
    same = sum(a.tokens == b.tokens for a, b in zip(plain, drafts))
    yield "drafts", same >= (8 if device.type == "cpu" else 7), f"{same} of 8 texts as without drafts"


def check_compiled(config, device, dtype):
    """The loss, at three lengths: values, graph breaks, graphs, seconds to compile."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    model, batches = stirred_pair(SIZES[config.model]).to(device), []
    eager, compiled, start = train.Loss(model), train.Loss(model), time.perf_counter()
    compiled.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    for length in (24, 40, 31):
        batches.append(random_targets(SIZES[config.model], 2, length, device))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            compiled(*batches[-1]).sum().backward()
    seconds, error = time.perf_counter() - start, 0.0
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in batches:
            error = max(error, (compiled(*batch) - eager(*batch)).abs().max().item())
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    yield ("compiled", error < (1e-3 if dtype == torch.float32 else 0.3) and not breaks,
           f"losses off by {error:.1e}; {graphs} graphs, {breaks} breaks, {seconds:.0f} s for three lengths")


def gradient(rank, world, kind, path):
    """The gradient of the mean loss over four rows, this rank's share of them; rank 0 writes it to path."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    model = stirred_pair(TINY).to(device)
    idx, at, y, label, t, x_0 = random_targets(TINY, 4, 24, device)
    mine, loss_of = at[0] % world == rank, train.Loss(model)
    if world > 1:
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, f"file://{path}.store", rank=rank, world_size=world)
        loss_of = DistributedDataParallel(loss_of, gradient_as_bucket_view=True)
    at = at[0][mine] // world, at[1][mine]
    losses = loss_of(idx[rank::world], at, y[mine], label[rank::world], t[mine], x_0[mine])
    (losses.sum() / len(y) * world).backward()                           # as train.py: DDP takes the mean
    if rank == 0:
        torch.save(torch.cat([p.grad.flatten().cpu() for p in train.trained(model)]), path)
    if world > 1:
        dist.destroy_process_group()


def check_ranks(config, device, dtype):
    """Two processes against one: on two GPUs by NCCL, else on the CPU by gloo."""
    kind, found = "cuda" if torch.cuda.device_count() > 1 else "cpu", []
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            path = os.path.join(folder, f"{world}.pt")
            torch.multiprocessing.spawn(gradient, (world, kind, path), nprocs=world)
            found.append(torch.load(path))
    error = ((found[0] - found[1]).norm() / found[0].norm()).item()
    yield "ranks", error < 1e-4, f"two ranks ({kind}) against one process: gradients off by {error:.1e}"


def check_attention(config, device, dtype):
    """Which kernels ran, in decoding and in training."""
    size = SIZES[config.model]
    model = random_pair(size, "frozen", "full").requires_grad_(False).to(device, dtype)
    for name, steps, n in (("reading", 1, 1), ("plain", 1, 3), ("T = 4", 4, 3)):
        decoding = Decoding(steps=steps, max_new_tokens=n)
        kernels = attention_of(lambda: write(model, [[1] * 8], 1, -1, decoding))
        yield f"attention, {name}", True, ", ".join(f"{times} x {k}" for k, times in kernels.items())
    train.use_kernels_for_training(device, dtype)
    batch = random_targets(size, 2, 24, device)[:4]
    trainee = Trainee(random_pair(size, "frozen", "full").to(device), batch, dtype)
    kernels = attention_of(trainee)
    slow = device.type == "cuda" and any("_math" in k for k in kernels)
    yield "attention, training", not slow, ", ".join(f"{n} x {k}" for k, n in kernels.items())


def check(config, device, dtype):
    """{name: (passed, what was found)}, printed as it comes."""
    results = {}
    for run in (check_logits, check_drafts, check_compiled, check_ranks, check_attention):
        for name, passed, found in run(config, device, dtype):
            results[name] = passed, found
            print(f"{'ok    ' if passed else 'FAILED'} {name}: {found}", flush=True)
    return results
