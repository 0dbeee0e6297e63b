"""bench/: counts against modules and torch's own counters, the share of drafts that is set, a tiny run of all."""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, error_of, says
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as script
from bench import decoding, gpu_report, memory, targets, timing
from bench.__main__ import Config
from bench.compact_json import format_json
from bench.costs import count_parameters, count_pass, count_passes, least_seconds
from bench.decoding import write
from bench.gpu_report import count_kernels
from bench.memory import Meter, step_bytes
from bench.models import MODES, SIZES, Trainee, random_pair
from bench.timing import time_by_turns
from bench.training import count_flops, random_batch
from decode import DecodingConfig
from model import Context, PathConfig
from plumbing.dataset import load_batch

CPU = torch.device("cpu")
TINY = SIZES["tiny"]
COUNTED = dict(zip(MODES, ("trunk", "trunk_lora", "l2d_full_path", "l2d_lora_path")))


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    monkeypatch.setattr(timing, "PROBE_CALLS", 1)


def numel(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def tiny_batch():
    data, ids = random_batch(Config(model="tiny", train_batch=2))
    return load_batch(data, ids, CPU)


# --------------------------------------------------------------------------------------------- counted
def test_known_numbers_of_gpt2():
    n = count_parameters(SIZES["gpt2"], PathConfig())
    assert n["trunk"] == 124_439_808
    shown = [f"{x / 1e6:.2f}" for x in (n["l2d_lora_path"] - 256, n["path_lora"], n["modulation"])]
    assert shown == ["19.98", "4.13", "15.00"]                    # without the group
    cost = count_pass(SIZES["gpt2"], PathConfig(), 80)
    assert cost["trunk"]["kv"] == 80 * 12 * 2 * 768
    weights = {part: cost[part]["weights"] for part in cost}
    floor = 1 + 15 * (weights["path"] + weights["head"]) / (weights["trunk"] + weights["head"])
    assert f"{floor:.1f}" == "14.3"                               # T = 16 where reading weights is all


@pytest.mark.parametrize("name", SIZES)
def test_formulas_count_the_parameters_of_the_modules(name):
    n = count_parameters(SIZES[name], PathConfig())
    with torch.device("meta"):                                    # shapes without memory
        model = random_pair(SIZES[name], "frozen", "full")
        lora = random_pair(SIZES[name], "frozen", "lora")
        trunk_lora = random_pair(SIZES[name], "lora", "none")
    trunk, path = model.trunk, model.path
    modulations = [block.modulation for block in path.h]
    assert n == {
        "trunk": numel(trunk), "trunk_blocks": numel(trunk.h), "head": numel(trunk.wte),
        "modulation": numel(*modulations), "path_blocks": numel(path.h) - numel(*modulations),
        "W": numel(path.W), "x_in": numel(path.x_in), "t_in_group_w": numel(path.t_in, path.group, path.w),
        "l2d_full_path": numel(path), "l2d_lora_path": numel(lora.path),
        "path_lora": numel(lora.path.h) - numel(*modulations), "trunk_lora": numel(trunk_lora) - numel(trunk)}


@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
@pytest.mark.parametrize("path_mode", ["full", "lora"])
def test_a_pass_costs_what_torch_counts(path_mode, name):
    S = 24
    model = random_pair(SIZES[name], "frozen", path_mode).requires_grad_(False)
    trunk, path = model.trunk, model.path
    cost = count_pass(SIZES[name], path.config, S)
    cache = trunk(torch.zeros(1, S, dtype=torch.long))[1]
    pos = torch.tensor([S - 1])
    mask = torch.ones(1, 1, 1, S, dtype=torch.bool)
    group = torch.tensor([0])
    t = torch.tensor([0.5])
    condition = path.condition(t, group)
    c = Context(torch.zeros(1, 64), torch.tensor([3]), pos, cache, None, mask)

    def flops(f):
        with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()
    assert flops(lambda: trunk(torch.tensor([[3]]), pos[:, None], cache, mask)) == cost["trunk"]["flops"]
    assert flops(lambda: trunk.head(torch.zeros(1, 64))) == cost["head"]["flops"]
    one_call = flops(lambda: model(torch.zeros(1, 256), t, c, group, condition))
    assert one_call == cost["path"]["flops"] + cost["head"]["flops"]

    used = numel(path.x_in, path.h) - numel(*(block.modulation for block in path.h))
    if path_mode == "lora":                                       # no keys and values
        attns = [block.attn for block in trunk.h]
        none = [z for attn in attns for z in ((attn.c_k, attn.c_v) if name == "tiny-llama" else (attn.c_attn,))]
        used += numel(trunk.h) - numel(*none) * (1 if name == "tiny-llama" else 2) // (1 if name == "tiny-llama" else 3)
    assert [cost[part]["weights"] for part in cost] == [numel(trunk.h), used, numel(trunk.wte)]
    assert cost["path"]["kv"] == cost["trunk"]["kv"] == sum(z.numel() for pair in cache for z in pair)


def test_passes_are_counted_and_cost_bytes_or_flops_whichever_is_slower():
    model = random_pair(TINY, "frozen", "full").requires_grad_(False)
    config = DecodingConfig(steps=3, max_new_tokens=5, draft=0, ahead=0)
    passes, out = count_passes(model, lambda: write(model, [[1, 2, 3], [4, 5, 6]], 2, -1, config))
    assert passes == {("trunk", 6, 2): 1, ("trunk", 2, 2): 4, ("head", 2, 0): 15, ("path", 2, 2): 10}
    assert [o.predicted for o in out] == [5, 5]
    assert not any(m._forward_hooks for m in model.modules())
    cost = {"trunk": {"flops": 7, "weights": 100, "kv": 10}, "head": {"flops": 1, "weights": 50, "kv": 0}}
    few = {("trunk", 4, 2): 3, ("head", 4, 0): 2}
    assert least_seconds(cost, few, 4, 1.0, math.inf) == 4 * (3 * 120 + 2 * 50)
    assert least_seconds(cost, few, 4, math.inf, 1.0) == 3 * 28 + 2 * 4
    assert least_seconds(cost, few, 4, 4.0, 0.1) == 3 * 280 + 2 * 50      # 280 against 120; 40 against 50


# ------------------------------------------------------------------------------------------- measuring
def test_variants_take_turns():
    order = []
    variants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds, peak = time_by_turns(variants, 3, CPU, "turns")
    assert "".join(order) == "abccbaabc" and not peak
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_attention_kernels_are_counted():
    q = torch.randn(1, 2, 8, 4)
    with sdpa_kernel([SDPBackend.MATH]):
        found = count_kernels(lambda: F.scaled_dot_product_attention(q, q, q))
    assert found == {"aten::_scaled_dot_product_attention_math": 1}
    twice = count_kernels(lambda: [F.scaled_dot_product_attention(q, q, q) for _ in range(2)])
    assert twice == {"aten::_scaled_dot_product_flash_attention_for_cpu": 2}


# -------------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_the_share_of_drafts_is_set_and_no_speculation_or_steps_changes_the_text(share):
    model = random_pair(TINY, "frozen", "full", path_init="paper").requires_grad_(False)
    prompts, n = [[5, 6], [7], [8, 9, 10]], 60

    def texts(batch=2, share=share, **options):
        return write(model, prompts, batch, -1, DecodingConfig(max_new_tokens=n, **options), share)

    def tokens(out):
        return [o.tokens for o in out]
    plain = tokens(texts(steps=1))
    for steps, draft, ahead in ((4, 0, 0), (4, 5, 0), (2, 16, 0), (4, 0, 8), (4, 5, 8)):
        out = texts(steps=steps, draft=draft, ahead=ahead)
        assert tokens(out) == plain
        if draft:
            kept = 1 - sum(len(o.rejected) for o in out) / (len(prompts) * n)
            assert kept == pytest.approx(share, abs=0.12)
    assert (tokens(texts(steps=1, share=1.0)) == plain) == (share == 1)
    assert tokens(texts(batch=1, steps=4)) == plain               # a row changes alike in every batch


# -------------------------------------------------------------------------------------------- training
def test_batch_has_the_shape_of_gsm8k():
    data, ids = random_batch(Config(train_batch=16))
    lengths = np.diff(data.offsets)
    assert lengths.mean() == pytest.approx(156, abs=8)
    assert np.quantile(lengths, 0.99) == pytest.approx(321, abs=40)
    assert lengths[ids].mean() == pytest.approx(156, abs=15)
    idx, _, y, _ = load_batch(data, ids, CPU)
    assert 1 - (lengths[ids] - 1).sum() / idx.numel() < 0.1       # padding
    assert 0.4 < len(y) / idx.numel() < 0.8
    again, ids_again = random_batch(Config(train_batch=16))
    assert (again.tokens == data.tokens).all() and (ids_again == ids).all()


@pytest.mark.parametrize("name", MODES)
def test_a_step_trains_what_it_should(name):
    trainee = Trainee(random_pair(TINY, *MODES[name]), tiny_batch(), torch.float32)
    before = {key: p.clone() for key, p in trainee.model.named_parameters()}
    n_flops = count_flops(trainee, CPU)
    changed = {key for key, p in trainee.model.named_parameters() if not torch.equal(p, before[key])}
    trained = {key: p for key, p in trainee.model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count_parameters(TINY, PathConfig())[COUNTED[name]]
    assert changed and changed <= trained.keys()
    if name == "full finetuning":                                 # forward, and twice that for gradients
        idx, _, y, _ = trainee.batch
        (B, S), C, L = idx.shape, TINY.n_embd, TINY.n_layer
        products = 2 * B * S * L * 12 * C * C + 4 * B * L * S * S * C + 2 * len(y) * TINY.vocab_size * C
        assert n_flops == 3 * products


# ---------------------------------------------------------------------------------------------- memory
def test_the_meter_sees_what_is_alive_and_no_more():
    with Meter() as meter:
        x = torch.zeros(1000)                                     # 4,000 bytes
        y = x.view(10, 100)[:5]                                   # no storage of its own
        z = x + 1
        assert meter.now == meter.peak == 8000
        del z
        w = torch.zeros(500)
        assert (meter.now, meter.peak) == (6000, 8000)
        del x
        assert meter.now == 6000 and len(y) == 5                  # y keeps it
        del y
    assert meter.now == 2000 == w.nbytes


@pytest.mark.parametrize("name", MODES)
def test_fake_bytes_are_those_of_a_real_step(name):
    """Against torch.profiler's record of every allocation of a real step on the CPU: an independent count."""
    idx, at, y, group = batch = tiny_batch()
    stays, (peak,) = step_bytes(TINY, name, [(*idx.shape, len(y))], torch.float32)
    trainee = Trainee(random_pair(TINY, *MODES[name]), batch, torch.float32)
    trainee.step()
    assert stays == pytest.approx(trainee.state_bytes(), rel=0.001)       # the optimizer counts its steps
    given = sum(z.nbytes for z in (idx, *at, y, group))
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=cpu) as profile:
        trainee.step()
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda e: e.start_ns())
    real = trainee.state_bytes() + given + np.cumsum([e.nbytes() for e in events]).max()
    assert peak == pytest.approx(real, rel=0.02)


