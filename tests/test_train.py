"""train.py: each mode trains what it should and nothing else; micro-batches and ranks are one run."""
import copy
import dataclasses
import hashlib
import math
import shutil
from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FROM_SCRATCH,
    ROOT,
    argv,
    child,
    error_of,
    evaluations,
    everywhere,
    losses,
    metrics,
    same_tensors,
    says,
    start_ranks,
    tokens,
)

import diffusion
import prepare_data
import sample
import train
from configurator import UserError, configure
from llama import Llama, LlamaConfig
from model import GPT, L2D, DiffusionPath, GPTConfig, LoRALinear, PathConfig
from plumbing.checkpoint import load_checkpoint, pair_from
from plumbing.dataset import (
    batches_of_epoch,
    count_targets,
    iterate_batches,
    load_batch,
    load_manifest,
    load_split,
)
from plumbing.kernels import compile_blocks
from plumbing.trunks import load_trunk

MODES = [("frozen", "full"), ("frozen", "lora"), ("lora", "none"), ("lora", "full"), ("lora", "lora"),
         ("full", "none"), ("full", "full"), ("full", "lora")]


def config(**options):
    return configure(train.Config, argv(**options))


class Enough(Exception):
    """A run has made the iterations that a test looks at."""


def run_of(n, options, before=None, each=None, **more):
    """The Run of a fresh training after n iterations. before(run) comes first, each(run, norm) after each."""
    shutil.rmtree(options["out_dir"], ignore_errors=True)
    runs, set_up, report = [], train.set_up, train.report

    def captured(config, ranks):
        runs.append(set_up(config, ranks))
        if before:
            before(runs[0])
        return runs[0]

    def counted(run, config, ranks, loss_sum, norm, *rest):
        report(run, config, ranks, loss_sum, norm, *rest)
        if each:
            each(run, norm)
        if run.iter_num == n:
            raise Enough
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "set_up", captured)
        patch.setattr(train, "report", counted)
        with pytest.raises(Enough):
            train.main(argv(**options | more))
    runs[0].lock.close()
    return runs[0]


# --------------------------------------------------------------------------------------------------- modes
def test_a_trunk_from_scratch_learns(trunk):
    first, last = evaluations(trunk)
    assert first["iter_num"] == 0 and last["iter_num"] == 60
    assert abs(first["val_loss"] - math.log(665)) < 0.1           # untrained, it knows nothing of 665 tokens
    assert last["val_loss"] < first["val_loss"] - 1 and last["val_loss_by_t"] is None
    assert load_checkpoint(trunk / "last.pt")["path_config"] is None


def digest(tensors):
    return hashlib.sha256(b"".join(tensors[k].numpy().tobytes() for k in sorted(tensors))).hexdigest()


@pytest.fixture
def runs(monkeypatch):
    """Every Run that train.py sets up, as it stands in memory."""
    runs, set_up = [], train.set_up
    monkeypatch.setattr(train, "set_up", lambda *args: runs.append(set_up(*args)) or runs[-1])
    return runs


def test_the_trunk_is_bit_for_bit_the_same_after_training(options, trunk, runs):
    """L2D's headline: a hash over all of the trunk's weights, before training, after it in memory, and saved."""
    before = load_checkpoint(trunk / "last.pt")["model"]
    train.main(argv(**options))
    after = runs[0].model.state_dict()
    saved = load_checkpoint(options["out_dir"] / "last.pt")["model"]
    for tensors in (after, saved):
        assert digest({name: z for name, z in tensors.items() if name.startswith("trunk.")}) == digest(before)
    assert same_tensors(after, saved)


@pytest.mark.parametrize("trunk_mode, path_mode", MODES)
def test_a_mode_trains_what_it_should_and_nothing_else(trunk_mode, path_mode, options, trunk, runs, capsys):
    """The loss falls; every tensor that should train changed; all else is as it was, bit for bit; it samples."""
    state = {}

    def before(run):
        state["before"] = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        trains = {name for name in state["before"]
                  if name.startswith("path.") or trunk_mode == "full" or "lora_" in name}
        parameters = dict(run.model.named_parameters())
        given = [p for group in run.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in given} == {id(parameters[name]) for name in trains} and len(given) == len(trains)
        state["trains"] = trains
    run_of(1, options, before, trunk_mode=trunk_mode, path_mode=path_mode)

    shutil.rmtree(options["out_dir"])
    train.main(argv(**options, trunk_mode=trunk_mode, path_mode=path_mode))
    first, last = evaluations(options["out_dir"])                 # a fresh path predicts what the trunk does
    assert first["val_loss"] == pytest.approx(first["trunk_loss"], rel=1e-4)
    assert last["val_loss"] < first["val_loss"] - 0.1
    assert (last["trunk_loss"] == first["trunk_loss"]) == (trunk_mode == "frozen")

    after, live = load_checkpoint(options["out_dir"] / "last.pt"), runs[-1].model.state_dict()
    assert after["model"].keys() == state["before"].keys() == live.keys() and same_tensors(after["model"], live)
    changed = {name for name, tensor in state["before"].items() if not torch.equal(tensor, after["model"][name])}
    assert changed == state["trains"] and len(after["optimizer"]["state"]) == len(changed)
    assert not [name for name in after["model"] if name.startswith("path.") and ".linear." in name]    # borrowed

    original = load_checkpoint(trunk / "last.pt")["model"]
    if trunk_mode != "full":                                      # the frozen weights are those of the file
        frozen = {name.replace(".linear.", "."): t for name, t in after["model"].items()
                  if name.startswith("trunk.") and "lora_" not in name}
        assert digest(frozen) == digest(original)

    capsys.readouterr()
    steps = 1 if path_mode == "none" else 3
    sample.main([f"--out_dir={options['out_dir']}", f"--steps={steps}", "--max_new_tokens=4"])
    assert f"NFE {steps - 1:.2f}" in capsys.readouterr().out


