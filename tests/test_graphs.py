"""fast/fixed_shapes.py against plain decoding, with a tape in place of CUDA graphs that does what a graph would do.

What no test here can show is the recording itself.
"""
import dataclasses
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from helpers import EOT, SETTINGS, error_of, says, wild_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_decode import EXAMPLES, GROUPS, IDS, PAIR, PROMPTS, ROWS, configs, each_alone, random_pair
from test_llama import wild as wild_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import decode
from bench.decoding import write
from decode import DecodingConfig
from diffusion import Tables
from fast import fixed_shapes
from fast.fixed_shapes import STORES, FixedRounds, FixedRows, find_store, round_up
from plumbing.costs import choose_shape
from plumbing.graphs import Graphs
from speculate import generate, in_fixed_shapes

SEARCH = settings(max_examples=EXAMPLES // 3, deadline=None, derandomize=EXAMPLES == 60,
                  suppress_health_check=[HealthCheck.too_slow])
HUGE = 2 ** 62


# ------------------------------------------------------------------------------------- a graph without a GPU
def tensors_in(nest):
    return [x for x in tree_leaves(nest) if torch.is_tensor(x)]


def address(x):
    return x.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Records the operations of a function: their addresses, and the numbers that they had.

    It refuses what a CUDA graph cannot record, and tensors that the function was not given.
    given: tensors that the function may read.
    """
    READ_BACK = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_consecutive",
                 "bincount", "equal", "lift_fresh", "lift_fresh_copy")

    def __init__(self, given):
        super().__init__()
        self.given = given                                        # kept alive: an address stays this tensor's
        self.known = {address(x) for x in given} | {0}
        self.steps = []
        self.made = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = op._schema.name.removeprefix("aten::")
        inputs = tensors_in((args, kwargs))
        assert name not in self.READ_BACK, f"{name} reads a number back, or sends one"
        if name in ("index", "index_put", "index_put_"):
            assert not any(x.dtype == torch.bool for x in tensors_in(args[1])), "a mask as index is read back"
        for x in inputs:
            assert address(x) in self.known, f"{name} reads a tensor that was not given"
        result = op(*args, **kwargs)
        outputs = tensors_in(result)
        if op._schema.is_mutable:
            self.steps.append((op, args, kwargs, []))
        elif not {address(x) for x in inputs} & {address(x) for x in outputs} - {0}:      # else they are views
            self.steps.append((op, args, kwargs, outputs))
            self.made += outputs
            self.known |= {address(x) for x in outputs}
        return result

    def poison(self):
        """What other graphs, in the same memory, may do to the tensors that were made here."""
        for x in self.made:
            x.fill_(torch.nan if x.is_floating_point() else True if x.dtype == torch.bool else HUGE)

    def replay(self):
        for op, args, kwargs, outputs in self.steps:
            for old, new in zip(outputs, tensors_in(op(*args, **kwargs)), strict=bool(outputs)):
                old.copy_(new)


class TapedGraphs:
    """In place of Graphs: all that a function computed is gone before the next call.

    constants: a function that lists the tensors which a function may read besides its inputs.
    """
    def __init__(self, constants):
        self.constants = constants
        self.tapes = {}
        self.n_calls = 0

    def __call__(self, key, function, *inputs):
        key = key, *((x.shape, x.dtype) for x in inputs)
        if key not in self.tapes:
            buffers = [x.clone() for x in inputs]
            function(*buffers)                                    # warms up
            with Tape(buffers + self.constants()) as tape:
                outputs = function(*buffers)
            self.tapes[key] = tape, buffers, outputs
        tape, buffers, outputs = self.tapes[key]
        for buffer, x in zip(buffers, inputs):
            buffer.copy_(x)
        for other, _, _ in self.tapes.values():
            other.poison()
        tape.replay()
        self.n_calls += 1
        assert self.n_calls < 300, "it does not end"
        return outputs


@contextmanager
def taped(model, shape=None, graphs=TapedGraphs):
    """Within this context graphs are tapes, and rounds have drafts and windows of this shape (K, W) at most.

    Yields a list of the tapes. Rows start in memory that holds large numbers.
    """
    made = []

    def constants():
        store = STORES[model]
        tables = [store.tables.V, store.tables] if store.tables else []
        return [*model.parameters(), *model.buffers(), *store.tensors(), *tensors_in([dict(t) if isinstance(
            t, dict) else t for t in tables])]

    def make_graphs(device):
        made.append(graphs(constants))
        return made[-1]
    init = fixed_shapes.Store.__init__

    def dirty(store, *args):
        init(store, *args)
        for z in store.tensors():
            z.fill_(1e4 if z.is_floating_point() else 0)

    def choose(self, earlier, longest, widest):
        K = max(1, min(shape[0], longest))
        W = min(shape[1], widest) if self.config.steps > 1 else 0
        return self.rows.B, K if K <= self.rows.room() else 1, W
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_shapes, "Graphs", make_graphs)
        patch.setattr(fixed_shapes.Store, "__init__", dirty)
        if shape:
            patch.setattr(FixedRounds, "choose_shape", choose)
        STORES.pop(model, None)
        yield made
    STORES.pop(model, None)


def text_of(output):
    return output.tokens, output.ended, output.predicted, output.nfe


def same(outputs, expected):
    assert list(map(text_of, outputs)) == list(map(text_of, expected))


@pytest.fixture(scope="module")
def model():
    return wild_pair()


# ------------------------------------------------------------------------------------------- the same texts
@SEARCH
@given(pair=PAIR, config=configs(draft=st.sampled_from([0, 1, 4, 7]), ahead=st.sampled_from([0, 2, 1000])),
       rows=ROWS, eot=st.integers(-1, 12))
def test_fixed_shapes_change_no_token(pair, config, rows, eot):
    """Whatever the pair, the prompts and the setting, and nor a path call at the tokens kept."""
    model, (prompts, group, ids) = random_pair(*pair), map(list, zip(*rows))
    config = dataclasses.replace(config, graphs="on", steps=min(config.steps, 12))
    shape = config.draft or 1, config.ahead
    with taped(model, shape) as graphs:
        outputs = generate(model, prompts, eot, config, group, ids)
    same(outputs, each_alone(model, prompts, eot, config, group, ids))
    assert bool(graphs) == in_fixed_shapes(model, config, False)


FIXED = [name for name, options in SETTINGS.items()
         if in_fixed_shapes(wild_pair(), DecodingConfig(graphs="on", **options), False)]


@pytest.mark.parametrize("kind, setting", [("gpt", name) for name in FIXED] + [
    ("llama", name) for name in ("trunk", "euler", "midpoint to 1", "sampled guesses", "guidance", "mean")])
def test_every_setting(setting, kind):
    """With texts that end, so that rows become idle, and move."""
    model = wild_pair() if kind == "gpt" else wild_llama("lora", path_init="paper")
    config = DecodingConfig(max_new_tokens=6, seed=4, draft=4, graphs="on", **SETTINGS[setting])
    free = each_alone(model, PROMPTS, -1, config, GROUPS, IDS)
    tokens = [t for o in free for t in o.tokens]
    eot = max(set(tokens), key=tokens.count)
    with taped(model, (4, 3)):
        same(generate(model, PROMPTS, eot, config, GROUPS, IDS), each_alone(model, PROMPTS, eot, config, GROUPS, IDS))


def test_on_a_cpu_the_functions_are_just_called(model):
    """--graphs=on: the same shapes, without a graph; sizes are measured."""
    config = DecodingConfig(steps=6, max_new_tokens=8, graphs="on")
    STORES.pop(model, None)
    same(generate(model, PROMPTS, EOT, config, GROUPS), each_alone(model, PROMPTS, EOT, config, GROUPS))
    store = STORES[model]
    assert store.graphs.graphs == {} and store.seconds
    assert {(K, W) for *_, K, W in store.seconds} == {(1, 5), (4, 5), (8, 5)}


@pytest.mark.parametrize("graphs, fixed", [("auto", False), ("off", False), ("on", True)])
def test_on_a_cpu_auto_is_off(model, graphs, fixed):
    STORES.pop(model, None)
    generate(model, PROMPTS, EOT, DecodingConfig(steps=3, max_new_tokens=2, graphs=graphs))
    assert (model in STORES) == fixed
    says(error_of(lambda: __import__("sample").main(["--graphs=yes"])), "graphs", "auto", "on", "off")


def test_without_a_path(model):
    trunk_alone = type(model)(model.trunk)
    config = DecodingConfig(steps=1, max_new_tokens=7, graphs="on")
    with taped(trunk_alone):
        outputs = generate(trunk_alone, PROMPTS, EOT, config)
    same(outputs, each_alone(model, PROMPTS, EOT, config))
    assert all(o.passes == o.computed == 0 for o in outputs)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_row_is_cut_where_the_trunks_positions_end(model, steps):
    prompts = [[1] * 24, [2] * 20, [3, 4]]
    config = DecodingConfig(steps=steps, max_new_tokens=30, draft=16, graphs="on")
    with taped(model, (16, 2)):
        outputs = generate(model, prompts, -1, config)
    assert [len(o.tokens) for o in outputs] == [1, 5, 23] and not any(o.ended for o in outputs)
    same(outputs, each_alone(model, prompts, -1, config))


# ---------------------------------------------------------------------------------------- what stays in place
def test_rows_stay_until_half_of_them_are_idle(model, monkeypatch):
    places, keep = [], FixedRows.keep
    def noted(self, rows):
        keep(self, rows)
        places.append((self.B, list(self.places)))
    monkeypatch.setattr(FixedRows, "keep", noted)
    prompts = [[i, 1] for i in range(9)]
    config = DecodingConfig(steps=4, max_new_tokens=12, graphs="on")
    free = each_alone(model, prompts, -1, config)
    tokens = [t for o in free for t in o.tokens]
    eot = max(set(tokens), key=tokens.count)
    with taped(model, (2, 3)):
        same(generate(model, prompts, eot, config), each_alone(model, prompts, eot, config))
    assert any(0 < len(p) < B for B, p in places)                 # some were idle
    assert len({B for B, _ in places}) > 2 and all(len(p) > B // 2 or B == 1 for B, p in places if p)


def test_later_calls_use_the_same_graphs(model):
    config = DecodingConfig(steps=4, max_new_tokens=5, graphs="on")
    tables = decode.Tables(model)
    with taped(model, (4, 3)) as graphs:
        n_tapes = []
        for prompts, ids in ((PROMPTS, IDS), (PROMPTS[::-1], [1, 2, 3, 4, 5]), (PROMPTS, IDS)):
            outputs = generate(model, prompts, -1, config, GROUPS, ids, tables=tables)
            same(outputs, each_alone(model, prompts, -1, config, GROUPS, ids))
            n_tapes.append(len(graphs[0].tapes))
        assert len(graphs) == 1 and n_tapes[0] <= n_tapes[1] == n_tapes[2] <= 2 * 4      # 5, 3, 2 and 1 rows
        few = DecodingConfig(steps=4, max_new_tokens=4, graphs="on")                     # fits, too
        same(generate(model, PROMPTS[:2], -1, few, tables=tables), each_alone(model, PROMPTS[:2], -1, few))
        assert len(graphs) == 1
        many = PROMPTS * 3                                        # do not
        same(generate(model, many, -1, few, tables=tables), each_alone(model, many, -1, few))
        assert len(graphs) == 2
        moved = model.trunk.wte.weight.data.clone()
        model.trunk.wte.weight.data = moved                       # nor does a graph hold for other addresses
        same(generate(model, PROMPTS, -1, few, tables=tables), each_alone(model, PROMPTS, -1, few))
        assert len(graphs) == 3


def test_a_store_does_not_keep_its_model_alive():
    import gc
    import weakref
    model = wild_pair()
    generate(model, PROMPTS, EOT, DecodingConfig(steps=3, max_new_tokens=2, graphs="on"))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_row_numbers_are_rounded_up_by_a_quarter_at_most():
    sizes = [round_up(n) for n in range(1, 2000)]
    assert all(n <= size <= 1.25 * n for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert sizes[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 10] and len(set(sizes)) == 40
    assert [round_up(n) for n in (64, 65, 660)] == [64, 80, 768]


# ------------------------------------------------------------------------------------------ what a fault shows
SAMPLED = dict(temperature=1.0, top_k=9, guess="sample")
CUT = [[1] * 22, [7, 2] * 10, [3] * 21, [5, 1], [9, 3, 2]]        # the first three soon reach the last position


@lru_cache
def expected(model):
    """Options and texts: rows end and move, and others go on for long."""
    config = DecodingConfig(steps=5, max_new_tokens=14, draft=4, graphs="on", **SAMPLED)
    return config, each_alone(model, CUT, -1, config, GROUPS)


def decode_with_tapes(model):
    """Raises an AssertionError where a text is not as it should be."""
    config, texts = expected(model)
    with taped(model, (4, 3)):
        same(generate(model, CUT, -1, config, GROUPS), texts)


def not_copied(monkeypatch):
    """A graph goes on with the inputs of its first call."""
    call = TapedGraphs.__call__
    def wrong(self, key, function, *inputs):
        tapes = self.tapes.get((key, *((x.shape, x.dtype) for x in inputs)))
        return call(self, key, function, *(tapes[1] if tapes else inputs))
    monkeypatch.setattr(TapedGraphs, "__call__", wrong)


def from_outside(monkeypatch):
    """The function reads the rows' tokens, not its input."""
    begin = FixedRounds.begin
    def wrong(self, shape, numbers):
        return begin(self, shape, self.rows.numbers())
    monkeypatch.setattr(FixedRounds, "begin", wrong)