def test_memory_of_gpt2_by_hand():
    """A parameter that trains takes 12 bytes that stay, a frozen one 4. Logits are there at least three times: in
    bfloat16, in float32, and as log-probabilities."""
    size = SIZES["gpt2"]
    n = count_parameters(size, PathConfig())
    stays, (small, large) = step_bytes(size, "L2D, full path", [(4, 159, 4 * 96), (8, 159, 8 * 96)])
    assert stays == pytest.approx(4 * n["trunk"] + 12 * n["l2d_full_path"], rel=0.001)
    assert large - stays > 8 * 96 * 50257 * (2 + 4 + 4)
    assert 1.5 < (large - stays) / (small - stays) < 2


def test_docs_memory_is_what_memory_py_writes():
    """By two of its rows, and all of its text."""
    written = memory.format_page({"gpt2": SIZES["gpt2"]}, ["L2D, full path"])
    lines = (Path(script.__file__).parent.parent / "docs/MEMORY.md").read_text().splitlines()
    assert written.count("| gpt2 |") == 2 and all(line in lines for line in written.splitlines())


def test_the_table_says_what_fits(monkeypatch):
    found = {(32, 159): 2e9, (32, 422): 20e9, (8, 422): 7e9, (2, 422): 1e9, (32, 438): 7.1e9}
    def fake(size, mode, shapes):
        assert all(n_targets == n * (96 if length == 159 else 228) for n, length, n_targets in shapes[:4])
        return 5e8, [found[n, length] for n, length, *_ in shapes]
    monkeypatch.setattr(memory, "step_bytes", fake)
    text = memory.format_page({"gpt2": None}, ["L2D, full path"])
    assert "| gpt2 | L2D, full path | 0.5 | 2.0 | 20.0 | 7.0 | 1.0 | 7.1 |" in text
    assert "| gpt2 | L2D, full path | 4 | 4 | 1 | 1 |" in text    # 7.1 < 7.2, 20 < 21.6
    found[32, 438] = 7.3e9                                        # validation alone is too much
    assert "| gpt2 | L2D, full path | - | 4 | 1 | 1 |" in memory.format_page({"gpt2": None}, ["L2D, full path"])


