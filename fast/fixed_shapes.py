"""
The rounds of speculate.py in fixed shapes, which a GPU can replay as CUDA graphs (plumbing/graphs.py).

A round begins with three numbers a row: its last token, that token's position, and how many tokens are new.
The function FixedRounds.begin makes of them a draft of K tokens, and the first pass of the path over all B K
positions. Where guesses changed, or windows are short, FixedRounds.go_on makes a further pass. The host only
reads what came out.

    keys, values, noise    They lie in a Store, as large as the texts may become. A mask, which is made from
                           the positions inside of the function, hides what is behind a query.
    rows                   A text that has ended leaves an idle row behind. When half of the rows are idle,
                           the others move together into the first half of the Store.
    queries                All positions take part in every pass, with windows of full width. What was not
                           asked for is computed and ignored.
    lengths                Drafts have one of three lengths, windows one of two. What they take is measured.
With T = 1 a round is its draft. Without looking ahead in time, Algorithm 1 follows the draft as it stands.
"""
from functools import partial
from weakref import WeakKeyDictionary

import torch

from decode import Rows, make_mask
from diffusion import Denoiser, choose
from fast.ahead import LookAhead, State, can_look_ahead
from model import Context
from plumbing.costs import choose_shape, time_of
from plumbing.graphs import Graphs

PLAIN = 4                           # tokens of a round with T = 1. A text's last round may waste three
FEW_QUERIES = 512                   # up to so many queries in a pass, the widest window alone is tried
STORES = WeakKeyDictionary()        # {model: its Store}. A Store must not hold the model, only its weights


# ------------------------------------------------------------------------------------- what stays where it is
class Store:
    """What the rows of a batch keep, at fixed addresses: keys and values, groups, noise. And graphs on it.

    sizes: (B, S, M, D, U), the most rows, positions, new tokens, dimensions of the token space and uniform
    numbers. kv: from the trunk; it says how many layers and heads there are. All begins at 0: what a mask
    hides must be finite.
    """
    def __init__(self, model, tables, sizes, kv):
        weight = model.trunk.wte.weight
        self.weight = weight.data_ptr()
        self.tables = tables
        self.sizes = sizes
        self.graphs = Graphs(weight.device)
        self.seconds = {}                                         # see FixedRounds.measure
        B, S, M, D, U = sizes
        self.kv = [tuple(z.new_zeros(B, z.size(1), S, z.size(3)) for z in layer) for layer in kv]
        self.group = torch.zeros(B, dtype=torch.long, device=weight.device)
        self.x_0 = torch.zeros(B, M, D, device=weight.device)
        self.u = torch.zeros(B, M, U, device=weight.device)

    def tensors(self):
        return [z for layer in self.kv for z in layer] + [self.group, self.x_0, self.u]

    def fill(self, rows):
        """Take what these Rows hold."""
        for layer, new in zip(self.kv, rows.cache.kv):
            for z, z_new in zip(layer, new):
                z[:len(z_new), :, :z_new.size(2)] = z_new
        B, M, D = rows.x_0.shape
        self.group[:B] = rows.group
        self.x_0[:B, :M, :D] = rows.x_0
        self.u[:B, :M, :rows.u.size(2)] = rows.u


def find_store(model, tables, sizes, kv):
    """The model's Store, or a new one where it is too small, or holds for other weights or tables."""
    store = STORES.get(model)
    if store is not None and store.weight == model.trunk.wte.weight.data_ptr():
        # a graph reads the very tensors that it was recorded with
        if tables is None or store.tables is None or store.tables is tables:
            if all(a <= b for a, b in zip(sizes, store.sizes)):
                store.tables = store.tables or tables
                return store
            sizes = tuple(map(max, sizes, store.sizes))
    STORES.pop(model, None)                                       # its memory first
    STORES[model] = Store(model, tables, sizes, kv)
    return STORES[model]


