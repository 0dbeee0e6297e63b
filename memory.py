"""
How much memory does a training step take? Counted with fake tensors: real shapes, no data, on any machine.

    python memory.py                # writes docs/MEMORY.md: GPT-2 of all sizes, L2D and full finetuning

Counted are the bytes of all tensors alive at the worst moment of the second optimizer step: weights, gradients, the
optimizer's state, and what forward and backward hold. What a kernel takes for itself and the allocator's fragments
come on top: a tenth is left for them. torch.compile fuses the loss, and needs less.
"""
import weakref
from contextlib import nullcontext

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import train
from configurator import run
from files import write_file
from model import GPT, GPT2_SIZES, L2D, DiffusionPath, PathConfig

MODES = {"full finetuning": ("full", "none"), "trunk LoRA": ("lora", "none"),    # trunk_mode, path_mode
         "L2D, full path": ("frozen", "full"), "L2D, LoRA path": ("frozen", "lora")}


def random_pair(size, trunk_mode="frozen", path_mode="none", seed=0):
    """The pair with random weights; requires_grad as in train.py. The path is fresh, and w_init = 0: at every t the
    pair predicts what the trunk does."""
    torch.manual_seed(seed)
    trunk, path = GPT(size), PathConfig(path_mode=path_mode, w_init=0.0)
    model = L2D(trunk, DiffusionPath(trunk, path, 1) if path_mode != "none" else None)
    trunk.requires_grad_(trunk_mode == "full")
    if trunk_mode == "lora":
        trunk.add_lora(path.lora_rank, path.lora_alpha)
    return model


class Trainee:
    """A model, its optimizer and train.py's step, always on the same batch (as from batch_of)."""
    def __init__(self, model, batch, dtype):
        self.model, self.batch, self.config, self.loss_of = model, batch, train.Config(), train.Loss(model)
        self.optimizer = train.make_optimizer(model, self.config)
        self.autocast = torch.autocast(batch[0].device.type, dtype) if dtype != torch.float32 else nullcontext()

    def __call__(self, generator=None):
        idx, at, y, label = self.batch
        generator = generator or train.generator_for(idx.device, 0)
        label, t, x_0, times = train.draw_noise(self.config, self.model, label, len(y), generator)
        with self.autocast:
            loss = self.loss_of(idx, at, y, label, t, x_0, times).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(train.trained(self.model), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self):
        """Bytes that stay between steps: weights and the optimizer's state."""
        state = [z for s in self.optimizer.state.values() for z in s.values()]
        return sum(z.nbytes for z in [*self.model.parameters(), *state])


class Meter(TorchDispatchMode):
    """While it is on: the bytes of the storages alive, and their peak. What was there before has to be added."""
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


def step_bytes(size, mode, n_rows, length, n_targets, dtype=torch.bfloat16):
    """Bytes of a training step of n_rows x length tokens with n_targets targets: those that stay, and the peak."""
    with torch.device("meta"):
        model = random_pair(size, *MODES[mode])
    with FakeTensorMode(), Meter() as meter:
        for module in model.modules():                                   # meta tensors know no autocast, fake ones do
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape), p.requires_grad))
        at = torch.zeros(2, n_targets, dtype=torch.long).unbind()
        batch = torch.zeros(n_rows, length, dtype=torch.long), at, at[0].clone(), torch.zeros(n_rows, dtype=torch.long)
        trainee = Trainee(model, batch, dtype)
        trainee()
        stays, meter.peak = meter.now, 0
        trainee()
    return stays, meter.peak


if __name__ == "__main__":
    import time
    s=time.time()
    print(step_bytes(GPT2_SIZES["gpt2"],"L2D, full path",32,156,32*96), time.time()-s)
