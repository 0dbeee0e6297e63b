"""sample.py: what it prints, against the trunk run by hand and against counted calls of the path."""
import re

import pytest
import torch

import sample
from diffusion import Sampler, generate
from model import DiffusionPath, load_checkpoint, model_from_checkpoint
from prepare_data import load_tokenizer
from test_train import arithmetic, encoding, l2d, trunk, wild  # noqa: F401  (fixtures)

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
    """Tokens, NFE, tokens/s of the last line."""
    found = re.search(r": (\d+) tokens, NFE (\d+\.\d+) path calls per token, (\d+\.\d) tokens/s$", last)
    return int(found[1]), float(found[2]), float(found[3])


def logits_by_hand(gpt, ids):
    """Of the next token after ids: one plain pass over all of them, no cache."""
    with torch.no_grad():
        return gpt.head(gpt(torch.tensor([ids]))[0][0, -1])


def greedy_by_hand(gpt, ids, n, eot):
    new = []
    while len(new) < n and (y := logits_by_hand(gpt, ids + new).argmax().item()) != eot:
        new.append(y)
    return new


def test_one_step_is_the_trunk(run, wild, encoding):
    """steps=1 writes the argmax of the trunk's own forward, token by token; more steps write something else."""
    gpt = model_from_checkpoint(load_checkpoint(wild / "best.pt"), "wild").trunk
    prompt = encoding.encode_ordinary(f"Question: {PROMPT}\nAnswer:")
    want = greedy_by_hand(gpt, prompt, 24, encoding.eot_token)
    (text,), last = run("--steps=1")
    assert text == encoding.decode(prompt + want) + "  [cut: no end of text]"
    assert last.startswith("--- steps=1 euler: 24 tokens, NFE 0.00") and len(set(want)) > 5
    (other,), _ = run("--steps=8")
    assert other != text                                          # so the equality above says something


def test_one_step_is_the_trunks_checkpoint(run, trunk, l2d, encoding):
    """Training a path beside a trunk leaves what the trunk writes as it was."""
    gpt = model_from_checkpoint(load_checkpoint(trunk / "last.pt"), "trunk").trunk
    prompt = encoding.encode_ordinary(f"Question: {PROMPT}\nAnswer:")
    logits = logits_by_hand(gpt, prompt)
    assert len(set(run("--steps=1", "--num_samples=8", "--temperature=1", out_dir=l2d)[0])) == 8
    texts = [run("--steps=1", "--num_samples=8", "--temperature=1", out_dir=out_dir)[0] for out_dir in (l2d, trunk)]
    assert texts[0] == texts[1]
    assert run("--steps=1", out_dir=l2d, n=1)[0][0].startswith(encoding.decode(prompt + greedy_by_hand(gpt, prompt, 1, encoding.eot_token)))
    model, _, _ = sample.load(str(l2d), "best")
    assert torch.equal(logits_by_hand(model.trunk, prompt), logits)


@pytest.mark.parametrize("args, nfe", [
    *[([f"--solver={solver}", f"--steps={T}"], T - 1) for solver in ("euler", "midpoint", "heun") for T in (2, 5, 6)],
    (["--guidance=2", "--label=1", "--steps=4"], 2 * 2 + 1),      # the last call is read for its logits, with the label
    (["--t_end=1", "--solver=midpoint", "--steps=5"], 4), (["--guess=mean", "--shift=3", "--steps=5"], 4)])
def test_path_calls(args, nfe, run, monkeypatch):
    calls, forward = [], DiffusionPath.forward
    monkeypatch.setattr(DiffusionPath, "forward", lambda self, x_t, *rest: (calls.append(len(x_t)), forward(self, x_t, *rest))[1])
    (text,), last = run(*args, n=6)
    tokens, said, speed = numbers(last)
    assert said == nfe and sum(calls) == nfe * tokens and tokens == 6 and speed > 0


def test_adaptive_counts_its_calls(run, monkeypatch):
    calls, forward = [], DiffusionPath.forward
    monkeypatch.setattr(DiffusionPath, "forward", lambda self, x_t, *rest: (calls.append(len(x_t)), forward(self, x_t, *rest))[1])
    _, last = run("--solver=adaptive", "--steps=12", "--tol=0.5")
    tokens, nfe, _ = numbers(last)
    assert abs(sum(calls) / tokens - nfe) < 0.006 and 1 <= nfe <= 11


def test_samples_and_seed(run):
    args = ["--num_samples=3", "--temperature=1", "--steps=3"]
    texts, last = run(*args, "--seed=5")
    assert len(set(texts)) == 3 and all(text.startswith(f"Question: {PROMPT}\nAnswer:") for text in texts)
    assert run(*args, "--seed=5")[0] == texts
    assert not set(run(*args, "--seed=6")[0]) & set(texts)
    assert run("--num_samples=2", *args[1:], "--seed=5")[0] == texts[:2]      # a sample does not depend on how many follow
    greedy, _ = run("--num_samples=3", "--steps=1")
    assert len(set(greedy)) == 1
    assert run("--temperature=1", "--top_k=1", "--steps=1")[0] == greedy[:1]


def test_top_k_and_temperature(wild, encoding):
    """Every sampled token is among the trunk's best k; at a low temperature it is the best."""
    model, _, _ = sample.load(str(wild), "best")
    prompt, eot = encoding.encode_ordinary(f"Question: {PROMPT}\nAnswer:"), encoding.eot_token
    def ranks(**options):
        found = []
        for o in generate(model, [prompt] * 4, eot, 20, Sampler(steps=1, **options), seed=1):
            for i, y in enumerate(o.tokens):
                logits = logits_by_hand(model.trunk, prompt + o.tokens[:i])
                found.append((logits > logits[y]).sum().item())
        return found
    assert max(ranks(temperature=5.0, top_k=3)) == 2              # all three come up, and none below them
    assert max(ranks(temperature=5.0)) > 20
    assert max(ranks(temperature=1e-3)) == 0


