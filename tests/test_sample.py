"""sample.py: what it prints, against the trunk run by hand and against counted calls of the path."""
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, error_of, says, script

import sample
import speculate
from decode import Continuation, DecodingConfig
from model import DiffusionPath
from plumbing.checkpoint import load_checkpoint, pair_from
from plumbing.trace import format_trace
from plumbing.trained import load
from speculate import generate

PROMPT = "Tom has 3 apples. Then he buys 4 more. How many apples does Tom have now?"


@pytest.fixture
def run(wild, capsys):
    """main on the random pair: (the samples, the last line)."""
    def call(*args, out_dir=wild, n=24):
        capsys.readouterr()
        sample.main([f"--out_dir={out_dir}", f"--prompt={PROMPT}", f"--max_new_tokens={n}", *args])
        *head, last, empty = capsys.readouterr().out.split("\n")
        assert empty == "" and last.startswith("--- steps=")
        return re.split(r"(?:^|\n)--- sample \d+ of \d+\n", "\n".join(head))[1:], last
    return call


def numbers(last):
    """Of the last line: tokens, NFE, path calls computed per token, tokens a round, tokens/s."""
    found = re.search(r": (\d+) tokens, NFE (\d+\.\d+) path calls per token \((\d+\.\d+) computed, (\d+\.\d) tokens "
                      r"per round\), (\d+\.\d) tokens/s$", last)
    return int(found[1]), *(float(x) for x in found.groups()[1:])


def logits_by_hand(gpt, ids):
    """Of the next token after ids: one plain pass over all of them, no cache."""
    with torch.no_grad():
        return gpt.head(gpt(torch.tensor([ids]))[0][0, -1])


def greedy_by_hand(gpt, ids, n, eot):
    new = []
    while len(new) < n and (y := logits_by_hand(gpt, ids + new).argmax().item()) != eot:
        new.append(y)
    return new


@pytest.fixture
def prompt(encoding):
    return encoding.encode_ordinary(f"Question: {PROMPT}\nAnswer:")


def test_one_step_is_the_trunk(run, wild, encoding, prompt):
    """steps=1 writes the argmax of the trunk's own forward; more steps write something else."""
    gpt = pair_from(load_checkpoint(wild / "best.pt"), "wild").trunk
    want = greedy_by_hand(gpt, prompt, 24, encoding.eot_token)
    (text,), last = run("--steps=1")
    assert text == encoding.decode(prompt + want) + "  [cut: no end of text]"
    assert last.startswith("--- steps=1 euler: 24 tokens, NFE 0.00") and len(set(want)) > 5
    (other,), _ = run("--steps=8")
    assert other != text                                          # so the equality above says something


