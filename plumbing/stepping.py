"""
An optimizer step that survives gradients which are not finite: it skips and counts them.
"""
import math

import torch
import torch.nn as nn

from configurator import UserError


class Stepper:
    """Takes optimizer steps on gradients that backward has summed up.

    params: the parameters that train. optimizer: a fused AdamW over them. scaler: a GradScaler, enabled for
    float16. grad_clip: the largest norm of the gradient, 0 for any.
    """
    def __init__(self, params, optimizer, scaler, grad_clip):
        self.params = params
        self.optimizer = optimizer
        self.scaler = scaler
        self.grad_clip = grad_clip or math.inf
        self.bad_in_a_row = torch.zeros((), device=params[0].device)

    def step(self, lr):
        """Clip, step with this learning rate, and clear the gradients. Returns their norm before clipping.

        Where the norm is not finite, nothing changes.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.params, self.grad_clip)
        bad = (~norm.isfinite()).float()
        self.bad_in_a_row = (self.bad_in_a_row + bad) * bad       # on the device: nobody waits for it here
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = bad                        # the fused AdamW skips the step if 1
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def check(self, iter_num, losses, kept):
        """Raise UserError where several gradients in a row were not finite. Waits for the device.

        losses: (N,) of the newest micro-batch. kept: what the message says of the last checkpoint.
        """
        allowed = 30 if self.scaler.is_enabled() else 5           # float16's scaler begins with a few
        if self.bad_in_a_row < allowed:
            return
        what = "the gradient of the loss" if losses.isfinite().all() else "the loss"
        raise UserError(f"{what} is not finite in iteration {iter_num} and the {int(self.bad_in_a_row) - 1} "
                        f"before; they changed nothing. {kept}. Lower learning_rate, or use another dtype")