def test_guidance_and_label(run):
    """The label and the strength of the guidance are seen in the text; strength 1 and label -1 change nothing."""
    text = lambda *args: run("--steps=8", *args)[0][0]
    none, one, two = text(), text("--label=1"), text("--label=2")
    assert len({none, one, two, text("--label=1", "--guidance=3"), text("--label=1", "--guidance=0.5")}) == 5
    assert text("--label=-1") == none and text("--label=1", "--guidance=1") == one
    assert text("--label=1", "--guidance=0") != one               # inside, no label; the last call still has it


def test_trace(run, wild, encoding):
    """A line a token: its guesses as generate gives them, and a star where the trunk alone would have said another."""
    (shown,), last = run("--steps=8", "--trace", n=60)
    model, _, _ = sample.load(str(wild), "best")
    prompt = encoding.encode_ordinary(f"Question: {PROMPT}\nAnswer:")
    (o,) = generate(model, [prompt], encoding.eot_token, 60, Sampler(steps=8), trace=True)
    text = encoding.decode(prompt + o.tokens) + ("" if o.ended else "  [cut: no end of text]")
    assert shown.startswith(text + "\n")
    header, *lines = shown.removeprefix(text + "\n").split("\n")
    tokens = o.tokens + [encoding.eot_token] * o.ended
    assert len(lines) == len(tokens) == o.predicted and "guess" in header
    stars = 0
    for i, (line, token) in enumerate(zip(lines, tokens)):
        logits = logits_by_hand(model.trunk, prompt + tokens[:i])
        trunk_guess, p = logits.argmax().item(), logits.softmax(-1).max().item()
        written = lambda y: repr(encoding.decode([y]))[1:-1]
        assert line[0] == ("*" if token != trunk_guess else " ") and "\033" not in line
        stars += token != trunk_guess
        assert line[2:].startswith(written(token))
        bars = re.search("[▁▂▃▄▅▆▇█]+", line)
        assert len(bars[0]) == 8 and "▁▂▃▄▅▆▇█".index(bars[0][0]) == int(8 * p)
        guesses = re.split(r"  ->  ", line[bars.end():].strip())
        assert guesses[0] == f"0.00: {written(trunk_guess)} {p:.2f}".strip()
        assert guesses[-1].split(": ", 1)[1].startswith(written(token))       # argmax: the last guess is the token
        times = [float(g[:4]) for g in guesses]
        assert times == sorted(times) and len(guesses) == 1 + sum(a[1] != b[1] for a, b in zip(o.trace[i], o.trace[i][1:]))
    assert 0 < stars < len(lines)


def test_format_trace():
    """Stars, changes and colours of a trace written by hand."""
    encoding = load_tokenizer("arithmetic")
    seven, eight = encoding.encode_ordinary("7")[0], encoding.encode_ordinary("8")[0]
    trace = [[(0.0, seven, 0.3), (0.5, seven, 0.5), (0.75, eight, 0.99)], [(0.0, seven, 0.3), (0.5, eight, 0.2), (0.75, seven, 1.0)]]
    plain = sample.format_trace([eight, seven], trace, encoding, False).split("\n")[1:]
    assert plain[0].startswith("* 8 ") and plain[0].endswith("▃▅█             0.00: 7 0.30  ->  0.75: 8 0.99")
    assert plain[1].startswith("  7 ") and plain[1].endswith("0.00: 7 0.30  ->  0.50: 8 0.20  ->  0.75: 7 1.00")
    colored = sample.format_trace([eight, seven], trace, encoding, True).split("\n")[1:]
    assert colored[0].startswith("\033[1;33m* 8") and colored[0].endswith("\033[0m") and colored[1] == plain[1]


def test_trace_of_several_samples(run):
    texts, _ = run("--steps=4", "--trace", "--num_samples=2", "--temperature=1", "--solver=adaptive", n=5)
    assert len(texts) == 2 and all(text.count(" 0.00: ") == 5 for text in texts)


def test_best_and_last(run, wild, tmp_path):
    """--checkpoint chooses the file."""
    for name, scale in (("best", 1), ("last", -1)):
        checkpoint = load_checkpoint(wild / "best.pt")
        checkpoint["model"]["trunk.wte.weight"] *= scale
        torch.save(checkpoint, tmp_path / f"{name}.pt")
    best, last = (run("--steps=1", f"--checkpoint={name}", out_dir=tmp_path)[0] for name in ("best", "last"))
    assert best != last and run("--steps=1", out_dir=tmp_path)[0] == best == run("--steps=1")[0]


def test_bfloat16(run, wild):
    model, _, _ = sample.load(str(wild), "best", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    (text,), last = run("--dtype=bfloat16", "--steps=4")
    assert text.startswith(f"Question: {PROMPT}\nAnswer:") and numbers(last)[:2] == (24, 3.0)


def test_stops_at_the_end_of_the_model(run, tmp_path, wild, encoding):
    """A model of 30 positions writes until they are full, and says that it was cut."""
    checkpoint = load_checkpoint(wild / "best.pt")
    checkpoint["trunk_config"]["block_size"] = 30
    checkpoint["model"]["trunk.wpe.weight"] = checkpoint["model"]["trunk.wpe.weight"][:30].clone()
    torch.save(checkpoint, tmp_path / "best.pt")
    n = len(encoding.encode_ordinary(f"Question: {PROMPT}\nAnswer:"))
    (text,), last = run("--steps=2", out_dir=tmp_path)
    assert n < 30 and numbers(last)[0] == 30 - n + 1 and text.endswith("[cut: no end of text]")
