"""plumbing/dataset.py: batches against loops over the examples; whatever is damaged on disk is refused in one line."""
import random
from pathlib import Path

import numpy as np
import pytest

from configurator import UserError
from plumbing.dataset import batches_of_epoch, load_batch, load_manifest, load_split
from tasks import load_problems


def test_a_batch_is_the_examples_padded_and_an_epoch_has_each_of_them_once(arithmetic):
    """Against loops over the examples."""
    data = load_split(arithmetic, "val")
    idx, (rows, columns), y, group = load_batch(data, [7, 3, 490], "cpu")
    found = {(int(r), int(c)): int(t) for r, c, t in zip(rows, columns, y, strict=True)}
    want, longest = {}, 0
    for row, i in enumerate((7, 3, 490)):
        tokens, mask = (z[data.offsets[i]:data.offsets[i + 1]].tolist() for z in (data.tokens, data.mask))
        longest = max(longest, len(tokens) - 1)
        assert idx[row, :len(tokens) - 1].tolist() == tokens[:-1] and group[row] == data.groups[i]
        want |= {(row, k): tokens[k + 1] for k in range(len(tokens) - 1) if mask[k + 1]}
    assert found == want and idx.shape == (3, longest)

    lengths = np.diff(data.offsets)
    epoch = batches_of_epoch(lengths, 16, 2, [1, 0])
    assert epoch.shape == (31, 2, 8) and len(set(epoch.flatten().tolist())) == 31 * 16
    assert np.mean([lengths[ids].max() - lengths[ids].mean() for step in epoch for ids in step]) < 1
    assert (batches_of_epoch(lengths, 16, 2, [1, 0]) == epoch).all()
    assert (batches_of_epoch(lengths, 16, 2, [1, 1]) != epoch).any()
    assert set(batches_of_epoch(lengths[:5], 8, 1, 0).flatten().tolist()) == set(range(5))    # to fill one


# ---------------------------------------------------------------- reading back

def test_missing_data_names_the_command(arithmetic, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"python prepare_data\.py gsm8k$"):
        load_split("data/gsm8k", "train")
    with pytest.raises(UserError, match=r"python prepare_data\.py TASK --out_dir=else/arithmetic"):
        load_manifest(Path("else/arithmetic"))
    with pytest.raises(UserError, match="no split 'dev'.*train, val, test"):
        load_split(arithmetic, "dev")


@pytest.fixture
def copy(arithmetic, tmp_path):
    """A copy of the prepared data to damage."""
    for path in arithmetic.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}",
                                  '{"counts": {}, "group_names": []}', "\x00"])
def test_a_damaged_manifest_is_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json is damaged.*python prepare_data.py"):
        load_split(copy, "val")


def test_damaged_arrays_are_refused(copy):
    path = copy / "val.npz"
    good = path.read_bytes()
    arrays = dict(np.load(path))
    def refused(**changes):
        np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
        with pytest.raises(UserError, match="damaged.*python prepare_data.py"):
            load_split(copy, "val")
    load_split(copy, "val")
    for name, array in arrays.items():
        refused(**{name: None})                      # absent
        refused(**{name: array[:-1]})                # too short
        refused(**{name: array.astype(np.float32)})  # another type
        refused(**{name: array.astype(object)})      # a pickle
    offsets, tokens, groups, mask = (arrays[k].copy() for k in ("offsets", "tokens", "groups", "mask"))
    offsets[3], tokens[5], groups[0], mask[0] = offsets[9], 60000, 200, True
    shifted, endless = arrays["offsets"].copy(), arrays["tokens"].copy()
    shifted[0], endless[-1] = 1, 0
    for changes in (dict(offsets=offsets), dict(tokens=tokens), dict(groups=groups), dict(mask=mask),
                    dict(offsets=shifted), dict(tokens=endless)):
        refused(**changes)
    for bad in (b"", b"junk", good[:-100], good[:5000]):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="damaged"):
            load_split(copy, "val")
    for i in range(40):                              # one flipped byte, in the arrays or in the zip's fields
        place = random.Random(i).randrange(len(good))
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1:])
        try:
            data = load_split(copy, "val")           # fine if the byte says nothing about the content
        except UserError:
            continue
        assert all(np.array_equal(arrays[k], getattr(data, k)) for k in arrays)


def test_damaged_problems_are_refused(copy):
    """By load_problems alone: training does not read them."""
    path = copy / "val.jsonl"
    lines = path.read_text().splitlines()
    assert len(load_problems(copy, "val")) == len(lines)
    first = lines[0]
    for line in ("junk", "[1]", "{}", first.replace('"task": "arithmetic"', '"task": "nonsense"'),
                 first.replace('" step', '" leap').replace(' steps"', ' leaps"'), first.replace('"answer"', '"label"')):
        path.write_text("\n".join([line, *lines[1:]]))
        with pytest.raises(UserError, match="val.jsonl is missing or damaged .*python prepare_data.py"):
            load_problems(copy, "val")
    for content in ("\n".join(lines[:-1]), "\n".join([*lines, first]), "junk", "", None):
        path.write_text(content) if content is not None else path.unlink()
        with pytest.raises(UserError, match="val.jsonl is missing or damaged .*python prepare_data.py"):
            load_problems(copy, "val")
    load_split(copy, "val")
    with pytest.raises(UserError, match="no split 'dev'"):
        load_problems(copy, "dev")
