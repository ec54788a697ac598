"""A function of discrete inputs as the amplitudes of a many-body state.

n inputs of d values each: a configuration x is a row of n digits 0 to d - 1, and psi(x) = f(x),
not normalized. The first input is the leftmost site and the most significant digit.
"""

# Shape suffixes: B configurations, N sites.

from collections.abc import Callable
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor, nn

from mpocompress.errors import DataError
from mpocompress.layers.modes import evaluation_mode

Encoding = Literal["spins", "bits", "digits", "one-hot"] | Callable[[Tensor], Tensor]
"""How digits become what the function takes: see `encode`."""

# 2^20 amplitudes take 8 MB, and an SVD across the middle 3 s.
MAX_AMPLITUDES = 2**20
_ROWS = 65536


def encode(digits_BN: Tensor, encoding: Encoding, local_dim: int, dtype: torch.dtype) -> Tensor:
    """Digits as a function's input.

    Args:
        digits_BN: int64, 0 to `local_dim` - 1.
        encoding: "spins" spreads the digits evenly from 1 down to -1 (a bit b becomes 1 - 2 b);
            "bits" from 0 up to 1; "digits" leaves them int64; "one-hot" gives (B, N * local_dim);
            a function is called with the digits.
        local_dim: d.
        dtype: of what is made.

    Raises:
        DataError: no such encoding.
    """
    if callable(encoding):
        return encoding(digits_BN)
    if encoding == "digits":
        return digits_BN
    if encoding == "one-hot":
        return nn.functional.one_hot(digits_BN, local_dim).flatten(1).to(dtype)
    shares_BN = digits_BN.to(dtype) / max(local_dim - 1, 1)
    if encoding == "bits":
        return shares_BN
    if encoding == "spins":
        return 1 - 2 * shares_BN
    raise DataError(
        f"encoding {encoding!r}: there are 'spins', 'bits', 'digits', 'one-hot', or a function."
    )


class AmplitudeFunction:
    """psi as a function of digits, evaluated in batches without gradients.

    Args:
        function: takes the encoded batch and gives one number a row, real or complex, shape (B,)
            or (B, 1). A module is called in evaluation mode, in its dtype and on its device.
        num_sites: n, at least 1.
        local_dim: d, at least 2.
        encoding: see `encode`.
        log_amplitudes: the function gives ln psi. Amplitudes are then relative to that of the
            first configuration evaluated, so that the exponential is in range.

    Raises:
        DataError: impossible sizes.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        num_sites: int,
        *,
        local_dim: int = 2,
        encoding: Encoding = "spins",
        log_amplitudes: bool = False,
    ) -> None:
        whole = isinstance(num_sites, Integral) and isinstance(local_dim, Integral)
        if not whole or num_sites < 1 or local_dim < 2:
            raise DataError(
                f"num_sites {num_sites}, local_dim {local_dim}: a state has at least 1 site of at "
                "least 2 values, both integers."
            )
        self.num_sites, self.local_dim = num_sites, local_dim
        self.evaluations = 0
        self.largest = 0.0
        self.precision = 0.0  # machine precision of what the function gave
        self._function, self._encoding, self._log = function, encoding, log_amplitudes
        self._shift: Tensor | None = None
        parameter = (
            next(iter(function.parameters()), None) if isinstance(function, nn.Module) else None
        )
        self._dtype = parameter.dtype if parameter is not None else torch.float64
        self.device = parameter.device if parameter is not None else torch.device("cpu")

    def __call__(self, digits_BN: Tensor) -> Tensor:
        """Amplitudes (B,), float64 or complex128, on the function's device.

        Raises:
            DataError: the function does not give one finite number a row.
        """
        parts = [self._evaluate(rows) for rows in digits_BN.to(self.device).split(_ROWS)]
        return torch.cat(parts)

    def _evaluate(self, digits_BN: Tensor) -> Tensor:
        count = digits_BN.shape[0]
        inputs = encode(digits_BN, self._encoding, self.local_dim, self._dtype)
        with torch.no_grad():
            if isinstance(self._function, nn.Module):
                with evaluation_mode(self._function):
                    values = self._function(inputs)
            else:
                values = self._function(inputs)
        if not isinstance(values, Tensor) or values.numel() != count:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise DataError(
                f"the function gave {shape} for {count} configurations. An amplitude is one number "
                "a row: choose one output, as in lambda x: model(x)[:, 0]."
            )
        values = values.reshape(count)
        if values.is_floating_point() or values.is_complex():
            self.precision = max(self.precision, torch.finfo(values.dtype).eps)
        values = values.to(torch.complex128 if values.is_complex() else torch.float64)
        if self._log and count:
            if self._shift is None:
                self._shift = values[0]
            values = (values - self._shift).exp()
        if not bool(
            torch.isfinite(torch.view_as_real(values) if values.is_complex() else values).all()
        ):
            raise DataError(
                "the function has NaN or Inf amplitudes"
                + (", far apart on the logarithmic scale." if self._log else ".")
                + " Check its weights and its range."
            )
        self.evaluations += count
        if count:
            self.largest = max(self.largest, float(values.abs().max()))
        return values


def all_configurations(num_sites: int, local_dim: int, device: torch.device) -> Tensor:
    """All d^n rows of digits (d^n, n) in order, the first digit most significant."""
    numbers_B = torch.arange(local_dim**num_sites, device=device)
    powers_N = local_dim ** torch.arange(num_sites - 1, -1, -1, device=device)
    return (numbers_B[:, None] // powers_N) % local_dim


def amplitudes(
    function: Callable[[Tensor], Tensor],
    num_sites: int,
    *,
    local_dim: int = 2,
    encoding: Encoding = "spins",
    log_amplitudes: bool = False,
) -> Tensor:
    """All amplitudes psi(x) = f(x) of a function of n inputs: (d^n,), not normalized.

    Arguments are those of `AmplitudeFunction`.

    Raises:
        DataError: more than 2^20 amplitudes, or not one finite number for each configuration.
    """
    psi = AmplitudeFunction(
        function,
        num_sites,
        local_dim=local_dim,
        encoding=encoding,
        log_amplitudes=log_amplitudes,
    )
    return all_amplitudes(psi)


def all_amplitudes(psi: AmplitudeFunction) -> Tensor:
    """All amplitudes of a function, (d^n,).

    Raises:
        DataError: see `amplitudes`.
    """
    count = psi.local_dim**psi.num_sites
    if count > MAX_AMPLITUDES:
        raise DataError(
            f"{psi.num_sites} sites of {psi.local_dim} values have {count} amplitudes; exact are "
            f"{MAX_AMPLITUDES} at most. Use cross interpolation: method='cross'."
        )
    return psi(all_configurations(psi.num_sites, psi.local_dim, psi.device))
