"""
How a training run is watched: metrics.jsonl, validation losses by time, a line now and then, and an end where
its numbers are not finite.
"""
import json
import math
import os
import time

import torch
import torch.nn.functional as F

from batches import batch_of, draw_noise, generator_for
from configurator import UserError, require
from files import append_records, read_records, write_file

N_BINS = 8                          # of t


@torch.no_grad()
def validation_loss(loss_of, data, config, ranks, autocast):
    """Mean loss per target on the first eval_examples, without labels, as in sampling by default: of the
    pair, in all and for each of N_BINS bins of t, and of the trunk. The noise is the same at every
    evaluation."""
    model, n = loss_of.model, min(config.eval_examples, len(data.labels))
    sums = torch.zeros(3, N_BINS, dtype=torch.float64, device=ranks.device)  # targets, loss, the trunk's loss
    for start in range(ranks.rank * 32, n, ranks.world * 32):
        idx, at, y, label = batch_of(data, range(start, min(start + 32, n)), ranks.device)
        generator = generator_for(ranks.device, 1, config.seed, start)
        _, t, x_0, T = draw_noise(config, model, label, len(y), generator)
        label = torch.full_like(label, model.no_label)
        with autocast:
            loss = trunk_loss = loss_of(idx, at, y, label, t, x_0, T)
            if model.path:
                trunk_logits = model.trunk.head(model.read(idx, at).h).float()
                trunk_loss = F.cross_entropy(trunk_logits, y, reduction="none")
        bins = (t * N_BINS).long() if t is not None else torch.zeros_like(y)
        sums.index_add_(1, bins, torch.stack([torch.ones_like(loss), loss, trunk_loss]).double())
    counts, losses, trunk_losses = ranks.sum(sums).tolist()
    by_t = [round(loss / count, 4) if count else None for loss, count in zip(losses, counts)]
    return {"val_loss": sum(losses) / sum(counts), "trunk_loss": sum(trunk_losses) / sum(counts),
            "val_loss_by_t": by_t if model.path and not config.unroll else None}


def validate(run, config, ranks):
    """Evaluate, print and log; the loss. Raises UserError where it is not finite."""
    result = validation_loss(run.loss_of, run.val, config, ranks, run.autocast)
    loss = result["val_loss"]
    kept = f"{config.out_dir}/last.pt holds step {run.saved}" if run.saved >= 0 else "Nothing was written"
    require(math.isfinite(loss), f"the validation loss is {loss} at step {run.step}; lower learning_rate, or "
            f"use another dtype. {kept}")
    text = f"step {run.step}: validation loss {loss:.4f}"
    if run.model.path:
        text += f" (trunk {result['trunk_loss']:.4f})"
    if result["val_loss_by_t"]:
        text += "  by t " + " ".join("-" if x is None else f"{x:.3f}" for x in result["val_loss_by_t"])
    ranks.say(text)
    run.log(step=run.step, **result)
    return loss


class Log:
    """metrics.jsonl: a line for every report of the main rank. A new run starts it afresh, a resumed one
    drops the steps that it will repeat."""
    def __init__(self, config, ranks, step):
        self.path, self.main = os.path.join(config.out_dir, "metrics.jsonl"), ranks.main
        if self.main:
            kept = [r for r in read_records(self.path) if config.resume and r.get("step", 0) <= step]
            text = "".join(json.dumps(r) + "\n" for r in kept)
            write_file(self.path, lambda file: file.write(text.encode()))

    def __call__(self, **record):
        if self.main:
            append_records(self.path, [record])


def report(run, config, ranks, loss_sum, norm, tokens, start):
    """A line on the terminal, and one in the log. start: a (time, step); tokens: target tokens since."""
    loss, norm, lr = ranks.sum(loss_sum).item(), norm.item(), run.optimizer.param_groups[0]["lr"]
    seconds = time.time() - start[0]
    eta = int(seconds / (run.step - start[1]) * (config.steps - run.step))
    ranks.say(f"step {run.step}/{config.steps}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
              f"{tokens / seconds:,.0f} target tokens/s  ETA {eta // 60}:{eta % 60:02d}")
    run.log(step=run.step, loss=loss if math.isfinite(loss) else None, lr=lr, seconds=round(seconds, 1),
            grad_norm=norm if math.isfinite(norm) else None, tokens_per_second=round(tokens / seconds))


def stop_if_bad(in_a_row, t, losses, run, config):
    """A user's error where several gradients in a row were not finite. None of these steps was taken."""
    if in_a_row < (30 if run.scaler.is_enabled() else 5):     # float16's scaler begins with a few
        return
    bad = ~losses.detach().isfinite()
    bins = sorted(set((t[bad] * N_BINS).long().tolist())) if t is not None else []
    where = "its loss" if bad.any() else "the gradient of its loss"
    at_t = " at t in " + ", ".join(f"[{b / N_BINS}, {(b + 1) / N_BINS}]" for b in bins) if bins else ""
    raise UserError(f"step {run.step} and the {int(in_a_row) - 1} before: {where} is not finite"
                    f"{at_t}. They changed nothing; {config.out_dir}/last.pt holds step {run.saved}. Lower "
                    "learning_rate, or use another dtype")
