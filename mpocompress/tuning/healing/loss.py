"""How far a compressed model is from the dense one: at its outputs and in its hidden states.

Padded tokens count nowhere: see `moments.real_rows`.
"""

# Shape suffixes: N rows, K classes or features.

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError, OutputsDifferError
from mpocompress.tuning.healing.blocks import watched_outputs
from mpocompress.tuning.lockstep import Call, floating_outputs, seeded_call
from mpocompress.tuning.objectives import relative_square
from mpocompress.tuning.padding import keep_mask, real_rows
from mpocompress.tuning.ruled_out import both_without_infinite

OutputLoss = Literal["auto", "kl", "mse", "cosine"]

TEMPERATURE = 2.0
# A single output (batch, columns) with at most so many columns may be logits.
MAX_CLASSES = 1000
# Where a softmax at the temperature gives all but the first class less than e^-25 on most rows, as
# of quantities in small units, its divergence says which is the largest, and is as large as the
# units make it. Digits, trained for 800 epochs without any decay, have e^-13.
_SATURATED = 25.0
# By so much sums of distributions are off that were rounded, to half precision or a few decimals.
_ROUNDED = 1e-2
# What stands beside logits and is no answer, by the end of its name.
_NO_ANSWERS = ("hidden_state", "hidden_states", "attentions", "loss")
_NOT_COMPARABLE = (
    "give the dense model that was compressed. Where values decide how many outputs there are, as "
    "in a detector, let the model return what it decides by."
)
# Of what the dense model did with batches that come again.
_KEPT_BYTES = 2**31


def check_output_loss(name: str) -> None:
    """Refuse a name that is no output loss.

    Raises:
        DataError: the name, and those that there are.
    """
    if name not in get_args(OutputLoss):
        raise DataError(f"output_loss {name!r} is none of {', '.join(get_args(OutputLoss))}.")


def loss_for(kind: OutputLoss, calls: Iterable[Call]) -> OutputLoss:
    """What "auto" is for data: "mse" where labels are quantities, so that no output is logits."""
    labels = (getattr(call, "labels", None) for call in calls)
    quantities = any(isinstance(found, Tensor) and not _name_classes(found) for found in labels)
    return "mse" if kind == "auto" and quantities else kind


def _name_classes(labels: Tensor) -> bool:
    """Whether these may be numbers of classes, in floats, too, or one distribution each."""
    if not labels.is_floating_point():
        return True
    single = labels.ndim < 2 or labels.shape[-1] == 1
    if single:
        return bool((labels == labels.round()).all())
    sums = labels.double().sum(-1)
    return bool((labels >= 0).all()) and bool(((sums - 1).abs() <= _ROUNDED).all())


def output_loss(
    ours: Any,
    dense: Any,
    keep: Tensor | None,
    kind: OutputLoss = "auto",
    *,
    vocabularies: Collection[int] = (),
) -> Tensor:
    """The difference of two outputs of the same structure, as a scalar that is 0 at equality.

    Args:
        ours: what the compressed model returned; it carries the gradient.
        dense: what the dense model returned.
        keep: boolean (batch, sequence), True for real tokens; None if all are.
        kind: "kl": KL(dense || ours) of the softmax at temperature 2, times its square, in nats;
            "mse": E|y - y^|^2 / E|y|^2, the mean over all floating outputs; "cosine": mean of
            1 - cos of the rows (an output with more axes has a row for each token), for embeddings.
            Of an output with a `.logits` its own tensors count, and not the hidden states, the
            attentions or the loss that may be in it.
            "auto": "mse", plus "kl" where the output may be logits: it has a `.logits`, or is a
            single tensor (batch, 2 to 1000 columns), or one with more axes and as many columns as
            there are words. That does no harm to most embeddings and quantities, too, of which KL
            alone would lose the scale and the offset; where the softmax of the dense model is
            saturated throughout, as that of quantities in small units, it is "mse" alone.
        vocabularies: how many words the model's tables have.

    Raises:
        OutputsDifferError: outputs of unlike structure or shape, or none that is floating.
        DataError: "kl" where nothing can be logits.
    """
    check_output_loss(kind)
    dense_logits, our_logits = (
        _logits(found, kind == "kl", vocabularies) for found in (dense, ours)
    )
    if kind == "kl" and (dense_logits is None or our_logits is None):
        raise DataError(
            "output_loss 'kl' needs logits: an output with .logits, or a single floating tensor "
            "(..., classes) with at least two classes. Try output_loss='mse'."
        )
    terms: list[Tensor] = []
    if kind == "auto" and dense_logits is not None:
        dense_logits = None if _is_saturated(real_rows(dense_logits, keep)) else dense_logits
    if kind in ("auto", "kl") and dense_logits is not None and our_logits is not None:
        terms.append(_kl(our_logits, dense_logits, keep))
    if kind == "kl":
        return terms[0]
    our_leaves, leaves = _compared(ours), _compared(dense)
    if len(our_leaves) != len(leaves) or not leaves:
        raise OutputsDifferError(
            f"the compressed model has {len(our_leaves)} floating outputs and the reference "
            f"{len(leaves)}; {_NOT_COMPARABLE}"
        )
    pairs = list(zip(our_leaves, leaves, strict=True))
    measure = _one_minus_cosine if kind == "cosine" else normalized_error
    terms.append(torch.stack([measure(a, b, keep) for a, b in pairs]).mean())
    return torch.stack(terms).sum()