def test_every_option_of_the_path_reaches_it_and_trains(options):
    own = dict(path_mode="lora", lora_rank=4, lora_alpha=8.0, x_dim=16, t_dim=32, sigma=4.0, input_scale="unit",
               time_scale=1.0, path_init="paper")
    train.main(argv(**options, **own))
    assert load_checkpoint(options["out_dir"] / "best.pt")["path_config"] == own
    first, last = evaluations(options["out_dir"])
    assert last["val_loss"] < first["val_loss"] - 0.1


def test_training_through_algorithm_1_learns_and_says_how_to_sample(options, capsys):
    train.main(argv(**options, unroll=3, max_iters=30))
    first, last = evaluations(options["out_dir"])
    assert last["val_loss"] < first["val_loss"] - 0.1
    assert last["val_loss_by_t"] is None                          # every last evaluation is at the same time
    assert load_checkpoint(options["out_dir"] / "best.pt")["sampler"] == diffusion.UNROLLED
    capsys.readouterr()
    sample.main([f"--out_dir={options['out_dir']}", "--steps=3", "--max_new_tokens=2"])
    says(capsys.readouterr().out, *(f"--{name}={value}" for name, value in diffusion.UNROLLED.items()))


def test_the_lora_of_a_trunk_is_merged_in(options, tmp_path, arithmetic):
    train.main(argv(**options, trunk_mode="lora", path_mode="none"))
    finetuned = pair_from(load_checkpoint(tmp_path / "out/last.pt"), "last.pt").trunk
    base = pair_from(load_checkpoint(options["trunk"]), "trunk").trunk
    merged = load_trunk(str(tmp_path / "out/last.pt"), load_manifest(arithmetic))
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    idx = torch.arange(60).view(2, 30)
    with torch.no_grad():
        want, got, other = (model.head(model(idx)[0]) for model in (finetuned, merged, base))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (want - other).abs().max() > 0.1                       # the LoRA had learned something to merge


def test_a_trunk_may_come_from_a_safetensors_file(options, tmp_path):
    """As GPT-2's do: a local file, its Conv1D the wrong way round."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    gpt = GPT(GPTConfig(128, 665, 1, 1, 64))
    turned = tuple(f"{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    save_file({k: v.t().contiguous() if k.endswith(turned) else v for k, v in gpt.state_dict().items()},
              tmp_path / "model.safetensors")
    train.main(argv(**options | dict(trunk=tmp_path), max_iters=3))
    after = load_checkpoint(tmp_path / "out/last.pt")["model"]
    assert all(torch.equal(after["trunk." + k], v) for k, v in gpt.state_dict().items())


def test_one_batch_can_be_learned_by_heart_at_every_t(arithmetic):
    """Beside a frozen random trunk; the loss is near zero in each bin of t, near the end and at the start."""
    torch.manual_seed(0)
    c = config(**FROM_SCRATCH | dict(n_head=4, n_embd=64), x_dim=64, sigma=64, data_dir=arithmetic)
    model = train.make_model(c, load_manifest(arithmetic))
    with torch.no_grad():                                         # initial weights could say nothing clearly
        for name, p in model.trunk.named_parameters():
            p *= 20 if name.startswith("w") else 4 if p.dim() == 2 else 1
    data = load_split(arithmetic, "train")
    idx, at, y, group = load_batch(data, [5, 6, 7, 8], "cpu")
    before, optimizer = digest(model.trunk.state_dict()), torch.optim.Adam(model.path.parameters(), 3e-3)
    loss_of = train.Loss(model)
    for step in range(121):
        t, x_0, _, _ = train.draw_inputs(c, model, group, len(y), train.make_generator("cpu", step))
        loss = loss_of(idx, at, y, group, t, x_0)
        if step == 0:
            assert loss.mean() > 5
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20, (121 - step) / 60)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(loss[(t * 8).long() == b].mean() < 0.05 for b in range(8))
    assert digest(model.trunk.state_dict()) == before


# ---------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("n, batch_size, n_micro", [(300, 16, 1), (300, 16, 4), (300, 300, 2), (2000, 16, 2),
                                                    (1601, 16, 16), (33, 32, 1)])
def test_an_epoch_takes_every_example_at_most_once_in_another_order(n, batch_size, n_micro):
    lengths = np.random.default_rng(0).integers(20, 120, n)
    epochs = [batches_of_epoch(lengths, batch_size, n_micro, [5, epoch]) for epoch in range(12)]
    for batches in epochs:
        assert batches.shape == (n // batch_size, n_micro, batch_size // n_micro)
        assert len(set(batches.ravel().tolist())) == batches.size
        assert batches.min() >= 0 and batches.max() < n
    assert np.array_equal(epochs[3], batches_of_epoch(lengths, batch_size, n_micro, [5, 3]))
    assert not np.array_equal(epochs[0], batches_of_epoch(lengths, batch_size, n_micro, [6, 0]))
    assert len({batches.tobytes() for batches in epochs}) == 12
    assert set(np.concatenate([b.ravel() for b in epochs]).tolist()) == set(range(n))     # none for good
    if n // batch_size > 2:                                       # short and long ones in no order
        means = lengths[epochs[0]].mean((1, 2))
        assert not (np.diff(means) >= 0).all() and not (np.diff(means) <= 0).all()


def lengths_of_gsm8k():
    """Tokens of each training problem; the real ones where the data and GPT-2's tokenizer are at hand."""
    source, cache = ROOT.parent / "shared/gsm8k", ROOT.parent / "shared/tiktoken_cache"
    if not (source.exists() and cache.exists()):                  # known of GSM8K: mean 156, p99 321, max 439
        return np.random.default_rng(0).gamma(6.8, 23, 7000).astype(int) + 20
    import json
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    return np.array([len(r["question"] + r["answer"]) for r in rows]) // 4 + 8    # 4 letters a token, nearly


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_get_the_same_amount_of_work_and_little_padding(ranks):
    """A step takes as long as its slowest rank: on 8 ranks the mean is at least 0.9 of the most."""
    lengths = lengths_of_gsm8k()
    batches = lengths[batches_of_epoch(lengths, 32, ranks, 0)]    # (steps, ranks, examples of each)
    padded = batches.max(-1) * batches.shape[-1]                  # tokens that each rank computes
    assert padded.mean(1).sum() / padded.max(1).sum() > 0.9
    assert 1 - batches.sum() / padded.sum() < 0.05
    shuffled = lengths[np.random.default_rng(0).permutation(len(lengths))[:batches.size]].reshape(batches.shape)
    assert ranks > 16 or 1 - shuffled.sum() / (shuffled.max(-1) * shuffled.shape[-1]).sum() > 0.1