def read_back(monkeypatch):
    monkeypatch.setattr(fixed_shapes.FixedLookAhead, "list_queries", fixed_shapes.LookAhead.list_queries)


def baked_in(monkeypatch):
    """Positions that are numbers of the host: a graph keeps those of its first round."""
    write_draft = FixedRounds.write_draft
    def wrong(self, B, K, numbers):
        numbers = numbers.clone()
        for place, position in zip(self.rows.places, self.rows.positions):
            numbers[1, place] = position
        return write_draft(self, B, K, numbers)
    monkeypatch.setattr(FixedRounds, "write_draft", wrong)


def kept_too_long(monkeypatch):
    """What the first pass returned is read after the second."""
    write = FixedRounds.pass_on
    def wrong(self, f, s, draft):
        grid, *rest = write(self, f, s, draft)
        if not hasattr(self, "earliest"):
            self.earliest = rest[-3]                              # y, an output of the first pass
        return grid, *rest[:-3], self.earliest, *rest[-2:]
    monkeypatch.setattr(FixedRounds, "pass_on", wrong)


def stay_behind(name):
    """Rows move, but one of their tensors does not."""
    def fault(monkeypatch):
        keep = FixedRows.keep
        def wrong(self, rows):
            kept = tensors_in(getattr(self.store, name))
            before = [z.clone() for z in kept]
            keep(self, rows)
            for z, z_before in zip(kept, before):
                z.copy_(z_before)
        monkeypatch.setattr(FixedRows, "keep", wrong)
    fault.__name__ = f"{name} stays behind"
    return fault