@pytest.mark.parametrize("mode, counted", [("L2D, full path", "l2d_full_path"), ("L2D, LoRA path", "l2d_lora_path")])
def test_a_frozen_trunk_of_llamas_type_stays_in_two_bytes_and_a_path_in_twelve(mode, counted):
    n = count_parameters(SIZES["tiny-llama"], PathConfig())
    table = 1024 * 16                                             # of rotary positions
    for dtype, n_bytes in ((torch.bfloat16, 2), (torch.float32, 4)):
        stays, _ = step_bytes(SIZES["tiny-llama"], mode, [(2, 20, 20)], dtype)
        expected = n_bytes * (n["trunk"] + table) + 12 * n[counted]
        assert abs(stays - expected) < 2000                       # AdamW's step counters


def test_a_batch_without_gradients_takes_less():
    _, (trains, validates) = step_bytes(TINY, "L2D, full path", [(4, 30, 40), (4, 30, 40, "validation")])
    assert 0 < validates < trains


# ------------------------------------------------------------------------------------------ end to end
def run_main(tmp_path, *options):
    out = tmp_path / "deep" / "bench.json"
    script.main(["--model=tiny", "--prompt=5", "--new_tokens=6", "--repeats=2", f"--out={out}", "--device=cpu",
                 "--train_batch=2", "--train_prompt=6", "--train_answer=9", *options])
    return json.loads(out.read_text())