def test_k_micro_batches_are_the_same_examples_as_one():
    lengths = np.random.default_rng(0).integers(20, 120, 700)
    one = batches_of_epoch(lengths, 16, 1, 3)
    for k in (2, 4, 16):
        np.testing.assert_array_equal(np.sort(batches_of_epoch(lengths, 16, k, 3).reshape(-1, 16)),
                                      np.sort(one.reshape(-1, 16)))


def test_a_run_that_begins_later_sees_the_rest_of_the_same_batches(arithmetic):
    """Across the ends of epochs; and each batch says how many targets it has."""
    data = load_split(arithmetic, "train")
    batches = list(islice(iterate_batches(data, 32, 2, 7, 0), 30))                # of nine an epoch
    epoch = batches_of_epoch(np.diff(data.offsets), 32, 2, [7, 2])
    assert np.array_equal(np.stack(batches[18:27]), epoch)
    for start in (1, 8, 9, 20):
        rest = list(islice(iterate_batches(data, 32, 2, 7, start), 30 - start))
        assert np.array_equal(np.stack(rest), np.stack(batches[start:]))
    for ids in batches[:3]:
        assert count_targets(data, ids) == sum(len(load_batch(data, micro, "cpu")[2]) for micro in ids)


def test_data_smaller_than_a_batch_is_repeated_to_fill_one(options, tmp_path):
    batches = batches_of_epoch(np.array([5, 9, 7, 8, 6]), 16, 2, 0)
    assert batches.shape == (1, 2, 8) and all((batches == i).sum() in (3, 4) for i in range(5))
    prepare_data.main(["arithmetic", f"--out_dir={tmp_path / 'five'}", "--train=5", "--mix=5"])
    train.main(argv(**options | dict(data_dir=tmp_path / "five"), max_iters=3, warmup_iters=0))
    assert len(losses(options["out_dir"])) == 3


# --------------------------------------------------------------------------------------------- random numbers
def test_every_iteration_and_micro_batch_draws_numbers_of_its_own():
    draws = {}
    for key in [(kind, seed, iter_num, micro) for kind in (0, 1) for seed in (0, 1) for iter_num in range(20)
                for micro in range(8)]:
        draws[key] = torch.rand(4, generator=train.make_generator("cpu", *key))
        assert torch.equal(draws[key], torch.rand(4, generator=train.make_generator("cpu", *key)))
    assert len({tuple(d.tolist()) for d in draws.values()}) == len(draws)


def test_noise_differs_at_every_position_of_every_micro_batch(options, monkeypatch):
    """Over three iterations: no x_0 and no t twice, one t in each bin; the same again with the same seed."""
    drawn, draw = [], train.draw_inputs
    def kept(*args):
        drawn.append(draw(*args))
        return drawn[-1]
    monkeypatch.setattr(train, "draw_inputs", kept)

    def three_iterations(seed):
        drawn.clear()
        run_of(3, options, gradient_accumulation_steps=4, seed=seed)
        mine = drawn[1:]                                          # the first is of the evaluation at the start
        return [t for t, *_ in mine], torch.cat([x_0 for _, x_0, *_ in mine])
    ts, x_0 = three_iterations(0)
    assert len(ts) == 12
    t = torch.cat(ts)
    assert len(t.unique()) > 0.999 * len(t) and len(x_0.unique(dim=0)) == len(x_0) == len(t)
    assert len(x_0.flatten().unique()) > 0.99 * x_0.numel()       # independent within a position too
    assert abs(x_0.std() / 4 - 1) < 0.02 and abs(x_0.mean()) < 0.1                # sigma = 4
    again, x_0_again = three_iterations(0)
    other, x_0_other = three_iterations(1)
    assert torch.equal(x_0, x_0_again) and same_tensors(ts, again)
    assert len(set(t.tolist()) & set(torch.cat(other).tolist())) < 0.01 * len(t)  # some meet by chance


