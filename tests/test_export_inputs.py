"""Descriptions of graph inputs, and batches that are made up after them."""

from dataclasses import replace

import pytest
import torch

from mpocompress.errors import LoadError
from mpocompress.export.inputs import (
    InputSpec,
    from_json,
    guessed_spec,
    kind_of,
    other_conventions,
    random_tensors,
    symbols,
    to_json,
    value_range,
)


def spec_of(name: str, example: torch.Tensor, shape, bound=None) -> InputSpec:
    kind = kind_of(name, example)
    low, high = value_range(kind, example, bound)
    return InputSpec(
        name=name,
        slot=name,
        dtype=str(example.dtype).removeprefix("torch."),
        shape=shape,
        example_shape=tuple(example.shape),
        kind=kind,
        low=low,
        high=high,
    )


def made_up(*specs: InputSpec, **sizes: int) -> list[torch.Tensor]:
    return random_tensors(specs, sizes, torch.Generator().manual_seed(0))


def test_kinds():
    assert kind_of("attention_mask", torch.ones(2, 3, dtype=torch.int64)) == "mask"
    assert kind_of("keep", torch.ones(2, 3, dtype=torch.bool)) == "mask"
    assert kind_of("token_type_ids", torch.zeros(2, 3, dtype=torch.int64)) == "indices"
    assert kind_of("mask_bias", torch.tensor([[0.0, -1e9]])) == "values"
    assert kind_of("x", torch.zeros(2, 3)) == "values"


def test_indices_cover_the_vocabulary_or_the_example():
    example = torch.tensor([[3, 7, 5]])
    known = spec_of("ids", example, ("batch", "sequence"), bound=11)
    (ids,) = made_up(known, batch=50, sequence=20)
    assert ids.shape == (50, 20)
    assert (ids.min(), ids.max()) == (0, 10)
    (ids,) = made_up(spec_of("ids", example, ("batch", "sequence")), batch=50)
    assert ids.shape == (50, 3)
    assert (ids.min(), ids.max()) == (3, 7)


@pytest.mark.parametrize("padding", [0, 1])
def test_masks_follow_the_convention_of_the_example(padding):
    used = 1 - padding
    example = torch.tensor([[used, used, used], [used, padding, padding]])
    (mask,) = made_up(spec_of("mask", example, ("batch", "sequence")), batch=40, sequence=9)
    assert set(mask.unique().tolist()) == {0, 1}
    lengths = (mask == used).sum(dim=1)
    assert lengths.min() >= 1
    assert lengths[0] == 9
    positions = torch.arange(9).expand(40, 9)
    assert torch.equal(mask == used, positions < lengths[:, None])


@pytest.mark.parametrize(
    ("row", "dtype", "used"),
    [
        ("00011111", torch.bool, 0),
        ("11100000", torch.bool, 1),
        ("11100000", torch.int64, 1),
        ("00000111", torch.int64, 1),  # padded on the left
    ],
)
def test_columns_tell_the_convention_where_every_row_has_padding(row, dtype, used):
    example = torch.tensor([[int(digit) for digit in row]]).to(dtype)
    rows = torch.cat([example, torch.cat([example[:, :1], example[:, :-2], example[:, -1:]], 1)])
    for mask in (example, rows):
        assert value_range("mask", mask) == (1.0 - used, float(used))
    (mask,) = made_up(spec_of("mask", rows, ("batch", "sequence")), batch=40, sequence=9)
    assert (mask[0] == used).all()


def test_masks_are_made_up_in_the_other_convention_too():
    mask = spec_of("mask", torch.ones(2, 3, dtype=torch.bool), ("batch", 3))
    ids = spec_of("ids", torch.tensor([[0, 5]]), ("batch", 2))
    other = replace(mask, name="other")
    exchanged = [
        [(spec.low, spec.high) for spec in specs] for specs in other_conventions([mask, ids, other])
    ]
    kept, ranges = (0.0, 5.0), ((0.0, 1.0), (1.0, 0.0))
    assert exchanged == [
        [ranges[1], kept, ranges[1]],
        [ranges[1], kept, ranges[0]],
        [ranges[0], kept, ranges[1]],
    ]
    assert len(list(other_conventions([mask]))) == 1
    assert not list(other_conventions([ids]))


def test_floats_stay_in_the_range_of_the_example():
    example = torch.tensor([[0.25, 0.75, float("inf")]])
    (values,) = made_up(spec_of("x", example, ("batch", 3)), batch=100)
    assert values.min() >= 0.25
    assert values.max() <= 0.75
    (normal,) = made_up(spec_of("x", torch.zeros(1, 3), ("batch", 3)), batch=100)
    assert normal.std() > 0.5


def test_equal_seeds_give_equal_batches():
    spec = spec_of("x", torch.randn(2, 3), ("batch", 3))
    assert torch.equal(made_up(spec, batch=4)[0], made_up(spec, batch=4)[0])


def test_json_round_trip():
    specs = (
        spec_of("ids", torch.tensor([[3, 7]]), ("batch", "sequence"), bound=9),
        spec_of("x", torch.randn(2, 3), ("batch", 3)),
    )
    assert from_json(to_json(specs, [("use_cache", False)])) == (specs, (("use_cache", False),))
    with pytest.raises(LoadError, match="metadata is damaged"):
        from_json('{"inputs": [{"name": "x"}]}')


def test_what_a_foreign_graph_says():
    ids = guessed_spec("input_ids", "input_ids", "int64", ["N", None], 100)
    mask = guessed_spec("attention_mask", 1, "int64", [None, 8], None)
    assert (ids.kind, ids.high, ids.shape) == ("indices", 99, ("N", "input_ids_1"))
    assert (mask.kind, mask.high, mask.shape) == ("mask", 1, ("batch", 8))
    assert list(symbols([ids, mask])) == ["N", "input_ids_1", "batch"]
    assert ids.describe() == "'input_ids': int64 (N, input_ids_1)"