def test_decoding_from_end_to_end(tmp_path, capsys):
    pytest.importorskip("transformers")
    result = run_main(tmp_path, "--steps=4", "--batch=1,2", "--draft=0,4", "--ahead=0", "--acceptance=0.5,1",
                      "--baseline")
    assert {"config", "parameters", "decode", "commit", "machine", "threads", "torch"} <= result.keys()
    assert list(result["decode"]) == ["1", "2"] and "train" not in result
    for batch, r in result["decode"].items():
        rows, s = r["rows"], r["seconds"]
        assert list(rows) == ["plain", "T=4, no drafts", "T=4, drafts up to 4, 50% kept",
                              "T=4, drafts up to 4, 100% kept", "transformers"]
        assert all(row["same"] for row in rows.values())
        row, all_kept = rows["T=4, no drafts"], rows["T=4, drafts up to 4, 100% kept"]
        assert [rows["plain"]["NFE"], row["NFE"], all_kept["NFE"], all_kept["computed"]] == [0, 3, 3, 3]
        assert row["a round"] == 1 and all_kept["a round"] > 2 and rows["transformers"]["a round"] is None
        assert rows["T=4, drafts up to 4, 50% kept"]["computed"] > 3
        ratios = np.divide(s["T=4, no drafts"], s["plain"])
        assert row["x plain"]["median"] == pytest.approx(np.median(ratios))
        assert row["x plain"]["max"] == pytest.approx(max(ratios))
        assert row["tokens/s"]["max"] == pytest.approx(int(batch) * 6 / min(s["T=4, no drafts"]))
        assert all(0 < r["floor"]["min"] <= r["floor"]["max"] for r in rows.values())
        assert set(s) == set(rows) | {"copy", "matvec", "matmul"} and all(len(x) == 2 for x in s.values())
    assert "50% kept" in capsys.readouterr().out