def no_mask(monkeypatch):
    monkeypatch.setattr(fixed_shapes, "make_mask", lambda pos, S: torch.ones(
        len(pos), 1, pos.size(1), S, dtype=torch.bool))


def wrong_places(monkeypatch):
    """The host reads what the first rows did, though some of them are idle."""
    def wrong(self, rows):
        keep(self, rows)
        self.places = list(range(len(rows)))
    keep = FixedRows.keep
    monkeypatch.setattr(FixedRows, "keep", wrong)


FAULTS = [not_copied, from_outside, read_back, baked_in, kept_too_long, stay_behind("kv"), stay_behind("x_0"),
          stay_behind("group"), stay_behind("u"), no_mask, wrong_places]
def test_without_a_fault_nothing_is_noticed(model):
    decode_with_tapes(model)
    assert [o.predicted for o in expected(model)[1]] == [3, 5, 4, 14, 14]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_noticed(model, monkeypatch, fault):
    fault(monkeypatch)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        decode_with_tapes(model)


# ------------------------------------------------------------------------------------------- Graphs and costs
def test_where_recording_fails_one_line_says_so_and_decoding_goes_on(model, monkeypatch, capsys):
    def fails(self, function, inputs):
        raise RuntimeError("no graph today\nand more")
    def enabled(device):
        graphs = Graphs(device)
        graphs.enabled = True
        return graphs
    monkeypatch.setattr(Graphs, "record", fails)
    monkeypatch.setattr(fixed_shapes, "Graphs", enabled)
    STORES.pop(model, None)
    config = DecodingConfig(steps=4, max_new_tokens=6, graphs="on")
    same(generate(model, PROMPTS, EOT, config), each_alone(model, PROMPTS, EOT, config))
    STORES.pop(model, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "no graph today" in lines[0]


class Anything(set):
    def __contains__(self, x):
        return True


def test_graphs_records_once_and_copies_inputs(model, monkeypatch):
    """Graphs itself, with a tape for what torch.cuda.graph records."""
    events = []

    class FakeGraph:
        def replay(self):
            events.append("replay")
            self.tape.poison()
            self.tape.replay()

    @contextmanager
    def record(graph, pool):
        assert pool == "pool" and events[-1] == "side stream"
        events.append("record")
        graph.tape = Tape([])
        graph.tape.known = Anything()
        with graph.tape:
            yield
        graph.tape.poison()                                       # recording computes nothing

    @contextmanager
    def stream(side):
        events.append("side stream")
        yield
    one = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in dict(graph_pool_handle=lambda: "pool", Stream=lambda: one, current_stream=lambda: one, stream=stream,
                           CUDAGraph=FakeGraph, graph=record).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(fixed_shapes, "Graphs", lambda device: Graphs(torch.device("cuda")))
    STORES.pop(model, None)
    config = DecodingConfig(steps=5, max_new_tokens=9, draft=4, graphs="on")
    for _ in range(2):
        same(generate(model, PROMPTS, EOT, config, GROUPS), each_alone(model, PROMPTS, EOT, config, GROUPS))
    assert 2 < len(STORES.pop(model).graphs.graphs) < events.count("record") < events.count("replay")


def test_out_of_memory_makes_room_and_is_told(model, monkeypatch):
    def fails(self, shape, numbers):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(FixedRounds, "begin", fails)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, PROMPTS, EOT, DecodingConfig(steps=3, graphs="on"))
    assert model not in STORES


