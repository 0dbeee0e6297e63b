"""
Draw one token on its way through Algorithm 1 as an animated SVG, which plays in a browser and in README.

    python experiments/animate.py                  # docs/token.svg: a calculated number, by demo/
    python experiments/animate.py --what=chains    # docs/chain.svg, after experiments/chains.py --method=l2d

Left: the guesses and their probabilities at each evaluation. Right: x_t on its way from the noise x_0 towards
the points of the guesses, in the two dimensions of the token space in which these points differ most.
Distances from the centre are compressed (asinh), since the noise lies far outside.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the project's modules

import torch

from configurator import configure, require, run
from decode import DecodingConfig, draw_noise
from diffusion import Denoiser, Tables
from plumbing.files import write_file
from plumbing.tokenizer import encode_question
from plumbing.trained import load
from speculate import generate

N_BARS = 6                          # tokens that have a bar
SECONDS = 0.7                       # per evaluation
PLOT = 560, 205, 140                # centre and radius of the plot
STYLE = ("text{font-family:monospace;fill:#111827}.title{font-size:17px;font-weight:bold}"
         ".small{font-size:13px;fill:#4b5563}.token{font-size:14px}.now{font-size:15px}"
         ".plane{fill:none;stroke:#d1d5db}.way{fill:none;stroke:#9ca3af;stroke-dasharray:3 3}"
         ".dot{fill:#111827;opacity:.8}")
COLORS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#be185d", "#475569", "#65a30d")


@dataclass(frozen=True)
class Config:
    what: Literal["demo", "chains"] = "demo"
    out_dir: str = "demo"           # the model of --what=demo
    prompt: str = ("Leo makes 42 stamps and Tom makes 5 for him. He wants 59 stamps. "
                   "How many more does he need?")
    steps: int = 16                 # T
    links: int = 7                  # chains: links of the chain that is followed
    seed: int = 0                   # chains: of the path
    out: str = ""                   # file to write; empty: docs/token.svg or docs/chain.svg


class Recorder(Denoiser):
    """A Denoiser that keeps x_t, t and the probabilities of every evaluation."""
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.way = []               # (t, x_t (D,), probabilities (V_size,))

    def evaluate(self, x_t, t):
        logits = super().evaluate(x_t, t)
        self.way.append((t, x_t[0], logits[0].softmax(-1)))
        return logits


def follow_demo(config):
    """The Recorder of the first token of an answer that the path changes, a title, and names of tokens."""
    model, encoding, checkpoint = load(config.out_dir, "best", "cpu", "float32")
    how = DecodingConfig(steps=config.steps)
    prompt = encode_question(encoding, checkpoint["data"]["prompt"], config.prompt)
    (output,) = generate(model, [prompt], encoding.eot_token, how, trace=True)
    changed = [n for n, (token, way) in enumerate(zip(output.tokens, output.trace)) if way[0][1] != token]
    require(changed, f"the path of {config.out_dir} changes no token of its answer; train another one")
    n = changed[0]
    idx = torch.tensor([prompt + output.tokens[:n]])
    c = model.read_context(idx, (torch.tensor([0]), torch.tensor([idx.size(1) - 1])))
    x_0, u = draw_noise(model, [0], how)
    group = torch.tensor([model.no_group])
    f = Recorder(model, how, Tables(model), c, group, x_0[:, n], u[:, n])
    before = encoding.decode(output.tokens[:n]).strip().splitlines()[-1]
    return f, f"{before} ?", lambda token: encoding.decode([token]).strip()


def follow_chain(config):
    """The same for a chain that takes config.links links, by the path of experiments/chains.py."""
    import chains
    f, chain = chains.make_denoiser(Recorder, config.seed, config.links, config.steps)
    name = "abcdefghijklmnopqrst"
    return f, "chain " + " ".join(name[i] for i in chain), lambda token: name[token] if token < 20 else "?"


# ---------------------------------------------------------------------------------------------- drawing
def project(points, x):
    """Points (m, D) and x (E, D) in the plane in which the points differ most, as lists of (x, y)."""
    centre = points.mean(0)
    away = x[0] - centre                                          # the noise, where the points span no plane
    _, _, axes = torch.linalg.svd(torch.cat([points - centre, 1e-3 * away[None]]), full_matrices=False)
    plane = axes[:2]

    def place(z):
        xy = (z - centre) @ plane.T
        r = xy.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        return xy / r * torch.asinh(r)
    a, b = place(points), place(x)
    scale = PLOT[2] / max(a.norm(dim=1).max().item(), b.norm(dim=1).max().item())
    return [[(PLOT[0] + scale * p[0].item(), PLOT[1] - scale * p[1].item()) for p in z] for z in (a, b)]


def animate(name, values, times, mode="linear"):
    """An <animate> of an attribute through values, one at each of the times, which repeats for ever.

    With mode="linear" a value stays for more than half of its time, then moves on to the next.
    """
    frames = list(zip(times, values))
    if mode == "linear":
        later = [(a + 0.6 * (b - a), value) for a, b, value in zip(times, times[1:], values)]
        frames = sorted(frames + later, key=lambda frame: frame[0])
    values = ";".join(str(value) for _, value in frames)
    times = ";".join(f"{t:.4f}" for t, _ in frames)
    return (f'<animate attributeName="{name}" values="{values}" keyTimes="{times}" dur="{{dur}}s" '
            f'calcMode="{mode}" repeatCount="indefinite"/>')


def draw(f, title, name):
    """The SVG, a string."""
    E = len(f.way)
    probabilities = torch.stack([p for _, _, p in f.way])         # (E, V_size)
    guesses = list(dict.fromkeys(probabilities.argmax(1).tolist()))
    likely = probabilities.max(0).values.topk(2 * N_BARS).indices.tolist()
    shown = list(dict.fromkeys(guesses + likely))[:max(N_BARS, len(guesses))]
    points, way = project(f.tables.V[guesses[:10]], torch.stack([x for _, x, _ in f.way]))
    beats = [e / (E + 2) for e in range(E)] + [1]                 # the last evaluation stays for three beats

    def hold(values):
        return [*values, values[-1]]
    body = [f'<text x="20" y="34" class="title">{escape(title)}</text>',
            '<text x="20" y="62" class="small">guesses and their probability</text>',
            f'<text x="{PLOT[0]}" y="34" class="small" text-anchor="middle">x_t in the token space</text>']
    for e, (t, _, p) in enumerate(f.way):
        on = animate("opacity", hold([1 if i == e else 0 for i in range(E)]), beats, "discrete")
        text = f"evaluation {e + 1} of {E}, t = {t:.2f}: {escape(name(p.argmax().item()))}"
        body.append(f'<text x="20" y="350" class="now" opacity="{int(e == E - 1)}">{text}{on}</text>')
    height = min(30, 240 / len(shown))
    for i, token in enumerate(shown):
        y = 80 + i * height
        widths = hold([round(260 * p, 1) for p in probabilities[:, token].tolist()])
        color = COLORS[guesses.index(token) % len(COLORS)] if token in guesses else "#9ca3af"
        bar = f'x="70" y="{y:.0f}" height="{0.75 * height:.0f}" width="{widths[-1]}" fill="{color}"'
        body.append(f'<text x="20" y="{y + 0.6 * height:.0f}" class="token">{escape(name(token))}</text>'
                    f'<rect {bar}>{animate("width", widths, beats)}</rect>')
    body.append(f'<circle cx="{PLOT[0]}" cy="{PLOT[1]}" r="{PLOT[2] + 12}" class="plane"/>')
    for (x, y), token in zip(points, guesses):
        color = COLORS[guesses.index(token) % len(COLORS)]
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'
                    f'<text x="{x + 7:.1f}" y="{y - 5:.1f}" class="token">{escape(name(token))}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in way)
    xs, ys = (hold([round(z, 1) for z in axis]) for axis in zip(*way))
    body.append(f'<polyline points="{line}" class="way"/>'
                f'<circle cx="{xs[-1]}" cy="{ys[-1]}" r="7" class="dot">'
                f'{animate("cx", xs, beats)}{animate("cy", ys, beats)}</circle>')
    text = "\n".join(body).replace("{dur}", f"{SECONDS * (E + 2):.1f}")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 380" width="740" height="380">'
            f'<style>{STYLE}</style><rect width="740" height="380" fill="#ffffff"/>\n{text}\n</svg>\n')


def escape(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@torch.no_grad()
def main(argv=None):
    config = configure(Config, argv, __doc__)
    f, title, name = follow_demo(config) if config.what == "demo" else follow_chain(config)
    f.predict()
    text = draw(f, title, name)
    path = config.out or f"docs/{'token' if config.what == 'demo' else 'chain'}.svg"
    write_file(path, lambda file: file.write(text.encode()))
    print(f"written to {path}, {len(text) / 1000:.0f} kB: " + " ".join(name(g) for g in guess_row(f)))


def guess_row(f):
    return [p.argmax().item() for _, _, p in f.way]


if __name__ == "__main__":
    run(main)