def round_up(n):
    """n, or a little more: 1, 2, 3, 4, then steps of a quarter of a power of two."""
    step = max(1, 2 ** (n.bit_length() - 3))
    return -(-n // step) * step


class FixedRows(Rows):
    """Rows whose tensors lie in a Store: row i at places[i], one of B. The places between are idle."""
    def __init__(self, model, rows, config, tables):
        super().__init__(rows.out, rows.positions, rows.token.cpu(), None, None, None, None, None)
        self.device = rows.token.device
        self.max_new_tokens = config.max_new_tokens
        self.B = round_up(len(self.out))
        self.places = list(range(len(self.out)))
        last = max(self.positions) + config.max_new_tokens + max(config.draft, PLAIN)
        S = min(model.trunk.config.block_size, -(-last // 64) * 64)
        D = model.path.config.x_dim if model.path is not None else 0
        sizes = self.B, S, config.max_new_tokens, D, rows.u.size(2)
        self.store = find_store(model, tables, sizes, rows.cache.kv)
        self.store.fill(rows)

    def keep(self, rows):
        """Go on with these rows only, a list of indices. The others become idle, until they are many."""
        self.out = [self.out[i] for i in rows]
        self.positions = [self.positions[i] for i in rows]
        self.places = [self.places[i] for i in rows]
        self.token = self.token[rows]
        B = self.B
        while B > 1 and len(rows) <= B // 2:
            B = (B + 1) // 2
        if B < self.B:
            for z in self.store.tensors():
                z[:len(rows)] = z[self.places]
            self.places = list(range(len(rows)))
            self.B = B

    def numbers(self):
        """(3, B): the last token of each place, its position, and how many tokens are new.

        An idle place counts as full (max_new_tokens), so that nothing it drafts is valid.
        """
        numbers = torch.zeros(3, self.B, dtype=torch.long)
        numbers[2] = self.max_new_tokens
        n_new = [out.predicted for out in self.out]
        numbers[:, self.places] = torch.tensor([self.token.tolist(), self.positions, n_new])
        return numbers.to(self.device)

    def room(self):
        """How many tokens a draft may have: no place may pass the last position."""
        return self.store.sizes[1] - max(self.positions)


# ------------------------------------------------------------------------------------------------- a round
class FixedLookAhead(LookAhead):
    """LookAhead at all N = B K places of a grid. It selects nothing, so no number is read back."""
    def list_queries(self, asked, known, W):
        """W queries of each position and kind. Behind the last evaluation they repeat it."""
        N, E, G = asked.shape
        device = known.device
        n = torch.arange(N, device=device)[:, None, None]
        e = (known[:, None] + torch.arange(W, device=device)).clamp(max=E - 1)[:, :, None]
        kind = torch.arange(G, device=device)
        return tuple(x.expand(N, W, G).flatten() for x in (n, e, kind))

    def choose_some(self, mask):
        return torch.arange(len(mask), device=mask.device)

    def context(self, n):
        return self.full_grid(n, self.c.kv)


class FixedRounds:
    """Writes the rounds of a batch. begin and go_on are the functions that a GPU replays.

    shape: (B, K, W), rows, draft length and window. Arguments as in speculate.py.
    """
    def __init__(self, model, rows, eot, config, tables):
        self.model = model
        self.rows = rows
        self.eot = eot
        self.config = config
        self.tables = tables
        self.looks_ahead = can_look_ahead(config)

    def write(self, earlier, longest, widest):
        """Write a round. Returns what speculate.accept needs: the grid, n_passes, and no traces."""
        shape = self.choose_shape(earlier, longest, widest)
        B, K, W = shape
        grid, *kept = self.call(self.begin, shape, self.rows.numbers())
        n_passes = 1
        grid = grid.cpu()
        while grid[6].any():                                      # some position is still active
            grid, *kept = self.call(self.go_on, shape, *kept)
            n_passes += 1
            grid = grid.cpu()
        if not self.looks_ahead:
            n_passes = int(grid[3].max())
        return grid[:6].view(6, B, K)[:, self.rows.places], n_passes, None

    def call(self, function, shape, *inputs):
        key = function.__name__, self.config, self.eot, shape
        try:
            return self.rows.store.graphs(key, partial(function, shape), *inputs)
        except torch.cuda.OutOfMemoryError:                       # make room: fewer rows may do
            STORES.pop(self.model, None)
            raise

    def begin(self, shape, numbers):
        """A draft, and the first pass of the path. numbers: from FixedRows.numbers.

        Returns the grid (7, N), with what speculate.accept needs and at last what is active. When looking
        ahead also, for go_on, what write_draft returns without the logits, and the tensors of the State.
        """
        B, K, W = shape
        logits, *draft = self.write_draft(B, K, numbers)
        y, _, _, _, n, valid = draft
        zero = torch.zeros_like(y)
        if self.config.steps == 1:
            return (torch.stack([valid, y, y, zero, zero, zero, zero]),)
        if self.looks_ahead:
            f = self.make_look_ahead(B, K, *draft)
            s = f.start(logits)._replace(done=valid == 0, active=valid == 1)
            return self.pass_on(f, f.advance(s, W), draft)
        c, row, u, x_0, group = self.gather_places(B, K, *draft)
        c = c._replace(mask=make_mask(c.pos.view(B, K), self.rows.store.sizes[1]))
        f = Denoiser(self.model, self.config, self.tables, c, group, x_0, u, logits)
        refined = choose(f.predict(), u[:, 0], self.config.temperature, self.config.top_k)
        return (torch.stack([valid, y, refined, f.nfe, f.nfe * valid, zero, zero]),)

    def go_on(self, shape, *tensors):
        """A further pass of the path, from what begin or go_on has returned to what it returns."""
        B, K, W = shape
        draft = tensors[:6]
        f = self.make_look_ahead(B, K, *draft)
        return self.pass_on(f, f.advance(State(*tensors[6:]), W), draft)

    def pass_on(self, f, s, draft):
        """What begin and go_on return, from a FixedLookAhead, its State and the draft."""
        y, _, _, _, _, valid = draft
        grid = torch.stack([valid, y, s.y, f.path_calls(s), s.computed, f.changes(s), s.active.long()])
        return grid, *draft, *s

    def write_draft(self, B, K, numbers):
        """Plain decoding of K tokens. Returns logits (N, V_size), y, token, h, pos, n, valid, as in Draft."""
        config = self.config
        trunk = self.model.trunk
        store = self.rows.store
        kv = [(k[:B], v[:B]) for k, v in store.kv]
        token, pos, n = numbers
        j = torch.arange(K, device=token.device)
        pos = pos[:, None] + j                                    # (B, K)
        n = n[:, None] + j
        beyond = n >= config.max_new_tokens
        n = n.clamp(max=config.max_new_tokens - 1)
        u = store.u[:B, :, 0].gather(1, n)                        # (B, K)
        columns = []
        for j in range(K):
            at = pos[:, j:j + 1]
            h, _ = trunk(token[:, None], at, kv, make_mask(at, store.sizes[1]))
            logits = trunk.head(h[:, 0]).float()
            y = choose(logits, u[:, j], config.temperature, config.top_k)
            columns.append((logits, y, token, h[:, 0]))
            token = y
        logits, y, token, h = (torch.stack(column, 1) for column in zip(*columns))
        ends = (y == self.eot).long()
        valid = ~beyond & (ends.cumsum(1) == ends)                # the first end of text, or before it
        return [z.flatten(0, 1) for z in (logits, y, token, h, pos, n, valid.long())]

    def gather_places(self, B, K, y, token, h, pos, n, valid):
        """The Context of all places of a draft, and the row, uniform numbers, noise and group of each."""
        store = self.rows.store
        kv = [(k[:B], v[:B]) for k, v in store.kv]
        row = torch.arange(B, device=y.device).repeat_interleave(K)
        D = self.model.path.config.x_dim
        return Context(h, token, pos, kv), row, store.u[row, n], store.x_0[row, n, :D], store.group[row]

    def make_look_ahead(self, B, K, y, *draft):
        """The FixedLookAhead of a draft."""
        c, row, u, x_0, group = self.gather_places(B, K, y, *draft)
        return FixedLookAhead(self.model, self.config, self.tables, c, row, group, x_0, u, y)

    # ------------------------------------------------------------------------------------ choosing a shape
    def choose_shape(self, earlier, longest, widest):
        """The shape (B, K, W) of the next round, from few that may have a graph."""
        rows = self.rows
        room = rows.room()
        if self.config.steps == 1:
            return rows.B, PLAIN if PLAIN <= room else 1, 0
        lengths = [K for K in sorted({1, min(4, longest), longest}) if K <= room]
        windows = [widest]
        if rows.B * longest * widest > FEW_QUERIES:
            windows = sorted({min(4, widest), widest})
        shapes = [(K, W) for K in lengths for W in windows]
        if len(shapes) == 1:
            return rows.B, *shapes[0]
        seconds = {shape: self.measure(*shape) for shape in shapes}
        return rows.B, *choose_shape(rows.out, earlier, self.config, seconds)

    def measure(self, K, W):
        """Seconds of begin and of go_on in this shape. Measured for 1 to 4 rows, 5 to 32, and more.

        It changes nothing: begin writes keys and values behind the last token, where the next round does so.
        """
        rows = self.rows
        similar = (rows.B - 1).bit_length() // 3
        key = self.config, self.eot, similar, K, W
        seconds = rows.store.seconds
        if key not in seconds:
            shape = rows.B, K, W
            numbers = rows.numbers()
            first = time_of(lambda: self.call(self.begin, shape, numbers), rows.device)
            again = 0.0                                           # else begin makes all passes
            if self.looks_ahead:
                inputs = [z.clone() for z in self.call(self.begin, shape, numbers)[1:]]
                again = time_of(lambda: self.call(self.go_on, shape, *inputs), rows.device)
            seconds[key] = first, again
        return seconds[key]