def test_groups_are_dropped_and_unrolling_draws_its_path_calls(options):
    model = train.make_model(config(**options), load_manifest(options["data_dir"]))
    group = torch.arange(4000) % 4
    def inputs(i, n, **more):
        return train.draw_inputs(config(**options, **more), model, group, n, train.make_generator("cpu", i))
    t, x_0, new, steps = inputs(0, 16000, group_dropout=0.2)
    dropped = new == model.no_group
    assert abs(dropped.float().mean() - 0.2) < 0.03 and torch.equal(new[~dropped], group[~dropped])
    assert len(t) == len(x_0) == 16000 and steps is None
    drawn = [inputs(i, 50, unroll=3, group_dropout=0) for i in range(60)]
    assert {steps for *_, steps in drawn} == {2, 3, 4} and torch.equal(drawn[0][2], group)


# ---------------------------------------------------------------------------------------- one batch, many ways
def test_micro_batches_are_one_batch(options, tmp_path, monkeypatch):
    """The same examples in 1, 2 and 8 parts of unequal numbers of targets: no mean of means."""
    batch, targets = train.load_batch, []

    def remembered(*args):
        made = batch(*args)
        targets[:] = made[1:3]
        return made

    def inputs_of_the_example(config, model, group, n, generator):   # not of its batch
        (rows, _), y = targets
        t, x_0 = torch.empty(n), torch.empty(n, model.path.config.x_dim)
        for row in rows.unique():
            mine = y[rows == row]
            g = torch.Generator().manual_seed(int((mine * torch.arange(1, len(mine) + 1)).sum()))
            t[rows == row] = torch.rand(len(mine), generator=g)
            x_0[rows == row] = torch.randn(len(mine), x_0.size(1), generator=g) * model.path.config.sigma
        return t, x_0, group, None
    monkeypatch.setattr(train, "load_batch", remembered)
    monkeypatch.setattr(train, "draw_inputs", inputs_of_the_example)
    weights, records, shared = {}, {}, dict(trunk_mode="lora", max_iters=6, learning_rate=1e-3)
    for k in (1, 2, 8):
        out_dir = tmp_path / f"k{k}"
        train.main(argv(**options | dict(out_dir=out_dir), **shared, gradient_accumulation_steps=k))
        weights[k] = load_checkpoint(out_dir / "last.pt")["model"]
        records[k] = [(r["loss"], r["grad_norm"]) for r in metrics(out_dir) if "loss" in r]
    for k in (2, 8):
        np.testing.assert_allclose(records[k], records[1], rtol=2e-5)
        torch.testing.assert_close(weights[k], weights[1], rtol=1e-4, atol=1e-5)