def vocabularies_of(model: nn.Module) -> frozenset[int]:
    """How many words its tables have: a language model's output has a column for each."""
    return frozenset(
        module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)
    )


def _compared(output: Any) -> list[Tensor]:
    """The floating tensors of an output that are answers, in its order."""
    logits = getattr(output, "logits", None)
    if logits is None:
        return floating_outputs(output)
    if isinstance(output, Mapping):
        own = dict(output)
    elif isinstance(output, tuple) and hasattr(output, "_asdict"):
        own = output._asdict()
    else:
        own = dict(getattr(output, "__dict__", {}))
    own.setdefault("logits", logits)
    answers = [
        value
        for name, value in own.items()
        if isinstance(value, Tensor) and value.ndim and not str(name).endswith(_NO_ANSWERS)
    ]
    return floating_outputs(answers)


def normalized_error(ours: Tensor, dense: Tensor, keep: Tensor | None) -> Tensor:
    """E|y - y^|^2 / E|y|^2 over the rows that are not padding.

    Raises:
        OutputsDifferError: unlike shapes, or other answers that are ruled out.
    """
    return relative_square(*both_without_infinite(*_rows(ours, dense, keep)))


class Distance:
    """The loss of one batch: the outputs and, where there are blocks, the hidden states.

    Args:
        model: compressed.
        reference: dense.
        blocks: names of the blocks whose outputs are compared; may be empty.
        output_loss: see `output_loss`.
        hidden_weight: weight of the mean of the blocks' normalized errors.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        blocks: Sequence[str],
        output_loss: OutputLoss,
        hidden_weight: float,
    ) -> None:
        self._model = model
        self._reference = reference
        self._blocks = tuple(blocks) if hidden_weight > 0 else ()
        self._kind = output_loss
        self._vocabularies = vocabularies_of(reference)
        self._hidden_weight = hidden_weight
        self._kept: dict[int, tuple[Any, Mapping[str, list[Tensor]]] | None] = {}
        self._seeds: dict[int, int] = {}
        self._alive: list[Call] = []
        self._kept_bytes = 0

    def keep(self, calls: Sequence[Call]) -> None:
        """Compute what the dense model does with these calls only once, and keep it.

        For calls that are asked for again and again: the first to be asked for are kept, up to
        2 GiB in all. The dense model's pass is a third of a step at half the parameters.
        """
        self._alive = list(calls)  # so that identity means identity
        self._kept = {id(call): None for call in self._alive}
        self._seeds = {id(call): number for number, call in enumerate(self._alive)}
        self._kept_bytes = 0

    def _dense(self, call: Call, seed: int) -> tuple[Any, Mapping[str, list[Tensor]]]:
        found = self._kept.get(id(call))
        if found is None:
            with torch.no_grad(), watched_outputs(self._reference, self._blocks) as hidden:
                found = (seeded_call(self._reference, call, seed), hidden)
            if id(call) in self._kept:
                size = sum(tensor.nbytes for tensor in floating_outputs(found))
                if self._kept_bytes + size <= _KEPT_BYTES:
                    self._kept[id(call)] = found
                    self._kept_bytes += size
        return found

    def __call__(self, call: Call) -> Tensor:
        """A scalar; its gradient reaches the compressed model only.

        Raises:
            DataError: outputs that cannot be compared.
        """
        keep = keep_mask(call.kwargs)
        # What the dense model draws at random the compressed one draws, too: other numbers in every
        # step, the same ones with a call whose outputs are kept.
        seed = self._seeds.get(id(call))
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        dense, dense_hidden = self._dense(call, seed)
        with watched_outputs(self._model, self._blocks) as our_hidden:
            ours = seeded_call(self._model, call, seed)
        loss = output_loss(ours, dense, keep, self._kind, vocabularies=self._vocabularies)
        hidden = _hidden_errors(our_hidden, dense_hidden, keep)
        return loss + self._hidden_weight * torch.stack(hidden).mean() if hidden else loss


def _hidden_errors(
    ours: Mapping[str, list[Tensor]], dense: Mapping[str, list[Tensor]], keep: Tensor | None
) -> list[Tensor]:
    return [
        normalized_error(a, b, keep)
        for name in dense
        if len(ours[name]) == len(dense[name])
        for a, b in zip(ours[name], dense[name], strict=True)
        if a.shape == b.shape
    ]


def _logits(output: Any, asked_for: bool, vocabularies: Collection[int]) -> Tensor | None:
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits if logits.shape[-1] >= 2 else None
    leaves = floating_outputs(output)
    if len(leaves) != 1 or leaves[0].ndim < 2 or leaves[0].shape[-1] < 2:
        return None
    columns = leaves[0].shape[-1]
    may_be = columns <= MAX_CLASSES if leaves[0].ndim == 2 else columns in vocabularies
    return leaves[0] if asked_for or may_be else None


def _is_saturated(logits_NK: Tensor) -> bool:
    """Whether a softmax at the temperature tells no more than which is the largest, of most rows.

    By the two largest of each row, since impossible classes may have a huge negative number.
    """
    first_N, second_N = logits_NK.detach().float().topk(2, dim=-1).values.unbind(-1)
    return bool((first_N - second_N).median() > _SATURATED * TEMPERATURE)


def _rows(ours: Tensor, dense: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    if ours.shape != dense.shape:
        raise OutputsDifferError(
            f"an output has shape {tuple(ours.shape)} in the compressed model and "
            f"{tuple(dense.shape)} in the reference; {_NOT_COMPARABLE}"
        )
    if dense.ndim < 2:
        ours, dense = ours.reshape(-1, 1), dense.reshape(-1, 1)
    return real_rows(ours, keep), real_rows(dense, keep).detach().to(ours)


def _kl(ours: Tensor, dense: Tensor, keep: Tensor | None) -> Tensor:
    ours_NK, dense_NK = _rows(ours, dense, keep)
    # What is ruled out has no share in either distribution.
    ours_NK, dense_NK = both_without_infinite(
        (ours_NK / TEMPERATURE).log_softmax(-1), (dense_NK / TEMPERATURE).log_softmax(-1)
    )
    divergence = nn.functional.kl_div(ours_NK, dense_NK, reduction="sum", log_target=True)
    return TEMPERATURE**2 * divergence / max(1, len(dense_NK))


# The cosines of pairs are no loss of their own: with their errors added, of pairs in a batch or
# with a bank of embeddings, cosines and the ranks of MiniLM's pairs were worse after 120 steps.
def _one_minus_cosine(ours: Tensor, dense: Tensor, keep: Tensor | None) -> Tensor:
    ours_NK, dense_NK = both_without_infinite(*_rows(ours, dense, keep))
    lost_N = 1 - nn.functional.cosine_similarity(ours_NK, dense_NK, dim=-1)
    # Of rows of zeros it would be 1.
    lost_N = lost_N.masked_fill((ours_NK == dense_NK).all(dim=-1), 0.0)
    return lost_N.sum() / max(1, len(lost_N))