def test_what_is_measured_decides_the_shape():
    def choose(seconds, rejected, changes, rows=1):
        out = [decode.Continuation(predicted=1000, nfe=15000, rejected=list(range(rejected)), changes=changes)] * rows
        return choose_shape(out, decode.Continuation(), DecodingConfig(), seconds)
    trunk, path = 0.8, 1.0                                        # of a GPU, in milliseconds
    seconds = {(K, W): (K * trunk + path, path) for K in (1, 4, 16) for W in (4, 15)}
    assert choose(seconds, rejected=50, changes=20) == (4, 15)    # a draft only shares the pass of the path
    assert choose(seconds, rejected=900, changes=20) == (1, 15)
    assert choose(seconds, rejected=0, changes=0) == (16, 15)
    dear = {(K, W): (K * (trunk + 1.0 * W), K * W * 1.0) for K in (1, 4, 16) for W in (4, 15)}
    assert choose(dear, rejected=500, changes=8000)[1] == 4       # arithmetic binds, and guesses change


@pytest.mark.parametrize("steps", [1, 4])
def test_bench_changes_the_same_tokens_in_fixed_shapes(steps):
    pair = wild_pair(path_init="paper")
    for p in pair.path.w.parameters():
        p.data.zero_()                                            # the trunk's tokens at every T
    texts = []
    for graphs in ("off", "on"):
        config = DecodingConfig(steps=steps, max_new_tokens=10, draft=4, graphs=graphs)
        texts.append([o.tokens for o in write(pair, PROMPTS, 5, -1, config, acceptance=0.7)])
    assert texts[0] == texts[1] != [o.tokens for o in write(pair, PROMPTS, 5, -1, config)]