def test_looking_ahead_takes_one_call_unless_the_guess_changes(tmp_path):
    """Random weights whose guess stays: one call for T - 1 evaluations, and one more for each change."""
    result = run_main(tmp_path, "--steps=5", "--batch=1", "--draft=0", "--ahead=0,9", "--changes=0,1")
    rows = result["decode"]["1"]["rows"]
    assert [rows[f"T=5, no drafts{more}"]["passes"] for more in ("", ", 100% changing")] == [4, 4]
    stays, changes = (rows[f"T=5, no drafts, ahead up to 9{more}"] for more in ("", ", 100% changing"))
    assert stays["passes"] <= 4 and stays["NFE"] == changes["NFE"] == stays["computed"] == 4
    assert all(row["same"] for row in rows.values())


def test_decoding_of_a_trained_run(l2d, tmp_path):
    """Its own prompts and its own drafts, with and without --stop."""
    result = run_main(tmp_path, f"--out_dir={l2d}", "--steps=1,4", "--batch=2", "--texts=3", "--draft=0,4", "--stop=0.5",
                      "--ahead=0")
    rows = result["decode"]["2"]["rows"]
    assert list(rows) == ["plain", "T=4, no drafts", "T=4, drafts up to 4", "T=4, no drafts, stop=0.5",
                          "T=4, drafts up to 4, stop=0.5"]
    assert all(row["same"] for row in rows.values()) and rows["T=4, no drafts"]["NFE"] == 3


def test_the_report_for_a_gpu_in_its_small_form(tmp_path, capfd):
    """All of it, on the CPU: checks, timings, and the order of their importance."""
    result = run_main(tmp_path, "--gpu_report", "--repeats=1", "--time_limit=600")
    assert all(passed for passed, _ in result["checks"].values()), result["checks"]
    names = " ".join(result["checks"])
    assert all(word in names for word in ("logits", "T = 1", "compiled", "drafts", "attention", "ranks"))
    assert "0 breaks" in result["checks"]["compiled"][1] and result["not_reached"] == []
    assert list(result["seconds_of"]) == list(gpu_report.ITEMS)
    row = result["training"]["eager"]
    assert row["first step, s"] > 0 and row["ms"]["min"] > 0 and row["GB of a step"] is None
    for n in (1, 4):
        rows = result[f"decoding {n}"]
        assert {name.partition(", graphs")[0] for name in rows} == {"T = 1", "T = 16", "T = 16, drafts, 95% kept"}
        assert all(row["tokens"] == n * 6 for row in rows.values())
        assert rows["T = 1, graphs off"]["x as fast"] == {"median": 1, "min": 1, "max": 1}
    r = result["train"]
    assert list(r["rows"]) == list(MODES) and r["examples"] == 2 and 0 < r["targets"] < r["tokens"]
    for name, row in r["rows"].items():
        assert row["tokens/s"]["max"] == pytest.approx(r["tokens"] / min(r["seconds"][name]))
        assert 0 < row["stays"] < row["peak"] and row["measured"] is None and row["matmul"]["min"] > 0
    assert r["rows"]["full finetuning"]["x full"] == {"median": 1, "min": 1, "max": 1}
    printed = capfd.readouterr().out
    order = [printed.index(text) for text in ("ok     logits", "ok     drafts", "training tiny, L2D", "batch 1", "ok     ranks")]
    assert order == sorted(order) and "not reached" not in printed


# Items of a report, for the process that runs them
def passes(config, device, dtype):
    yield "passes", True, "well"
    yield "measured", None, {"a": 1}


def hangs(config, device, dtype):
    yield "half", True, "of it"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    subprocess.Popen(["sleep", "1043"])                           # what it has started must end with it
    while True:
        pass


def dies(config, device, dtype):
    yield "begun", True, "-"
    os._exit(7)