def same_run(a, b, exact):
    """Whether two out_dirs hold the same training."""
    one, other = (load_checkpoint(out / "last.pt") for out in (a, b))
    if exact:
        assert same_tensors(one["model"], other["model"]) and losses(a) == losses(b)
    for tensors in (one["model"], other["model"]):                # a key's bias changes nothing: its gradient is
        for name, tensor in tensors.items():                      # rounding, which Adam makes whole steps of
            if name.endswith("attn.c_attn.bias"):
                tensor.view(3, -1)[1] = 0
    torch.testing.assert_close(one["model"], other["model"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses(a), losses(b), rtol=1e-5)
    for x, y in zip(evaluations(a), evaluations(b), strict=True):
        assert x["iter_num"] == y["iter_num"] and x["val_loss"] == pytest.approx(y["val_loss"], rel=1e-5)
        if x["val_loss_by_t"]:
            assert x["val_loss_by_t"] == pytest.approx(y["val_loss_by_t"], abs=2e-4)
    assert len({x["val_loss"] for x in evaluations(a)}) > 1       # it did train


@pytest.mark.parametrize("more, exact", [(dict(), True), (dict(unroll=2, trunk_mode="lora"), True),
                                         (dict(batch_size=32, gradient_accumulation_steps=2, trunk_mode="full"), False)])
def test_two_ranks_are_one_process_with_their_micro_batches(options, tmp_path, more, exact):
    """gloo: weights, losses and evaluations, bit for bit with one micro-batch a rank."""
    shared = options | dict(max_iters=4, learning_rate=1e-3, eval_examples=70) | more
    train.main(argv(**shared | dict(gradient_accumulation_steps=2 * shared.get("gradient_accumulation_steps", 1))))
    ranks = start_ranks(tmp_path, 2, argv(**shared | dict(out_dir=tmp_path / "two")))
    assert [r.wait() for r in ranks] == [0, 0], [r.err() for r in ranks]
    assert "2 x cpu" in ranks[0].out() and ranks[1].out() == ""   # only the main rank speaks
    same_run(options["out_dir"], tmp_path / "two", exact)


def test_two_ranks_go_on_as_one_with_twice_the_micro_batches(options, tmp_path):
    shared = options | dict(max_iters=6, batch_size=32, eval_interval=3, learning_rate=1e-3)
    train.main(argv(**shared, gradient_accumulation_steps=4))
    two = shared | dict(out_dir=tmp_path / "two", gradient_accumulation_steps=2)
    ranks = start_ranks(tmp_path, 2, argv(**two), before=stop_after_three)
    assert [r.wait() for r in ranks] == [143, 143], [r.err() for r in ranks]
    assert load_checkpoint(tmp_path / "two/last.pt")["iter_num"] == 3
    message = error_of(train.main, argv(**two, resume=True))      # one rank of two would be another run
    says(message, "ranks x gradient_accumulation_steps were 4, now 2")
    train.main(argv(**two | dict(gradient_accumulation_steps=4), resume=True))
    same_run(options["out_dir"], tmp_path / "two", False)


def stop_after_three():
    """In the process: a stop that all ranks agree upon, at iteration 3."""
    report = train.report
    def stop(run, *args):
        report(run, *args)
        if run.iter_num == 3:
            train.evaluate_and_save(run, *args[:2])
            raise SystemExit(143)
    train.report = stop


def test_torchrun_starts_the_ranks(options):
    """The real one."""
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    done = child(two, *argv(**options, max_iters=3, device="cpu"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("iter 3/3") == 1 and "2 x cpu" in done.stdout


def test_a_mistake_is_said_by_one_rank_of_a_host(options, tmp_path):
    ranks = start_ranks(tmp_path, 2, argv(**options | dict(data_dir=tmp_path / "nothing")))
    assert [r.wait() for r in ranks] == [1, 1]
    said = "".join(rank.err() for rank in ranks)                  # by whichever rank met it first
    says(said, "error: no prepared data")
    assert said.count("\n") in (1, 2)                             # twice, if the first has ended before the other


# ------------------------------------------------------------------------------------------------ optimisation
def test_the_learning_rate_rises_to_its_peak_and_falls_to_min_lr():
    c = config(max_iters=50, warmup_iters=10, learning_rate=3e-3, min_lr=1e-4)
    got = [train.get_lr(i, c) for i in range(50)]
    want = [3e-3 * (s + 1) / 10 for s in range(10)]
    want += np.interp(range(10, 50), [10, 49], [3e-3, 1e-4]).tolist()
    np.testing.assert_allclose(got, want, rtol=1e-12)
    c = config(max_iters=1, warmup_iters=0, learning_rate=3e-3)
    assert train.get_lr(0, c) == 3e-3                      # and no division by 0


def one_step(options, **more):
    """Trained parameters before and after one step of a fresh run, by name; the run; its gradient's norm."""
    before, norms = {}, []
    def start(run):
        before.update({k: p.detach().clone() for k, p in run.model.named_parameters() if p.requires_grad})
    run = run_of(1, options, start, lambda run, norm: norms.append(norm.item()), **more)
    after = {k: p.detach().clone() for k, p in run.model.named_parameters() if p.requires_grad}
    return before, after, run, norms[0]


def test_the_step_has_the_size_of_the_schedule(options):
    """AdamW's first update is lr * sign(gradient), wherever the gradient is not tiny and nothing decays."""
    before, after, run, _ = one_step(options, warmup_iters=5, weight_decay=0)
    change = (after["path.w.2.weight"] - before["path.w.2.weight"]).abs()
    assert change.median().item() == pytest.approx(1e-2 / 5, rel=1e-2)
    run = run_of(2, options, warmup_iters=5, weight_decay=0)
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([2e-2 / 5] * 2)


def test_weight_decay_acts_on_matrices_only(options):
    """The first gradient does not know of it: a step with it differs from one without by -lr * decay * p."""
    both = dict(trunk_mode="full", path_mode="full", warmup_iters=0)
    before, plain, _, _ = one_step(options, weight_decay=0, **both)
    _, decayed, _, _ = one_step(options, weight_decay=0.5, **both)
    assert {p.dim() for p in before.values()} == {1, 2}
    for name, p in before.items():
        want = plain[name] - (1e-2 * 0.5 * p if p.dim() == 2 else 0)
        atol = 2e-7 * max(1, p.abs().max().item())
        torch.testing.assert_close(decayed[name], want, rtol=0, atol=atol, msg=name)


def test_the_gradient_is_clipped_to_grad_clip(options):
    """Adam's first moment after one step is (1 - beta1) times the gradient it was given."""
    given = {}
    for clip in (0, 1e-3, 1e6):
        _, _, run, norm = one_step(options | dict(trunk_mode="lora"), grad_clip=clip, beta1=0.9)
        moments = [run.optimizer.state[p]["exp_avg"].flatten() for p in train.trained_parameters(run.model)]
        given[clip] = torch.cat(moments) / (1 - 0.9)
        assert given[clip].norm().item() == pytest.approx(min(norm, clip or math.inf), rel=1e-3)  # norm: before
    assert given[0].norm() > 2e-3 and torch.equal(given[0], given[1e6])
    torch.testing.assert_close(given[1e-3] / given[1e-3].norm(), given[0] / given[0].norm(), rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_over_the_tokens_of_the_step(options):
    """By hand, from the model's forward: sum of -log p over all targets, divided by their number."""
    want, shared = {}, dict(gradient_accumulation_steps=2, grad_clip=0, weight_decay=0)

    def by_hand(run):
        c, total = config(**options, **shared), 0
        order = batches_of_epoch(np.diff(run.data.offsets), 16, 2, [0, 0])[0]
        for micro, ids in enumerate(order):
            idx, at, y, group = load_batch(run.data, ids, "cpu")
            drawn = train.draw_inputs(c, run.model, group, len(y), train.make_generator("cpu", 0, 0, 0, micro))
            t, x_0, group, _ = drawn
            x_1 = run.model.path.token_space(run.model.trunk.wte.weight[y])
            context = run.model.read_context(idx, at)
            logits = run.model(t[:, None] * x_1 + (1 - t)[:, None] * x_0, t, context, group[at[0]])
            total = total - logits.log_softmax(-1)[range(len(y)), y].sum()
            want["count"] = want.get("count", 0) + len(y)
        want["loss"] = total / want["count"]
        want["grad"] = torch.autograd.grad(want["loss"], train.trained_parameters(run.model), allow_unused=True)
    run = run_of(1, options, by_hand, **shared)
    assert losses(options["out_dir"])[0] == pytest.approx(want["loss"].item(), rel=1e-5)
    for p, grad in zip(train.trained_parameters(run.model), want["grad"], strict=True):
        grad = torch.zeros_like(p) if grad is None else grad
        torch.testing.assert_close(run.optimizer.state[p]["exp_avg"] / (1 - 0.9), grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_in_it_and_keeps_weights_in_float32(dtype, options, monkeypatch):
    """Matmuls of trunk and path run in it; everything stays finite and near float32."""
    seen, make_model = set(), train.make_model

    def hooked(*args):
        model = make_model(*args)
        for module in (model.trunk.h[0].mlp.c_fc, model.path.h[1].c_q):
            module.register_forward_hook(lambda m, x, y: seen.add(y.dtype))
        model.path.W.register_forward_hook(lambda m, x, y: seen.add(("x_1", y.dtype)))
        return model
    monkeypatch.setattr(train, "make_model", hooked)
    options |= dict(learning_rate=1e-3, warmup_iters=0, max_iters=20)       # at a high rate the first steps amplify rounding
    train.main(argv(**options, dtype=dtype))
    assert seen == {getattr(torch, dtype), ("x_1", torch.float32)}
    first, last = evaluations(options["out_dir"])
    assert last["val_loss"] < first["val_loss"] - 0.05 and all(map(math.isfinite, losses(options["out_dir"])))
    weights = load_checkpoint(options["out_dir"] / "last.pt")["model"]
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values())
    exact = options["out_dir"].with_name("exact")
    train.main(argv(**options | dict(out_dir=exact)))
    np.testing.assert_allclose(losses(options["out_dir"])[:5], losses(exact)[:5], rtol=5e-3)


# ------------------------------------------------------------------------------------------------- compiled
def pass_of(loss_of, batch):
    loss_of.zero_grad()
    loss = loss_of(*batch)
    loss.sum().backward()
    return loss.detach(), [p.grad.clone() for p in train.trained_parameters(loss_of.model) if p.grad is not None]


LLAMA = LlamaConfig(64, 29, n_layer=1, n_head=4, n_kv_head=2, n_embd=32, head_size=8, n_hidden=48, qkv_bias=True)
GPT2 = GPTConfig(64, 29, n_layer=1, n_head=2, n_embd=32)


def trainable_pair(size, n_layer, trunk_mode, path_mode):
    """A pair with random weights and a path that is not new, so that everything has a gradient."""
    torch.manual_seed(0)
    trunk = (Llama if isinstance(size, LlamaConfig) else GPT)(dataclasses.replace(size, n_layer=n_layer))
    path = PathConfig(path_mode=path_mode, lora_rank=2, x_dim=8, t_dim=16, sigma=4.0)
    model = L2D(trunk, DiffusionPath(trunk, path, 2) if path_mode != "none" else None)
    trunk.requires_grad_(trunk_mode == "full")
    if trunk_mode == "lora":
        trunk.add_lora(2, 2.0)
    with torch.no_grad():
        for p in train.trained_parameters(model):
            p += 0.05 * torch.randn(p.shape)
    return model


def compiled_at_four_lengths(size, n_layer, trunk_mode="frozen", path_mode="full", steps=None):
    """Forward and backward of the loss, compiled by block, against eager. Returns (breaks, graphs)."""
    model = trainable_pair(size, n_layer, trunk_mode, path_mode)
    eager, compiled = train.Loss(copy.deepcopy(model)), train.Loss(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(model, backend="aot_eager")
    c = config(x_dim=8, sigma=4.0)
    for B, S in ((3, 13), (3, 22), (5, 17), (3, 30)):
        idx, at, y, group = tokens(B, S, vocab=29), everywhere(B, S), tokens(B * S, seed=1, vocab=29), torch.ones(B).long()
        batch = (idx, at, y, group, *train.draw_inputs(c, model, group, len(y), train.make_generator("cpu", S))[:2], steps)
        want, got = pass_of(eager, batch), pass_of(compiled, batch)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*batch), eager(*batch), rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    return dict(counters["graph_break"]), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("size", [GPT2, LLAMA])
@pytest.mark.parametrize("trunk_mode, path_mode, steps, most", [
    ("frozen", "full", None, 5), ("frozen", "lora", None, 5), ("lora", "lora", None, 7), ("full", "none", None, 4),
    ("frozen", "full", 4, 3)])
def test_the_loss_compiled_by_block_has_no_breaks_and_few_graphs(size, trunk_mode, path_mode, steps, most):
    """The same losses and gradients as eager, at every length.

    A graph for each of trunk block, path block, and head with loss; and one more of each that has gradients,
    for validation. The first block of a trunk with LoRAs has one of its own, since its input has no gradient.
    Unrolled training reads all logits, so its head is not compiled.
    """
    breaks, graphs = compiled_at_four_lengths(size, 2, trunk_mode, path_mode, steps)
    assert breaks == {} and 1 <= graphs <= most, (breaks, graphs)


def test_more_layers_take_no_more_graphs():
    breaks, graphs = compiled_at_four_lengths(GPT2, 1)
    assert compiled_at_four_lengths(GPT2, 4) == (breaks, graphs) == ({}, 5)


def test_a_symbolic_is_causal_would_break_the_graph(monkeypatch):
    """What the test above is there to see: `mask is None and Q > 1` turns symbolic once Q varies."""
    import model as m

    def old(q, k, v, mask=None):
        B, T, C = q.shape
        q = q.view(B, T, k.size(1), -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return y.transpose(1, 2).reshape(B, T, C)
    monkeypatch.setattr(m, "attention", old)
    breaks, graphs = compiled_at_four_lengths(GPT2, 1)
    assert breaks and graphs > 5


@pytest.mark.parametrize("unroll", [0, 2])
def test_compile_on_trains_the_same_and_saves_the_same_names(options, tmp_path, monkeypatch, capsys, unroll):
    """By aot_eager, which traces as inductor does and is quick; tests/test_gpu.py has inductor."""
    compiled = []
    def quick(model):
        compiled.append(model)
        compile_blocks(model, backend="aot_eager")
    monkeypatch.setattr(train, "compile_blocks", quick)
    shared = options | dict(max_iters=3, batch_size=4, eval_examples=4, unroll=unroll)
    train.main(argv(**shared))
    assert compiled == [] and "compil" not in capsys.readouterr().out     # auto: not on a CPU
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train.main(argv(**shared | dict(out_dir=tmp_path / "compiled"), compile="on"))
    counters = torch._dynamo.utils.counters
    assert len(compiled) == 1 and counters["stats"]["unique_graphs"] and not counters["graph_break"]
    torch._dynamo.reset()
    said = capsys.readouterr().out
    assert said.index("compiling") < said.index("compiled; the first step ended after") < said.index("iter 1/3")
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "out"), rtol=1e-4)
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("compiled", "out"))
    assert a.keys() == b.keys()


# ------------------------------------------------------------------------------------------------- evaluation
class OneOf:
    """Stands in for Ranks: rank r of w, with the other ranks' sums handed in."""
    def __init__(self, rank, world, others=()):
        self.rank, self.world, self.device = rank, world, torch.device("cpu")
        self.others, self.own = others, None

    def sum(self, tensor):
        self.own = tensor.clone()
        for other in self.others:
            tensor += other
        return tensor


def one_by_one(model, data, ids, c):
    """Losses of the pair in each of 8 bins of t, and of the trunk: one example at a time, without padding."""
    bins, trunk_losses = [[] for _ in range(8)], []
    for start in range(0, len(ids), 32):
        chunk = ids[start:start + 32]
        _, _, y, group = load_batch(data, chunk, "cpu")
        t, x_0, _, _ = train.draw_inputs(c, model, group, len(y), train.make_generator("cpu", 1, 0, start))
        used = 0
        for i in chunk:
            here = slice(data.offsets[i], data.offsets[i + 1])
            row = torch.from_numpy(data.tokens[here].astype(np.int64))
            columns = torch.arange(len(row) - 1)[torch.from_numpy(data.mask[here][1:])]
            y, mine = row[columns + 1], slice(used, used + len(columns))
            used += len(columns)
            context = model.read_context(row[None, :-1], (torch.zeros_like(columns), columns))
            x_t = t[mine, None] * model.embed(y) + (1 - t[mine, None]) * x_0[mine]
            logits = model(x_t, t[mine], context, torch.full_like(y, model.no_group))       # without groups
            values = F.cross_entropy(logits, y, reduction="none").tolist()
            for b, loss in zip((t[mine] * 8).floor().int().tolist(), values):
                bins[b].append(loss)
            trunk_losses += F.cross_entropy(model.trunk.head(context.h), y, reduction="none").tolist()
        assert used == len(t)
    return bins, trunk_losses


def test_evaluation_is_the_mean_over_targets_in_each_bin_of_t(options, l2d):
    """Computed one target at a time; the same at every call and for every number of ranks."""
    c = config(**options | dict(eval_examples=70))                # three batches, the last not full
    model = pair_from(load_checkpoint(l2d / "last.pt"), "l2d").requires_grad_(False)
    run = SimpleNamespace(model=model, loss=train.Loss(model), val=load_split(options["data_dir"], "val"),
                          autocast=nullcontext())
    data = run.val
    call = lambda ranks: train.estimate_loss(run, c, ranks)
    alone, (bins, trunk_losses) = call(OneOf(0, 1)), one_by_one(model, data, range(70), c)
    assert alone["trunk_loss"] == pytest.approx(np.mean(trunk_losses), rel=1e-5)
    assert alone["val_loss"] == pytest.approx(np.mean(sum(bins, [])), rel=1e-5)
    assert alone["val_loss_by_t"] == pytest.approx([np.mean(b) for b in bins], abs=1e-4)
    assert alone["val_loss"] < alone["trunk_loss"] - 0.1 and len(set(alone["val_loss_by_t"])) == 8

    torch.manual_seed(123)
    assert call(OneOf(0, 1)) == alone
    ranks = [OneOf(rank, 2) for rank in range(2)]
    for one in ranks:
        call(one)
    counts = [int(one.own[0].sum()) for one in ranks]             # of the three sums, the targets
    assert sum(counts) == len(trunk_losses) > counts[0] > 0
    both = call(OneOf(0, 2, [ranks[1].own]))
    for name in ("val_loss", "trunk_loss"):
        assert both[name] == pytest.approx(alone[name], rel=1e-9)
    assert both["val_loss_by_t"] == alone["val_loss_by_t"]


def test_a_bin_without_a_target_is_null_not_nan(options):
    """One example can leave one empty; 0 / 0 is no JSON."""
    data = load_split(options["data_dir"], "val")
    n = int(data.mask[:data.offsets[1]].sum())
    def empty(seed):
        t = torch.rand(n, generator=train.make_generator("cpu", 1, seed, 0))
        return len(set((t * 8).int().tolist())) < 8
    seed = next(filter(empty, range(1000)))
    train.main(argv(**options, eval_examples=1, max_iters=3, seed=seed))
    assert len(evaluations(options["out_dir"])) == 2


# ------------------------------------------------------------------------------------------------------ trouble
def test_metrics_hold_a_line_for_every_report_and_evaluation(options):
    train.main(argv(**options, max_iters=20, eval_interval=10, log_interval=5))
    records = metrics(options["out_dir"])
    assert [(r["iter_num"], "loss" in r) for r in records] == [(0, False), (5, True), (10, True), (10, False),
                                                           (15, True), (20, True), (20, False)]
    for r in records:
        if "loss" in r:
            assert r["loss"] > 0 and r["lr"] == train.get_lr(r["iter_num"] - 1, config(**options, max_iters=20))
            assert r["tokens_per_second"] > 0
    best = load_checkpoint(options["out_dir"] / "best.pt")
    assert best["best_val_loss"] == min(r["val_loss"] for r in records if "val_loss" in r) and "optimizer" not in best


def test_best_is_the_best(options, monkeypatch):
    """best.pt stays at the lowest validation loss while last.pt goes on."""
    fake, evaluate = iter([3.0, 2.0, 2.5, 2.2]), train.estimate_loss
    monkeypatch.setattr(train, "estimate_loss", lambda *args: evaluate(*args) | {"val_loss": next(fake)})
    train.main(argv(**options, max_iters=6, eval_interval=2))
    best, last = (load_checkpoint(options["out_dir"] / f"{name}.pt") for name in ("best", "last"))
    assert (best["iter_num"], best["best_val_loss"], last["iter_num"], last["best_val_loss"]) == (2, 2.0, 6, 2.0)
    assert not torch.equal(best["model"]["path.W.weight"], last["model"]["path.W.weight"])


def bad_steps(monkeypatch, which, where):
    """nan in the loss or in one gradient, at these steps alone (the first is 0)."""
    forward, count = train.Loss.forward, iter(range(10 ** 6))

    def spoilt(self, *batch):
        losses = forward(self, *batch)
        if not torch.is_grad_enabled() or next(count) not in which:
            return losses
        if where == "loss":
            return losses * torch.where(torch.arange(len(losses)) == 3, torch.nan, 1.0)
        losses.register_hook(lambda grad: grad * torch.inf)
        return losses
    monkeypatch.setattr(train.Loss, "forward", spoilt)


@pytest.mark.parametrize("trunk_mode, dtype", [("frozen", "float32"), ("full", "float32"), ("frozen", "bfloat16")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_gradient_on_one_step_changes_nothing_and_is_survived(options, monkeypatch, where, trunk_mode, dtype):
    """Weights and optimizer before and after it, bit for bit; later steps train."""
    bad_steps(monkeypatch, {2, 4, 5}, where)
    states = []
    def kept(run, norm):
        moments = [{k: v.clone() for k, v in run.optimizer.state[p].items()} for p in train.trained_parameters(run.model)]
        states.append(({k: v.clone() for k, v in run.model.state_dict().items()}, moments, math.isfinite(norm)))
    run_of(8, options, each=kept, trunk_mode=trunk_mode, dtype=dtype)
    assert [finite for *_, finite in states] == [True, True, False, True, False, False, True, True]
    for step, (weights, moments, finite) in enumerate(states[1:], 1):
        same = same_tensors(weights, states[step - 1][0]) and same_tensors(moments, states[step - 1][1])
        assert same == (not finite)
    records = metrics(options["out_dir"])                         # strict JSON: null where it was not finite
    assert [r["grad_norm"] is None for r in records if "loss" in r] == [not f for *_, f in states]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_five_bad_gradients_in_a_row_stop_with_a_line_and_nothing_is_spoilt(options, monkeypatch, where):
    bad_steps(monkeypatch, {6, 7, 8, 9, 10}, where)
    message = error_of(train.main, argv(**options, eval_interval=4))
    says(message, "iteration 11 and the 4 before", "not finite", "last.pt holds iteration 8", "learning_rate")
    assert ("the gradient of" in message) == (where != "loss")
    for name in ("last", "previous", "best"):
        checkpoint = load_checkpoint(options["out_dir"] / f"{name}.pt")
        assert all(w.isfinite().all() for w in checkpoint["model"].values()) and math.isfinite(checkpoint["best_val_loss"])
    assert load_checkpoint(options["out_dir"] / "last.pt")["iter_num"] == 8
    assert all(z.isfinite().all() for s in load_checkpoint(options["out_dir"] / "last.pt")["optimizer"]["state"].values()
               for z in s.values())


def test_a_learning_rate_that_diverges_never_saves_what_is_not_finite(options):
    with pytest.raises(UserError, match="not finite|validation loss is"):
        train.main(argv(**options, trunk_mode="full", path_mode="none", learning_rate=1e9, grad_clip=0, eval_interval=1))
    checkpoint = load_checkpoint(options["out_dir"] / "last.pt")
    assert all(w.isfinite().all() for w in checkpoint["model"].values())
    assert math.isfinite(checkpoint["best_val_loss"]) and metrics(options["out_dir"])


def test_float16_skips_the_steps_that_overflow(options, monkeypatch):
    """Their norm is infinite, which is no JSON. The weights stay."""
    GradScaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: GradScaler(device, 2.0 ** 60, enabled=enabled))
    train.main(argv(**options, dtype="float16", max_iters=4, trunk_mode="full", path_mode="none"))
    after = load_checkpoint(options["out_dir"] / "last.pt")["model"]
    assert same_tensors(after, load_checkpoint(options["trunk"])["model"])
    assert len(losses(options["out_dir"])) == 4
