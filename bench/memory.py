"""
How much memory does a training step take? We count it with fake tensors, which have shapes but no data.

    python -m bench.memory        # writes docs/MEMORY.md: GPT-2 and Llama's type, L2D and full finetuning

The count is the peak, within an optimizer step, of the bytes of all live tensors: weights, gradients, the
optimizer's state, and what forward and backward hold. It leaves out the GPU's context, what kernels take for
themselves, and the allocator's fragments. With torch.compile the loss is fused and needs less.
"""
import weakref
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import train
from bench.models import LLAMA_SIZES, MODES, Trainee, random_pair
from configurator import configure, run
from plumbing.files import write_file
from plumbing.gpt2_weights import GPT2_SIZES


class Meter(TorchDispatchMode):
    """Counts, while it is on, the bytes of live tensors that were made since: now, and at the peak."""
    def __init__(self):
        super().__init__()
        self.alive = {}                                           # {key of a storage: weak reference to it}
        self.now = 0
        self.peak = 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        n_bytes = storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.remove(key, n_bytes))
            self.now += n_bytes
            self.peak = max(self.peak, self.now)

    def remove(self, key, n_bytes):
        del self.alive[key]
        self.now -= n_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, out)
        return out


def step_bytes(size, mode, shapes, dtype=torch.bfloat16):
    """Count the bytes that stay between training steps, and the peak of one step for each shape of batch.

    size: a GPTConfig or LlamaConfig. mode: a key of MODES; a trunk of Llama's type that is frozen is in
    bfloat16, if dtype is. shapes: a list of (rows, length, targets), or of (rows, length, targets,
    "validation") for a batch without gradients. Returns the bytes that stay, and a list of peaks.
    """
    with torch.device("meta"):
        model = random_pair(size, *MODES[mode])
    if size in LLAMA_SIZES.values() and MODES[mode][0] == "frozen" and dtype == torch.bfloat16:
        model.trunk.bfloat16()
    with FakeTensorMode(), Meter() as meter:
        for module in model.modules():                            # autocast does not work on meta tensors
            for name, p in module.named_parameters(recurse=False):
                new = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
                setattr(module, name, new)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        trainee = Trainee(model, None, dtype)
        for p in train.trained_parameters(model):
            p.grad = torch.zeros_like(p)
        trainee.optimizer.step()                                  # makes its state
        trainee.optimizer.zero_grad(set_to_none=True)
        stays = meter.now
        peaks = []
        for n_rows, length, n_targets, *validation in shapes:
            trainee.batch = fake_batch(n_rows, length, n_targets)
            meter.peak = 0
            with torch.set_grad_enabled(not validation):
                trainee.compute_losses() if validation else trainee.step()
            peaks.append(meter.peak)
    return stays, peaks


def fake_batch(n_rows, length, n_targets):
    """A batch of that shape, as from load_batch."""
    idx = torch.zeros(n_rows, length, dtype=torch.long)
    y, rows, columns = (torch.zeros(n_targets, dtype=torch.long) for _ in range(3))
    return idx, (rows, columns), y, idx[:, 0].clone()


# ------------------------------------------------------------------------------------------- the table
# Lengths of GSM8K's batches: (tokens of a row, targets of a row)
MEAN = (159, 96)
LONGEST = (422, 228)
VALIDATION = (32, 438, 3473, "validation")      # of batches of 32 rows: the longest row, the most targets
CARDS = (8, 16, 24, 80)                         # GB of memory
PARTS = (1, 4, 16)                              # values of --gradient_accumulation_steps
TEXT = """# Memory of a training step

`python -m bench.memory` wrote this page. It counts fake tensors: weights in float32, autocast to bfloat16,
AdamW, a batch of 32 examples of GSM8K, no torch.compile. A frozen trunk of Llama's type is in bfloat16
(`--trunk_dtype=bfloat16`). The page has not been compared with a GPU;
`python -m bench --gpu_report` does that.

The first table is in GB (10^9 bytes). "stays" is what remains between steps: the weights and the optimizer's
state. The other columns are peaks. A batch of mean length has {} tokens per row, of which {} are targets.
The longest batch has {} and {}. It decides whether a run fits. It is shown for
`--gradient_accumulation_steps` of {}. Validation reads 32 examples at once.

{peaks}

The second table holds the least of these `--gradient_accumulation_steps` with which a run fits on a card,
and "-" where none fits. A run fits if the longest batch and validation take at most 0.9 of the memory. The
rest is for what is not counted. The batch remains one of 32 examples.

{fits}
"""


def format_markdown(rows):
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def least_parts(peaks, validation, card):
    """The first of PARTS with which the longest batch fits on a card of so many GB, "-" for none."""
    for parts, peak in zip(PARTS, peaks):
        if max(peak, validation) <= 0.9e9 * card:
            return parts
    return "-"


def format_page(sizes, modes):
    """The text of docs/MEMORY.md."""
    peaks = [("model", "trained", "stays", "mean batch", *(f"longest, {k}" for k in PARTS), "validation")]
    fits = [("model", "trained", *(f"{card} GB" for card in CARDS))]
    for name, size in sizes.items():
        for mode in modes:
            batches = [(32, MEAN)] + [(32 // k, LONGEST) for k in PARTS]
            shapes = [(n, length, n * targets) for n, (length, targets) in batches]
            stays, found = step_bytes(size, mode, [*shapes, VALIDATION])
            peaks.append((name, mode, *(f"{x / 1e9:.1f}" for x in (stays, *found))))
            fits.append((name, mode, *(least_parts(found[1:-1], found[-1], card) for card in CARDS)))
            print(*peaks[-1], "|", *fits[-1][2:], flush=True)
    parts = ", ".join(map(str, PARTS))
    return TEXT.format(*MEAN, *LONGEST, parts, peaks=format_markdown(peaks), fits=format_markdown(fits))


@dataclass(frozen=True)
class Config:
    out: str = "docs/MEMORY.md"


def main(argv=None):
    config = configure(Config, argv, __doc__)
    sizes = GPT2_SIZES | {name: LLAMA_SIZES[name] for name in ("SmolLM2-135M", "Llama-3.2-1B")}
    text = format_page(sizes, [mode for mode in MODES if mode != "trunk LoRA"])
    write_file(config.out, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    run(main)