def test_the_cache_of_a_batch_is_made_once_where_that_is_asked_for(model):
    cache = decode.Cache([(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))], 20)
    first = cache.first(4)[0][0].data_ptr()
    assert cache.first(20)[0][0].data_ptr() == first and cache.first(20)[0][0].shape == (1, 1, 20, 2)


def test_speculate_decides(model):
    on = DecodingConfig(graphs="on")
    assert in_fixed_shapes(model, on, False) and not in_fixed_shapes(model, on, True)
    assert not in_fixed_shapes(model, DecodingConfig(), False)
    for more, fixed in ((dict(solver="adaptive"), False), (dict(stop=0.3), True), (dict(stop=0.3, ahead=0), False),
                        (dict(guess="mean"), True), (dict(ahead=0), True), (dict(steps=1), True)):
        assert in_fixed_shapes(model, dataclasses.replace(on, **more), False) == fixed, more


def test_other_tables_of_the_same_model_get_a_store_of_their_own():
    """Its graphs read the very tensors of the tables that they were recorded with, equal ones will not do."""
    model = wild_pair()
    first, second = Tables(model), Tables(model)
    for tables in (first, second):
        tables.at((0.0, 0.5))
    _, kv = model.trunk(torch.zeros(1, 1, dtype=torch.long))
    sizes = 1, 8, 4, model.path.config.x_dim, 1
    store = find_store(model, first, sizes, kv)
    assert find_store(model, first, sizes, kv) is store and find_store(model, None, sizes, kv) is store
    assert find_store(model, second, sizes, kv) is not store
    STORES.pop(model, None)
