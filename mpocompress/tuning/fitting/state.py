"""The fits of an interrupted run on disk: one file a layer, found again by all that led to it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from mpocompress.files import make_state_folder
from mpocompress.mpo import MPO
from mpocompress.surgery import WeightSite
from mpocompress.tuning.fitting.plan import FitOptions, FittedWeight, SitePlan
from mpocompress.tuning.lockstep import Call
from mpocompress.tuning.state_file import StateFacts, StateFormat, fingerprint, tensors_of
from mpocompress.tuning.statistics.later_calls import LaterCalls


class _Facts(StateFacts):
    layer: str
    shape: tuple[int, int]
    relative_output_error: float
    rows: int


_FORMAT = StateFormat(
    what="state",
    anew="fit this layer anew",
    key="mpocompress.fitted_layer",
    version=2,
    facts=_Facts,
)


class FitStore:
    """Fitted layers in a folder.

    A layer's fit depends on the model, the data, the options and all layers fitted before it. The
    name of its file is a hash of these: what another run left is never taken for this run's, and
    searches that build several models share what they have in common. Layers that are rounded to
    integers or half floats are not kept, but fitted again.

    Args:
        folder: made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prefix = hashlib.sha256()

    def begin(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        output_metrics: Mapping[nn.Module, Tensor],
        later: Mapping[WeightSite, LaterCalls],
        options: FitOptions,
    ) -> None:
        """Start a pass through the layers of this model with this data.

        Raises:
            SaveError: the folder cannot be made.
        """
        make_state_folder(self._folder)
        # The order of the metrics is that of the model's modules, not that of a mapping.
        metrics = (output_metrics[m] for m in model.modules() if m in output_metrics)
        tensors = [*model.parameters(), *model.buffers(), *tensors_of(calls)]
        names = [name for name, _ in model.named_parameters()]
        again = [[site.name, found.rows, found.first_rows] for site, found in later.items()]
        text = json.dumps([_FORMAT.version, names, asdict(options), len(calls), *again])
        seen = [tensor for found in later.values() for tensor in found.tensors()]
        self._prefix = hashlib.sha256(text.encode())
        self._prefix.update(fingerprint(chain(tensors, metrics, seen)).encode())

    def reach(self, plan: SitePlan) -> FittedWeight | None:
        """The fit of the layer that the pass comes to; None if it is not there.

        From now on the layer's plan is part of what led here.

        Raises:
            LoadError: a truncated or foreign file.
        """
        layout = [list(plan.layout.pairs), list(plan.bond_dims), plan.stays_dense]
        own = [plan.site.name, *layout, asdict(plan.storage)]
        self._prefix.update(json.dumps(own).encode())
        path = self._path()
        if plan.storage.rounds or not path.exists():
            return None
        device = plan.site.device

        def build(facts: _Facts, tensors: Mapping[str, Tensor]) -> FittedWeight:
            cores = [tensors[f"core.{site}"] for site in range(len(plan.bond_dims) + 1)]
            bias = tensors.get("bias")
            return FittedWeight(
                mpo=MPO([core.to(device) for core in cores], shape=facts.shape),
                bias=None if bias is None else bias.to(device),
                relative_output_error=facts.relative_output_error,
                rows=facts.rows,
            )

        return _FORMAT.read(path, build)

    def put(self, plan: SitePlan, fitted: FittedWeight) -> None:
        """Keep the fit of the layer that was reached last.

        Raises:
            SaveError: it cannot be written.
        """
        if plan.storage.rounds:
            return
        tensors = {f"core.{site}": core for site, core in enumerate(fitted.mpo.cores)}
        if fitted.bias is not None:
            tensors["bias"] = fitted.bias
        facts = _Facts(
            layer=plan.site.name,
            shape=fitted.mpo.shape,
            relative_output_error=fitted.relative_output_error,
            rows=fitted.rows,
        )
        _FORMAT.write(self._path(), facts, tensors)

    def _path(self) -> Path:
        return self._folder / f"layer-{self._prefix.hexdigest()[:32]}.safetensors"
