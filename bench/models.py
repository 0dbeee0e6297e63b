"""
What is measured: pairs with random weights, of any size of GPT-2, or of Llama's type, and a training step.
"""
from contextlib import nullcontext

import torch
import torch.nn as nn

import train
from llama import LlamaConfig
from model import L2D, DiffusionPath, GPTConfig, PathConfig
from plumbing.checkpoint import families
from plumbing.gpt2_weights import GPT2_SIZES

LLAMA_SIZES = {                                                   # positions cut to what GSM8K needs
    "SmolLM2-135M": LlamaConfig(2048, 49152, 30, 9, 3, 576, 64, 1536),
    "Llama-3.2-1B": LlamaConfig(2048, 128256, 16, 32, 8, 2048, 64, 8192),
    "Qwen2.5-0.5B": LlamaConfig(2048, 151936, 24, 14, 2, 896, 64, 4864, qkv_bias=True),
    "tiny-llama": LlamaConfig(1024, 1024, 2, 4, 2, 64, 16, 192, qkv_bias=True, tied=False),
}
SIZES = GPT2_SIZES | LLAMA_SIZES | {"tiny": GPTConfig(vocab_size=1024, n_layer=2, n_head=2, n_embd=64)}
MODES = {                                                         # name: (trunk_mode, path_mode)
    "full finetuning": ("full", "none"),
    "trunk LoRA": ("lora", "none"),
    "L2D, full path": ("frozen", "full"),
    "L2D, LoRA path": ("frozen", "lora"),
}


def random_pair(size, trunk_mode="frozen", path_mode="none", seed=0, path_init="trunk"):
    """A pair with random weights, of which the same parameters train as in train.py.

    size: a GPTConfig or LlamaConfig. With path_init="paper" w_d is 0 at every t, so the pair predicts exactly
    what its trunk does.
    """
    torch.manual_seed(seed)
    (trunk_class,) = [kind for kind, config in families().values() if type(size) is config]
    trunk = trunk_class(size)
    config = PathConfig(path_mode=path_mode, path_init=path_init)
    model = L2D(trunk, DiffusionPath(trunk, config, 1) if path_mode != "none" else None)
    trunk.requires_grad_(trunk_mode == "full")
    if trunk_mode == "lora":
        trunk.add_lora(config.lora_rank, config.lora_alpha)
    return model


class Trainee:
    """A model, its optimizer, and train.py's optimizer step on one batch, over and over.

    batch: idx, at, y, group, as from load_batch. dtype: of autocast.
    """
    def __init__(self, model, batch, dtype):
        self.model = model
        self.batch = batch
        self.config = train.Config()
        self.loss = train.Loss(model)
        self.optimizer = train.configure_optimizer(model, self.config)
        device = model.trunk.wte.weight.device.type
        self.autocast = torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()

    def compute_losses(self):
        """The losses (N,) of the batch."""
        idx, at, y, group = self.batch
        generator = train.make_generator(idx.device, 0)
        t, x_0, group, steps = train.draw_inputs(self.config, self.model, group, len(y), generator)
        with self.autocast:
            return self.loss(idx, at, y, group, t, x_0, steps)

    def step(self):
        self.compute_losses().mean().backward()
        nn.utils.clip_grad_norm_(train.trained_parameters(self.model), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self):
        """Bytes that stay between steps: the weights and the optimizer's state."""
        state = [z for of_parameter in self.optimizer.state.values() for z in of_parameter.values()]
        return sum(z.nbytes for z in [*self.model.parameters(), *state])
