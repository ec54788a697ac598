"""Include and exclude patterns, and what is said of those that match nothing."""

import pytest
from torch import nn

from mpocompress.errors import NoLayerMatched
from mpocompress.surgery import find_weights, select, select_sites

NAMES = [
    f"encoder.layer.{index}.{part}"
    for index in range(2)
    for part in ("attention.query", "attention.key", "output.dense")
] + ["pooler.dense"]
REFUSED = {"embeddings.word": "a table", "encoder.layer.0.norm": "a vector"}


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), NAMES),
        (["*"], (), NAMES),
        (["*.query"], (), ["encoder.layer.0.attention.query", "encoder.layer.1.attention.query"]),
        (["*.layer.[1-9].*"], ["*.attention.*"], ["encoder.layer.1.output.dense"]),
        (["pooler.dense", "*.0.*.key"], (), ["encoder.layer.0.attention.key", "pooler.dense"]),
        ([r"re:.*\.(query|key)"], ["re:.*[.]0[.].*"], [NAMES[3], NAMES[4]]),
        ((), ["encoder.*"], ["pooler.dense"]),
        # A pattern may reach over what stays dense, and an exclude may name only that.
        (["encoder.layer.0.*"], ["embeddings.word"], NAMES[:3]),
        # Two exclude patterns may overlap.
        ((), ["encoder.*", "*.query"], ["pooler.dense"]),
        # An exclude pattern is no typo if it names a layer that is not included anyway.
        (["encoder.layer.0.*"], ["pooler.dense"], NAMES[:3]),
        ("pooler.*", "*.query", ["pooler.dense"]),
    ],
)
def test_selection(include, exclude, expected):
    assert select(NAMES, include, exclude, refused=REFUSED) == frozenset(expected)


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "*.qurey",
            r"pattern '\*\.qurey' matches no layer\. Nearest names: '\S+attention\.query', "
            r"'\S+attention\.query'",
        ),
        ("pooler.dens", r"matches no layer\. Nearest names: 'pooler\.dense'"),
        ("Pooler.Dense", r"matches no layer\. Nearest names: 'pooler\.dense'"),
        ("pooler.dense.weight", r"matches no layer\. Nearest names: 'pooler\.dense'"),
        ("embedding.word", r"matches no layer\. Nearest names: 'embeddings\.word'"),
        ("encoder.layer.0", r"names a module, .* write 'encoder\.layer\.0\.\*'"),
        ("*.attention", r"names a module, .* write '\*\.attention\.\*'"),
        (
            r"re:encoder\.layer\.\d",
            r"names a module, .* write 're:encoder\\.layer\\.\\d\[\.\]\.\*'",
        ),
        ("re:pool", r"'re:pool' matches no layer\. Nearest names: 'pooler\.dense'"),
        ("re:(query", r"'re:\(query' is not a regular expression: .* at position 0"),
        ("", r"pattern '' matches no layer"),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_is_near(option, pattern, message):
    with pytest.raises(NoLayerMatched, match=f"^{option} .*{message}"):
        select(NAMES, **{option: [pattern]}, refused=REFUSED)


def test_include_of_what_stays_dense_gives_the_reason():
    with pytest.raises(
        NoLayerMatched, match=r"matches only what stays dense: 'embeddings\.word' \(a table\)\. Lay"
    ):
        select(NAMES, ["embeddings.*"], refused=REFUSED)


def test_the_layers_that_are_named_are_those_that_the_pattern_is_about():
    refused = {f"block.{index}.norm": "a vector" for index in range(9)} | {"head.proj": "a mask"}
    names = [*NAMES, "head.out"]
    with pytest.raises(NoLayerMatched) as caught:
        select(names, ["head.proj"], refused=refused)
    said = str(caught.value)
    assert "stays dense: 'head.proj' (a mask). Layers that can be converted: 'head.out'" in said
    with pytest.raises(NoLayerMatched, match=r"'block\.7\.norm' \(stays dense: a vector\)"):
        select(names, ["block.7.nrom"], refused=refused)
    with pytest.raises(NoLayerMatched, match=r"converted: 'head\.proj' \(a mask\), .* 7 more"):
        select([], ["head.*"], refused=refused)


def test_every_pattern_must_match_not_only_one():
    with pytest.raises(NoLayerMatched, match="include pattern 'decoder"):
        select(NAMES, ["pooler.dense", "decoder.*"])
    # Asked again, it still says so: nothing is remembered from the first time.
    with pytest.raises(NoLayerMatched, match="include pattern 'decoder"):
        select(NAMES, ["pooler.dense", "decoder.*"])


def test_all_excluded():
    with pytest.raises(NoLayerMatched, match=r"'encoder.* and 3 more\) is excluded by '\*'"):
        select(NAMES, ["encoder.*"], ["*"])


def test_nothing_to_choose_from():
    with pytest.raises(NoLayerMatched, match=r"no layer that can be converted: 'a' \(empty\)\."):
        select([], refused={"a": "empty"})


def test_a_tie_group_is_taken_by_any_name_and_left_by_any_name():
    names, aliases = ["a", "b"], {"a": ["x.a", "y.a"]}
    assert select(names, ["x.*"], aliases=aliases) == {"a"}
    assert select(names, (), ["y.*"], aliases=aliases) == {"b"}
    with pytest.raises(NoLayerMatched, match="every layer"):
        select(names, ["x.*"], ["y.a"], aliases=aliases)


def test_sites_of_a_model_in_its_order():
    model = nn.ModuleDict(
        {"z": nn.Linear(2, 2), "table": nn.Embedding(3, 2), "a": nn.Linear(2, 2), "m": nn.ReLU()}
    )
    model["copy"] = model["z"]
    inventory = find_weights(model)
    assert [site.name for site in select_sites(inventory)] == ["z", "table", "a"]
    assert [site.name for site in select_sites(inventory, ["copy"])] == ["z"]
    assert [site.name for site in select_sites(inventory, exclude=["copy"])] == ["table", "a"]
    model["bag"] = nn.EmbeddingBag(3, 2)
    with pytest.raises(NoLayerMatched, match=r"'bag' \(nn.EmbeddingBag reads its weight"):
        select_sites(find_weights(model), ["bag"])
    with pytest.raises(NoLayerMatched, match=r"no layer that can be converted: \(the model itself"):
        select_sites(find_weights(nn.EmbeddingBag(3, 2)))


def test_the_model_itself_is_matched_by_a_star():
    assert [site.name for site in select_sites(find_weights(nn.Linear(2, 2)), ["*"])] == [""]
