"""Models of transformers, tiny and with random weights: converted, run, saved, loaded, exported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

import mpocompress as mpo
from mpocompress.export import export_onnx, verify
from mpocompress.layers import MPOLayer
from mpocompress.surgery import find_weights, open_modules
from tests.tolerances import TOL


@dataclass(frozen=True)
class Family:
    """A model, and forward arguments for it.

    Attributes:
        make: random weights, evaluation mode.
        batches: forward arguments.
        tied: names of two modules with one weight, if there are such.
    """

    make: Callable[[], nn.Module]
    batches: Callable[[], list[dict[str, Tensor]]]
    tied: tuple[str, str] | None = None


def built(cls: Any, config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = cls(config).eval()
            # As initialized, many of these models say nearly the same whatever the input is.
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            return model

    return make


def ids(vocabulary: int, *names: str, rows: int = 4, length: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {name: torch.randint(3, vocabulary, (rows, length), generator=generator) for name in names}
        for _ in range(3)
    ]


def floats(name: str, *shape: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randn(4, *shape, generator=generator)} for _ in range(3)]


def with_decoder(batches: list[dict[str, Tensor]], vocabulary: int) -> list[dict[str, Tensor]]:
    decoder = ids(vocabulary, "decoder_input_ids", length=4)
    return [one | other for one, other in zip(batches, decoder, strict=True)]


def masked(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 4:] = 0
    return batches


FAMILIES = {
    "BERT": Family(
        built(
            transformers.BertForMaskedLM,
            transformers.BertConfig(
                vocab_size=120,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=16,
            ),
        ),
        lambda: masked(ids(120, "input_ids")),
        ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ),
    "GPT-2": Family(
        built(
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config(
                vocab_size=120,
                n_embd=32,
                n_layer=1,
                n_head=2,
                n_positions=16,
                bos_token_id=0,
                eos_token_id=1,
            ),
        ),
        lambda: ids(120, "input_ids"),
        ("transformer.wte", "lm_head"),
    ),
    "LLaMA": Family(
        built(
            transformers.LlamaForCausalLM,
            transformers.LlamaConfig(
                vocab_size=120,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
                max_position_embeddings=32,
            ),
        ),
        lambda: ids(120, "input_ids"),
    ),
    "Mixtral": Family(
        built(
            transformers.MixtralForCausalLM,
            transformers.MixtralConfig(
                vocab_size=120,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=24,
                num_local_experts=4,
                num_experts_per_tok=2,
                max_position_embeddings=32,
                experts_implementation="eager",  # the others have no float64
            ),
        ),
        lambda: ids(120, "input_ids"),
    ),
    "ViT": Family(
        built(
            transformers.ViTForImageClassification,
            transformers.ViTConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=16,
                patch_size=8,
                num_labels=10,
            ),
        ),
        lambda: floats("pixel_values", 3, 16, 16),
    ),
    "T5": Family(
        built(
            transformers.T5ForConditionalGeneration,
            transformers.T5Config(
                vocab_size=120,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=1,
                num_heads=4,
                decoder_start_token_id=0,
            ),
        ),
        lambda: with_decoder(ids(120, "input_ids"), 120),
    ),
    "Whisper": Family(
        built(
            transformers.WhisperForConditionalGeneration,
            transformers.WhisperConfig(
                vocab_size=120,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                num_mel_bins=8,
                max_source_positions=10,
                max_target_positions=12,
                decoder_start_token_id=1,
                pad_token_id=2,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        lambda: with_decoder(floats("input_features", 8, 20), 120),
        ("model.decoder.embed_tokens", "proj_out"),
    ),
}
EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch, **caching(model)).logits
    return found


def caching(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if getattr(model.config, "use_cache", False) else {}


@EVERY
def test_nearly_all_parameters_in_matrices_can_be_converted(family):
    model = family.make()
    inventory = find_weights(open_modules(model))
    assert inventory.parameters == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    convertible = sum(site.parameters for site in inventory.sites)
    left = {entry.name: entry.reason for entry in inventory.kept if len(entry.shape) >= 2}
    assert convertible >= 0.95 * matrices, left
    assert all(left.values())


@EVERY
def test_at_the_maximal_bond_dimension_nothing_changes(family):
    dense = family.make().double()
    batch = {
        name: value.double() if value.is_floating_point() else value
        for name, value in family.batches()[0].items()
    }
    expected = logits(dense, batch)
    result = mpo.compress(dense, bond_dim=10_000, layout="svd", include=["*"], if_smaller=False)
    assert_close(logits(result.model, batch), expected, **TOL[torch.float64]["apply"])
    report = result.report
    matrices = [
        layer for layer in report.layers if len(layer.shape) >= 2 and layer.kind != "buffer"
    ]
    changed = sum(layer.parameters.dense for layer in matrices if layer.status == "compressed")
    assert changed >= 0.95 * sum(layer.parameters.dense for layer in matrices)
    assert report.totals.parameters.model.dense == sum(p.numel() for p in dense.parameters())
    if family.tied is not None:
        first, second = map(result.model.get_submodule, family.tied)
        assert isinstance(first, MPOLayer)
        assert first.cores[0] is second.cores[0]


@EVERY
def test_fitted_to_data_saved_and_loaded(family, tmp_path):
    dense = family.make()
    batches = family.batches()
    result = mpo.compress(dense, ratio=2, of="layers", data=batches)
    assert result.report.totals.parameters.layers.ratio >= 2
    plain = mpo.compress(dense, result.plan)
    wanted = logits(dense, batches[0])
    errors = [float((logits(r.model, batches[0]) - wanted).norm()) for r in (result, plain)]
    assert errors[0] < errors[1]
    mpo.save(result, tmp_path / "out")
    loaded = mpo.load(tmp_path / "out", model=family.make())
    assert torch.equal(logits(loaded, batches[0]), logits(result.model, batches[0]))
    again = family.make()
    state = mpo.densify(tmp_path / "out")
    assert set(again.state_dict()) == set(state)
    again.load_state_dict(state)
    assert_close(
        logits(again, batches[0]), logits(loaded, batches[0]), **TOL[torch.float32]["apply"]
    )


@pytest.mark.onnx
@EVERY
def test_onnx_runtime_agrees(family, tmp_path):
    dense = family.make()
    model = mpo.compress(dense, ratio=2, of="layers", include=["*"]).model
    batch = family.batches()[0]
    export_onnx(model, tmp_path / "model.onnx", batch)
    found = verify(tmp_path / "model.onnx", model, family.batches(), batch_sizes=(1, 3))
    found.raise_if_failed()