def test_one_step_is_the_checkpoint_of_the_trunk(run, trunk, l2d, encoding, prompt):
    """Training a path beside a trunk leaves what the trunk writes as it was."""
    gpt = pair_from(load_checkpoint(trunk / "last.pt"), "trunk").trunk
    logits = logits_by_hand(gpt, prompt)
    sampled = ("--steps=1", "--num_samples=8", "--temperature=1")
    texts = [run(*sampled, out_dir=out_dir)[0] for out_dir in (l2d, trunk)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 8
    first = greedy_by_hand(gpt, prompt, 1, encoding.eot_token)
    assert run("--steps=1", out_dir=l2d, n=1)[0][0].startswith(encoding.decode(prompt + first))
    assert torch.equal(logits_by_hand(load(str(l2d))[0].trunk, prompt), logits)


@pytest.fixture
def calls(monkeypatch):
    """Positions of each call of the path."""
    calls, forward = [], DiffusionPath.forward
    def counted(self, x_t, *rest):
        calls.append(len(x_t))
        return forward(self, x_t, *rest)
    monkeypatch.setattr(DiffusionPath, "forward", counted)
    costs = 1.0, [(1, 1.0), (16, 1.5), (64, 4.0)], 0.001          # measuring them would call the path, too
    monkeypatch.setattr(speculate, "measure_costs", lambda model, rows: costs)
    return calls


@pytest.mark.parametrize("args, nfe", [
    *[([f"--solver={solver}", f"--steps={T}"], T - 1) for solver in ("euler", "midpoint", "fixed_point") for T in (2, 6)],
    (["--guidance=2", "--group=2 steps", "--steps=4"], 2 * 2 + 1),    # the last is read with the group alone
    (["--t_end=1", "--solver=midpoint", "--steps=5"], 4), (["--guess=mean", "--solver=fixed_point", "--t_hold=.6", "--t_end=.8", "--steps=5"], 4)])
def test_nfe_counts_the_path_calls_of_the_tokens_kept(args, nfe, run, calls):
    """Without drafts all that are made; with them as many, and what was computed is said beside."""
    (text,), last = run(*args, "--draft=0", "--ahead=0", n=6)
    tokens, said, computed, a_round, speed = numbers(last)
    assert said == computed == nfe and sum(calls) == nfe * tokens and (tokens, a_round) == (6, 1) and speed > 0
    for speculation in ("--ahead=0", "--draft=0", "--ahead=3"):
        calls.clear()
        (other,), last = run(*args, speculation, n=6)
        tokens, said, computed, a_round, _ = numbers(last)
        assert other == text and said == nfe and sum(calls) / tokens == pytest.approx(computed, abs=0.006)


def test_the_adaptive_solver_counts_its_calls(run, calls):
    _, last = run("--solver=adaptive", "--steps=12", "--tol=0.5", "--draft=0", "--ahead=0")
    tokens, nfe, computed, _, _ = numbers(last)
    assert abs(sum(calls) / tokens - nfe) < 0.006 and 1 <= nfe <= 11 and computed == nfe


def test_samples_depend_on_the_seed_alone(run, monkeypatch):
    args = ["--num_samples=3", "--temperature=1", "--steps=3"]
    texts, last = run(*args, "--seed=5")
    assert len(set(texts)) == 3 and all(text.startswith(f"Question: {PROMPT}\nAnswer:") for text in texts)
    assert run(*args, "--seed=5")[0] == texts
    assert not set(run(*args, "--seed=6")[0]) & set(texts)
    assert run("--num_samples=2", *args[1:], "--seed=5")[0] == texts[:2]      # not on how many follow
    monkeypatch.setattr(sample, "MOST_ROWS", 2)
    assert run(*args, "--seed=5")[0] == texts                     # nor on how many are written side by side
    greedy, _ = run("--num_samples=3", "--steps=1")
    assert len(set(greedy)) == 1
    assert run("--temperature=1", "--top_k=1", "--steps=1")[0] == greedy[:1]
    run("--steps=2", f"--seed={10 ** 15}", n=2)                   # its product with a prime leaves 64 bits


def test_top_k_and_temperature_bound_the_rank_of_a_sampled_token(wild, encoding, prompt):
    model, _, _ = load(str(wild))
    def ranks(**options):
        found = []
        for o in generate(model, [prompt] * 4, encoding.eot_token, DecodingConfig(steps=1, max_new_tokens=20, seed=1, **options)):
            for i, y in enumerate(o.tokens):
                logits = logits_by_hand(model.trunk, prompt + o.tokens[:i])
                found.append((logits > logits[y]).sum().item())
        return found
    assert max(ranks(temperature=5.0, top_k=3)) == 2              # all three come up, and none below them
    assert max(ranks(temperature=5.0)) > 20
    assert max(ranks(temperature=1e-3)) == 0


def test_group_and_guidance_are_seen_in_the_text(run):
    """Groups by name; a strength of 1 changes nothing, without a group there is none."""
    def text(*args):
        return run("--steps=8", *args)[0][0]
    none, one, two = text(), text("--group=2 steps"), text("--group=3 steps")
    guided = text("--group=2 steps", "--guidance=3"), text("--group=2 steps", "--guidance=0.5")
    assert len({none, one, two, *guided}) == 5
    assert text("--group=") == none and text("--group=2 steps", "--guidance=1") == one
    assert text("--group=2 steps", "--guidance=0") != one         # inside, no group; the last call still has it


@pytest.mark.parametrize("draft, ahead", [(0, 0), (0, 9), (16, 0), (16, 9)])
def test_the_trace_shows_each_tokens_guesses(run, wild, encoding, prompt, draft, ahead):
    """A line per token, its guesses as generate gives them; a star where the trunk would have said another."""
    (shown,), last = run("--steps=8", "--trace", f"--draft={draft}", f"--ahead={ahead}", n=40)
    model, _, _ = load(str(wild))
    config = DecodingConfig(steps=8, max_new_tokens=40, draft=draft, ahead=ahead)
    (o,) = generate(model, [prompt], encoding.eot_token, config, trace=True)
    text = encoding.decode(prompt + o.tokens) + ("" if o.ended else "  [cut: no end of text]")
    assert shown.startswith(text + "\n")
    header, *lines = shown.removeprefix(text + "\n").split("\n")
    tokens = o.tokens + [encoding.eot_token] * o.ended
    assert len(lines) == len(tokens) == o.predicted and "guess" in header
    def written(y):
        return repr(encoding.decode([y]))[1:-1]
    for i, (line, token) in enumerate(zip(lines, tokens)):
        logits = logits_by_hand(model.trunk, prompt + tokens[:i])
        trunk_guess, p = logits.argmax().item(), logits.softmax(-1).max().item()
        assert line[0] == ("*" if token != trunk_guess else " ") and "\033" not in line
        assert (line[0] == "*") == (i in o.rejected) or not (draft or ahead)      # there a draft ended
        assert line[2:].startswith(written(token))
        bars = re.search("[▁▂▃▄▅▆▇█]+", line)
        assert len(bars[0]) == 8 and "▁▂▃▄▅▆▇█".index(bars[0][0]) == int(8 * p)
        guesses = re.split(r"  ->  ", line[bars.end():].strip())
        assert guesses[0] == f"0.00: {written(trunk_guess)} {p:.2f}".strip()
        assert guesses[-1].split(": ", 1)[1].startswith(written(token))       # the last guess is the token
        times = [float(g[:4]) for g in guesses]
        changes = sum(a[1] != b[1] for a, b in zip(o.trace[i], o.trace[i][1:]))
        assert times == sorted(times) and len(guesses) == 1 + changes
    assert 0 < len(o.rejected) < len(lines) or not (draft or ahead)


def test_the_trace_of_three_evaluations_by_hand(encoding):
    """Stars, changes and colours."""
    seven, eight = encoding.encode_ordinary("7")[0], encoding.encode_ordinary("8")[0]
    trace = [[(0.0, seven, 0.3), (0.5, seven, 0.5), (0.75, eight, 0.99)],
             [(0.0, seven, 0.3), (0.5, eight, 0.2), (0.75, seven, 1.0)]]
    output = Continuation([eight, seven], trace=trace)
    plain = format_trace(output, encoding, False).split("\n")[1:]
    assert plain[0].startswith("* 8 ") and plain[0].endswith("▃▅█             0.00: 7 0.30  ->  0.75: 8 0.99")
    assert plain[1].startswith("  7 ") and plain[1].endswith("0.00: 7 0.30  ->  0.50: 8 0.20  ->  0.75: 7 1.00")
    colored = format_trace(output, encoding, True).split("\n")[1:]
    assert colored[0].startswith("\033[1;33m* 8") and colored[0].endswith("\033[0m") and colored[1] == plain[1]


@pytest.mark.parametrize("terminal", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_print_the_bars_gets_digits(wild, tmp_path, terminal):
    words = [f"--out_dir={wild}", "--steps=3", "--trace", "--max_new_tokens=4", "--prompt=Tom has 3 €. How many?"]
    status, out, err = script(tmp_path, "sample", *words, before=use_ascii if terminal == "ascii" else use_latin)
    assert (status, err) == (0, "") and re.search(r"^. \S+ +[1-8]{3} ", out, re.M) and out.count(" 0.00: ") == 4


def use_ascii():
    import sys
    sys.stdout.reconfigure(encoding="ascii")


def use_latin():
    import sys
    sys.stdout.reconfigure(encoding="latin-1")


def test_several_samples_are_traced_each(run):
    texts, _ = run("--steps=4", "--trace", "--num_samples=2", "--temperature=1", "--solver=adaptive", n=5)
    assert len(texts) == 2 and all(text.count(" 0.00: ") == 5 for text in texts)


def test_checkpoint_chooses_the_file(run, wild, tmp_path):
    for name, scale in (("best", 1), ("last", -1)):
        checkpoint = load_checkpoint(wild / "best.pt")
        checkpoint["model"]["trunk.wte.weight"] *= scale
        torch.save(checkpoint, tmp_path / f"{name}.pt")
    best, last = (run("--steps=1", f"--checkpoint={name}", out_dir=tmp_path)[0] for name in ("best", "last"))
    assert best != last and run("--steps=1", out_dir=tmp_path)[0] == best == run("--steps=1")[0]


def test_dtype_is_that_of_the_weights(run, wild):
    model, _, _ = load(str(wild), dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    (text,), last = run("--dtype=bfloat16", "--steps=4")
    assert text.startswith(f"Question: {PROMPT}\nAnswer:") and numbers(last)[:2] == (24, 3.0)


def test_a_model_that_is_full_says_that_it_was_cut(run, tmp_path, wild, prompt):
    """A model of 30 positions writes until they are full; a huge max_new_tokens allocates nothing for more."""
    checkpoint = load_checkpoint(wild / "best.pt")
    checkpoint["trunk_config"]["block_size"] = 30
    checkpoint["model"]["trunk.wpe.weight"] = checkpoint["model"]["trunk.wpe.weight"][:30].clone()
    torch.save(checkpoint, tmp_path / "best.pt")
    for n in (24, 10 ** 12):
        (text,), last = run("--steps=2", out_dir=tmp_path, n=n)
        assert len(prompt) < 30 and numbers(last)[0] == 30 - len(prompt) + 1
        assert text.endswith("[cut: no end of text]")


def test_what_the_model_has_not_is_refused(wild, l2d, trunk):
    def refused(out_dir, *args):
        return error_of(sample.main, [f"--out_dir={out_dir}", "--max_new_tokens=4", *args])
    says(refused(trunk, "--steps=2"), "trunk without a path", "--steps=1", "not 2", f"--trunk={trunk}/best.pt")
    says(refused(trunk, "--steps=1", "--group=2 steps"), "group='2 steps'", "without a path")
    says(refused(wild, "--group=2"), "group='2'", "1 step, 2 steps, 3 steps, 4 or more steps")
    says(refused(wild, "--guidance=2"), "guidance=2.0 needs a --group", "1 step, 2 steps")
    for steps in (1, 2):                                          # there it would do nothing at all, silently
        says(refused(wild, "--guidance=2", "--group=2 steps", f"--steps={steps}"), "guidance=2.0", "--steps=3", f"not {steps}")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_is_no_error(closed, l2d):
    command = f"{sys.executable} sample.py --out_dir={l2d} --steps=2 --max_new_tokens=2 {closed}"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_a_draft_of_any_length_costs_no_time_to_choose(run):
    assert run("--steps=2", "--draft=100000000", n=4)


# -------------------------------------------------------------------------------------- traces as data
def test_the_trace_as_data_is_what_the_terminal_shows(run, tmp_path, encoding):
    path = tmp_path / "trace.json"
    (shown,), _ = run("--steps=5", "--trace", n=9)
    (text, *_), _ = run("--steps=5", f"--trace={path}", "--num_samples=2", n=9)
    records = json.loads(path.read_text())
    assert len(records) == 18 and [r["sample"] for r in records] == [1] * 9 + [2] * 9
    assert encoding.decode([r["token"] for r in records[:9]]) == "".join(r["text"] for r in records[:9])
    assert "".join(r["text"] for r in records[:9]) in shown and {r["question"] for r in records} == {PROMPT}
    for line, record in zip(shown.split("\n")[-9:], records):
        first = record["evaluations"][0]
        assert len(record["evaluations"]) == 5 and first["t"] == 0 and 0 < first["probability"] <= 1
        assert f"0.00: {repr(first['text'])[1:-1]} {first['probability']:.2f}" in line
    says(error_of(sample.main, [f"--out_dir={tmp_path}", "--trace="]), "--trace is ''", "the name of a file")


# --------------------------------------------------------------------------------- questions, one per line
def test_questions_are_read_from_standard_input(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n\nHow many are 2 and 3?\n"))
    (first, second), _ = run("--steps=2", "--prompt=-", n=4)
    assert first.startswith(f"Question: {PROMPT}\nAnswer:") and second.startswith("Question: How many are 2 and 3?")
    assert run("--steps=2", n=4)[0] == [first]                    # each answered as it would be alone
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    sample.main(["--prompt=-", "--steps=2"])                      # no question, no answer, no error


# --------------------------------------------------------------------------- what a checkpoint asks for
def test_a_path_trained_with_unroll_is_sampled_as_it_was_trained(run, wild, tmp_path):
    checkpoint = load_checkpoint(wild / "best.pt") | {"sampler": {"solver": "fixed_point", "guess": "mean"}}
    torch.save(checkpoint, tmp_path / "best.pt")
    told, last = run("--steps=6", "--solver=fixed_point", "--guess=mean")
    by_itself, same = run("--steps=6", out_dir=tmp_path)
    assert by_itself == told and last.startswith("--- steps=6 fixed_point") and same.startswith("--- steps=6 fixed_point")
    otherwise, last = run("--steps=6", "--solver=euler", "--guess=argmax", out_dir=tmp_path)
    assert otherwise == run("--steps=6")[0] != told and last.startswith("--- steps=6 euler")


# ------------------------------------------------------------------------------------------ the demo's model
def test_the_demo_stands_in_only_where_nobody_named_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample.main(["--steps=16"])
    out = capsys.readouterr().out
    says(out, "there is no out/l2d_gsm8k", "the demo's model", "can do nothing else", "#### 12\n")
    says(error_of(sample.main, ["--out_dir=out/l2d_gsm8k"]), "no checkpoint at out/l2d_gsm8k/best.pt")
    assert "demo" not in capsys.readouterr().out


def test_an_option_of_another_script_gets_its_hint():
    says(error_of(sample.main, ["--sigma=8"]), "unknown option --sigma", "train.py --sigma=8")
    says(error_of(sample.main, ["--T=8"]), "T is --steps")
