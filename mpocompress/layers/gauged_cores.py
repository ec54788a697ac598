"""The cores of a layer in the identity gauge, as parameters and index buffers."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mpocompress.errors import ContractionError
from mpocompress.mpo.identity_gauge import (
    IdentityGauge,
    check_rows,
    index_dtype,
    rebuild_core,
    row_sources,
)


class GaugedCore(nn.Module):
    """One core whose pivot rows are the identity; the other rows are the parameter `free`.

    Args:
        free: (X - R, R), X = left * out * in, R the right bond. A parameter is taken as it is.
        pivots: (R,), ascending row numbers; saved with the state.
        shape: (left, out, in, R) of the core.
    """

    free: nn.Parameter
    pivots: Tensor
    sources: Tensor

    def __init__(self, free: Tensor, pivots: Tensor, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.free = free if isinstance(free, nn.Parameter) else nn.Parameter(free.detach())
        self.register_buffer("pivots", pivots)
        # Follows from the pivots, so it is no part of the state.
        self.register_buffer("sources", row_sources(pivots, free.shape[0]), persistent=False)
        self.shape = shape

    def forward(self) -> Tensor:
        """The ordinary core (left, out, in, right), differentiable in the free rows."""
        return rebuild_core(self.free, self.pivots, self.sources, self.shape)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        pivots = state_dict.get(f"{prefix}pivots")
        if isinstance(pivots, Tensor) and pivots.shape == self.pivots.shape:
            rows = self.free.shape[0] + self.free.shape[1]
            try:  # before anything is overwritten
                check_rows(0, self.free, pivots, rows)
            except ContractionError as error:
                error_msgs.append(f"{prefix}pivots: {error}")
                return
            # The dtype of another tool's file may be wider, and load_state_dict(assign=True) keeps
            # what it is given.
            state_dict = {**state_dict, f"{prefix}pivots": pivots.to(index_dtype(rows))}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        sources = row_sources(self.pivots, self.free.shape[0])
        self.sources = sources.to(self.free.device)


class GaugedCores(nn.Module):
    """Stands where `MPOLinear` has its list of cores: iterating it rebuilds ordinary cores.

    Its state has `0.free`, `0.pivots`, `1.free`, ... for all cores but the last, which is stored
    whole under its number, as in an ordinary layer.

    Args:
        gauge: its tensors become parameters and buffers; parameters are taken as they are.
    """

    def __init__(self, gauge: IdentityGauge) -> None:
        super().__init__()
        left = 1
        for site, (free_FR, pivots_R) in enumerate(zip(gauge.free, gauge.pivots, strict=True)):
            shape = (left, *gauge.layout.pairs[site], int(pivots_R.shape[0]))
            self.add_module(str(site), GaugedCore(free_FR, pivots_R, shape))
            left = shape[3]
        last = gauge.last
        last = last if isinstance(last, nn.Parameter) else nn.Parameter(last.detach())
        self.register_parameter(str(len(gauge.free)), last)
        self.bond_dims = gauge.bond_dims

    @property
    def gauged(self) -> tuple[GaugedCore, ...]:
        """All cores but the last, as they are stored."""
        return tuple(module for module in self._modules.values() if isinstance(module, GaugedCore))

    @property
    def last(self) -> Tensor:
        """The last core (left, out, in, 1), whole: the parameter, or what stands in for it."""
        last: Tensor = getattr(self, str(len(self.gauged)))
        return last

    def __len__(self) -> int:
        return len(self.gauged) + 1

    def __iter__(self) -> Iterator[Tensor]:
        for core in self.gauged:
            yield core()
        yield self.last

    def __getitem__(self, site: int) -> Tensor:
        return list(self)[site]
