"""
How much memory does a training step take? Counted with fake tensors: real shapes, no data, on any machine.

    python -m measure.memory        # writes docs/MEMORY.md: GPT-2 of all sizes, L2D and full finetuning

Counted are the bytes of all tensors alive at the worst moment of an optimizer step: weights, gradients, the
optimizer's state, and what forward and backward hold. On top come the GPU's context, what kernels take for
themselves, and the allocator's fragments. torch.compile fuses the loss, and needs less.
"""
import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import train
from configurator import configure, run
from files import write_file
from gpt2_weights import GPT2_SIZES
from model import GPT, L2D, DiffusionPath, PathConfig

MODES = {"full finetuning": ("full", "none"), "trunk LoRA": ("lora", "none"),    # trunk_mode, path_mode
         "L2D, full path": ("frozen", "full"), "L2D, LoRA path": ("frozen", "lora")}


def random_pair(size, trunk_mode="frozen", path_mode="none", seed=0):
    """The pair with random weights; requires_grad as in train.py. The path is fresh, and w_init = 0: at every
    t the pair predicts what the trunk does."""
    torch.manual_seed(seed)
    trunk, path = GPT(size), PathConfig(path_mode=path_mode, w_init=0.0)
    model = L2D(trunk, DiffusionPath(trunk, path, 1) if path_mode != "none" else None)
    trunk.requires_grad_(trunk_mode == "full")
    if trunk_mode == "lora":
        trunk.add_lora(path.lora_rank, path.lora_alpha)
    return model


class Trainee:
    """A model, its optimizer and train.py's step, always on the same batch, as from batch_of."""
    def __init__(self, model, batch, dtype):
        self.model, self.batch, self.config, self.loss_of = model, batch, train.Config(), train.Loss(model)
        self.optimizer = train.make_optimizer(model, self.config)
        device = model.trunk.wte.weight.device.type
        self.autocast = torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()

    def losses(self):
        idx, at, y, label = self.batch
        generator = train.generator_for(idx.device, 0)
        label, t, x_0, times = train.draw_noise(self.config, self.model, label, len(y), generator)
        with self.autocast:
            return self.loss_of(idx, at, y, label, t, x_0, times)

    def __call__(self):
        self.losses().mean().backward()
        nn.utils.clip_grad_norm_(train.trained(self.model), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self):
        """Bytes that stay between steps: weights and the optimizer's state."""
        state = [z for s in self.optimizer.state.values() for z in s.values()]
        return sum(z.nbytes for z in [*self.model.parameters(), *state])


class Meter(TorchDispatchMode):
    """While it is on, the bytes of the tensors made since that are alive: now, and their peak."""
    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, n = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.remove(key, n))
            self.now += n
            self.peak = max(self.peak, self.now)

    def remove(self, key, n):
        del self.alive[key]
        self.now -= n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, out)
        return out


def step_bytes(size, mode, shapes, dtype=torch.bfloat16):
    """Bytes that stay between training steps, and the peak of a step of each (rows, length, targets); or,
    (rows, length, targets, "validation"), of a batch without gradients."""
    with torch.device("meta"):
        model = random_pair(size, *MODES[mode])
    with FakeTensorMode(), Meter() as meter:
        for module in model.modules():                                   # meta tensors know no autocast
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape), p.requires_grad))
        trainee, peaks = Trainee(model, None, dtype), []
        for p in train.trained(model):
            p.grad = torch.zeros_like(p)
        trainee.optimizer.step()                                         # makes its state
        trainee.optimizer.zero_grad(set_to_none=True)
        stays = meter.now
        for n_rows, length, n_targets, *validation in shapes:
            idx = torch.zeros(n_rows, length, dtype=torch.long)
            y, rows, columns = (torch.zeros(n_targets, dtype=torch.long) for _ in range(3))
            trainee.batch, meter.peak = (idx, (rows, columns), y, idx[:, 0].clone()), 0
            with torch.set_grad_enabled(not validation):
                trainee.losses() if validation else trainee()
            peaks.append(meter.peak)
    return stays, peaks


# ------------------------------------------------------------------------------------------- the table
MEAN, LONGEST = (159, 96), (422, 228)           # of GSM8K's batches: inputs of a row, and targets
VALIDATION = (32, 438, 3473, "validation")      # of 32 rows: the longest, and the most targets
CARDS, PARTS = (8, 16, 24, 80), (1, 4, 16)      # GB of memory; values of --grad_accum
TEXT = """# Memory of a training step

Written by `python -m measure.memory`, from fake tensors: weights in float32, autocast to bfloat16, AdamW, a
batch of 32 examples of GSM8K, no torch.compile. Not yet compared with a GPU: `python bench.py --gpu_report`
does that.

GB (10^9 bytes) that stay between steps (weights, the optimizer's state), and at a step's peak: for a batch of
mean length ({} tokens a row, {} of them targets), and for the longest ({} and {}),
which decides whether a run fits, with `--grad_accum` of {}. Validation reads 32 examples at once.

{peaks}

The least of these `--grad_accum` with which the longest batch takes at most 0.9 of a card's memory (the rest
is for what is not counted), as validation must; "-" is none. The batch remains one of 32 examples.

{fits}
"""


def markdown(rows):
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def text(sizes, modes):
    """docs/MEMORY.md."""
    peaks = [("model", "trained", "stays", "mean batch", *(f"longest, {k}" for k in PARTS), "validation")]
    fits = [("model", "trained", *(f"{card} GB" for card in CARDS))]
    for name, size in sizes.items():
        for mode in modes:
            rows = [(32, MEAN)] + [(32 // k, LONGEST) for k in PARTS]
            shapes = [(n, length, n * targets) for n, (length, targets) in rows]
            stays, found = step_bytes(size, mode, [*shapes, VALIDATION])
            peaks.append((name, mode, *(f"{x / 1e9:.1f}" for x in (stays, *found))))
            least = [[k for k, x in zip(PARTS, found[1:]) if max(x, found[-1]) <= 0.9e9 * card]
                     for card in CARDS]
            fits.append((name, mode, *(k[0] if k else "-" for k in least)))
            print(*peaks[-1], "|", *fits[-1][2:], flush=True)
    parts = ", ".join(map(str, PARTS))
    return TEXT.format(*MEAN, *LONGEST, parts, peaks=markdown(peaks), fits=markdown(fits))


@dataclass(frozen=True)
class Config:
    out: str = "docs/MEMORY.md"


def main(argv=None):
    config = configure(Config, argv, __doc__)
    written = text(GPT2_SIZES, [mode for mode in MODES if mode != "trunk LoRA"])
    write_file(config.out, lambda file: file.write(written.encode()))


if __name__ == "__main__":
    run(main)