def raises(config, device, dtype):
    yield "off", False, "by far"
    raise ValueError("no such kernel")


def reads(config, device, dtype):
    yield "reads", True, " ".join(json.loads(Path(config.out).read_text())["checks"])


def report(tmp_path, limit, **items):
    config = dataclasses.replace(Config(), device="cpu", out=str(tmp_path / "r.json"), time_limit=limit)
    result = {"parameters": {}}
    gpu_report.run_report(config, result, items)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(result))
    return result


def test_an_item_that_hangs_or_fails_does_not_take_the_rest_with_it(tmp_path, capsys):
    """And the file holds at every moment what has ended before."""
    items = dict(passes=(passes, 60), hangs=(hangs, 15), dies=(dies, 60), raises=(raises, 60), reads=(reads, 60))
    result = report(tmp_path, 300, **items)
    checks = result["checks"]
    assert checks["half"] == (True, "of it") and checks["hangs"] == (False, "no end within 15 s")
    assert checks["dies"] == (False, "its process ended with status 7") and checks["off"] == (False, "by far")
    passed, found = checks["raises"]
    assert not passed and found.endswith("ValueError: no such kernel")
    assert checks["reads"] == (True, "passes half hangs begun dies off raises") and result["measured"] == {"a": 1}
    assert result["not_reached"] == [] and list(result["seconds_of"]) == list(items)
    assert 15 <= result["seconds_of"]["hangs"] < 25
    left = subprocess.run(["pgrep", "-f", "^sleep 1043$"], capture_output=True, text=True).stdout
    assert left == "" and "FAILED hangs: no end within 15 s" in capsys.readouterr().out


def test_what_is_not_reached_is_listed(tmp_path, capsys):
    result = report(tmp_path, 20, passes=(passes, 60), hangs=(hangs, 60), reads=(reads, 60))
    assert result["not_reached"] == ["hangs", "reads"] and list(result["seconds_of"]) == ["passes"]
    assert "not reached within 20 s: hangs, reads" in capsys.readouterr().out


def test_one_item_alone(tmp_path):
    result = run_main(tmp_path, "--gpu_report", "--only=logits")
    assert list(result["seconds_of"]) == ["logits"] and result["not_reached"] == [] and "train" not in result
    says(error_of(run_main, tmp_path, "--only=logits"), "only=logits", "--gpu_report")
    says(error_of(run_main, tmp_path, "--gpu_report", "--only=speed"), "only='speed'", "logits, compiled")


def test_a_check_that_fails_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "run_report", lambda config, result, items: result.update(checks={"ranks": (False, "off")}))
    says(error_of(run_main, tmp_path, "--gpu_report"), "check ranks")


def test_tokens_that_differ_are_an_error(tmp_path, monkeypatch):
    real = decoding.write
    def wrong(model, prompts, batch, eot, config, *args):
        out = real(model, prompts, batch, eot, config, *args)
        return [dataclasses.replace(o, tokens=[0] + o.tokens) for o in out] if config.steps == 2 else out
    monkeypatch.setattr(decoding, "write", wrong)
    message = error_of(run_main, tmp_path, "--steps=2,3", "--batch=1", "--draft=0", "--ahead=0")
    assert "T=2, no drafts at batch 1" in message and "T=3" not in message
    assert json.loads((tmp_path / "deep" / "bench.json").read_text())["decode"]


@pytest.mark.parametrize("option, expected", [
    ("--steps=1,x", "numbers from 1 to"), ("--steps=", "numbers from 1 to"), ("--steps=0", "numbers from 1 to"),
    ("--draft=-1", "numbers from 0 to"), ("--acceptance=1.5", "numbers from 0 to 1"),
    ("--acceptance=nan", "numbers from 0 to 1"), ("--stop=-1", "stop=-1.0"), ("--train_answer=1000", "1060"),
    ("--prompt=1020", "1068, but tiny has 1024 positions"), ("--out=/dev/null/x.json", "/dev/null/x.json"),
    ("--out_dir=/nowhere", "/nowhere/best.pt"), ("--decode=False", "nothing to measure")])
def test_bad_options_give_one_line_and_change_no_file(option, expected, tmp_path):
    good = tmp_path / "bench.json"
    good.write_text('{"parameters": 1}')
    says(error_of(script.main, ["--model=tiny", f"--out={good}", option]), expected)
    assert good.read_text() == '{"parameters": 1}' and [*tmp_path.iterdir()] == [good]


def test_a_file_of_somebody_else_is_not_written_over(tmp_path):
    for text in ("precious", "[]", '{"mine": 1}'):
        (tmp_path / "x").write_text(text)
        says(error_of(script.main, ["--model=tiny", f"--out={tmp_path / 'x'}"]), "was not written by python -m bench")
        assert (tmp_path / "x").read_text() == text


# ------------------------------------------------------------------------------------ bench/on_a_gpu.sh
def test_the_table_of_targets_says_what_was_met_missed_and_not_reached(tmp_path):
    def row(ms, speed, fast):
        return {"ms a token": {"median": ms}, "tokens/s": {"median": speed}, "x as fast": {"median": fast}, "x needed": 1.2}
    report = {"checks": {"graphs, drafts up to 0": [True, ""], "graphs, drafts up to 8": [False, ""]},
              "decoding 1": {"T = 1, graphs on": row(1, 900, 6.5), "T = 16, graphs on": row(4.5, 220, 3),
                             "transformers, T = 1": {"tokens/s": {"median": 100}}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "train.log").write_text("3 compiling: the first step takes longer\n41 compiled; the first step ended after 33 s\n")
    (tmp_path / "evaluate.log").write_text("9 batch_size=128: a text takes up to 9 MB, and 70.0 GB are free\n")
    (tmp_path / "tests.log").write_text("80 FAILED tests/test_gpu.py::test_a\n80 1 failed, 4 passed in 70.1s\n")
    rows = targets.make_rows(targets.read_results(tmp_path))
    found = {name: (row["measured"], row[""]) for name, row in rows.items() if row["measured"] != "not reached"}
    assert found == {"T = 1, as fast as eager": (6.5, "yes"), "T = 1, as fast as transformers": (9, "yes"),
                     "T = 16, no drafts, ms a token": (4.5, "NO"), "texts the same with graphs, float32, share": (0.5, "NO"),
                     "train.py, first step after, s": (41, "yes"), "evaluate.py, chosen batch": (128, "yes"),
                     "tests/test_gpu.py, failed": (1, "NO")}
    assert len(rows) - len(found) == 4


def test_the_script_for_a_gpu_ends_with_its_table_whatever_fails(tmp_path):
    """Each part within its time, and the names of the rows are those of the report. Here no part ends well."""
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
case "$*" in
    *bench.targets*) exec {sys.executable} "$@";;
    *train.py*) sleep 100;;
    *) echo "line of $2"; exit 3;;
esac
""")
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "LIMIT": "15", "DEVICE": "cpu", "MODEL": "tiny"}
    done = subprocess.run(["bash", "bench/on_a_gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    printed = done.stdout
    assert "== report: status 3" in printed and "== train: status 124" in printed
    assert printed.index("== evaluate: not reached") < printed.index("== rest: not reached") < printed.index("no report")
    assert printed.count("not reached") == 3 + len(targets.TARGETS)
    assert (tmp_path / "out" / "report.log").read_text().endswith(" line of bench\n")


# ------------------------------------------------------------------------------------------------ JSON
def test_compact_json_is_the_same_json_with_one_row_a_line():
    value = {"name": "x ± y", "empty": {}, 3: None, "settings": {"a": 1},
             "groups": {"g": {"n": 0.1, "rows": [{"T": 1, "all": [1e-30, 2]}, {"T": 2, "all": [True, []]}]}}}
    for levels in range(6):
        assert json.loads(format_json(value, levels)) == json.loads(json.dumps(value))
    assert format_json(value, 0) == json.dumps(value)
    lines = [line.strip() for line in format_json(value, 4).splitlines()]
    assert '{"T": 1, "all": [1e-30, 2]},' in lines and '"settings": {"a": 1},' in lines
    assert format_json(value, 9).count("\n") > format_json(value, 4).count("\n")
