"""Tensor neural networks as scikit-learn estimators, for pipelines and grid searches."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from mpocompress.api import train
from mpocompress.errors import DataError, MissingExtraError
from mpocompress.layers import MPOLinear
from mpocompress.mpo.factors import balanced_layout
from mpocompress.scalars import as_integer
from mpocompress.tuning import Supervised, TrainResult
from mpocompress.tuning.minibatches import Minibatch
from mpocompress.tuning.training.options import Method

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise MissingExtraError(
        "MPOClassifier and MPORegressor need scikit-learn 1.6 or newer. Install it with "
        "pip install 'mpocompress[sklearn]'."
    ) from error

Activation = Literal["relu", "tanh"]

# The gain that makes up for what the activation takes away, see MPOLinear.
_ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "relu": (nn.ReLU, 2**0.5),
    "tanh": (nn.Tanh, 1.0),
}
_PREDICT_ROWS = 4096


class _TensorNetwork(BaseEstimator):  # type: ignore[misc, unused-ignore]
    """What both estimators share: scaling, the network, training."""

    def __init__(
        self,
        hidden_layer_sizes: int | Sequence[int] = (256, 256),
        *,
        n_sites: int = 2,
        bond_dim: int = 8,
        activation: Activation = "relu",
        method: Method = "dmrg",
        grow: bool = False,
        epochs: int = 60,
        batch_size: int = 32,
        learning_rate: float | None = None,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.n_sites = n_sites
        self.bond_dim = bond_dim
        self.activation = activation
        self.method = method
        self.grow = grow
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.random_state = random_state
        self.device = device

    @torch.inference_mode(False)
    def _fit(
        self, rows_NF: np.ndarray, labels_N: Tensor, outputs: int, weights_N: np.ndarray | None
    ) -> None:
        """Train on rows (count, features) in float64 and labels as `train` takes them.

        Weights are positive.
        """
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        self.mean_, spread_F = _mean_and_spread(rows_NF, weights_N)
        # A constant column stays at zero instead of becoming rounding noise.
        floor_F = 10 * np.finfo(np.float64).eps * np.abs(rows_NF).max(axis=0)
        self.scale_ = np.where(spread_F > floor_F, spread_F, 1.0)
        network = self._network(rows_NF.shape[1], outputs, seed)
        growing = self.grow and self.method == "dmrg"
        inputs_NF = torch.from_numpy((rows_NF - self.mean_) / self.scale_).float()
        loss: Literal["auto"] | Supervised = "auto"
        if weights_N is not None:
            loss = _Weighted("mse" if labels_N.is_floating_point() else "cross_entropy")
            share_N = torch.from_numpy(weights_N / weights_N.mean()).float()
            labels_N = torch.cat((labels_N.reshape(len(share_N), -1), share_N[:, None]), dim=1)
        self.history_: TrainResult = train(
            network,
            (inputs_NF, labels_N),
            loss=loss,
            method=self.method,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            sites="grow" if growing else 1,
            bond_dim=self.bond_dim if growing else None,
            validation=self.validation_fraction,
            patience=self.patience,
            seed=seed,
        )
        # In float64 a row's prediction does not depend on the batch that it is in.
        self.network_ = network.double().eval()

    def _network(self, features: int, outputs: int, seed: int) -> nn.Sequential:
        if self.activation not in _ACTIVATIONS:
            raise DataError(f"activation {self.activation!r}: there are 'relu' and 'tanh'.")
        activation, gain = _ACTIVATIONS[self.activation]
        given = self.hidden_layer_sizes
        several = given if isinstance(given, Iterable) and np.ndim(given) else (given,)
        sizes = [as_integer(size) or 0 for size in several]
        if min(sizes, default=0) < 1:
            raise DataError(
                f"hidden_layer_sizes {given!r}: give one size of 1 or more, or several, as in "
                "(256,)."
            )
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        width = features
        for size in sizes:
            layer = MPOLinear(
                width,
                size,
                layout=balanced_layout(size, width, self.n_sites),
                bond_dim=1 if self.grow and self.method == "dmrg" else self.bond_dim,
                gain=gain,
                generator=generator,
            )
            layers += [layer, activation()]
            width = size
        head = nn.Linear(width, outputs, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            head.weight.normal_(0, width**-0.5, generator=generator)
            head.bias.zero_()
        return nn.Sequential(*layers, head).to(self.device)

    def _outputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        rows_NF = validate_data(self, X, reset=False, dtype=np.float64)
        inputs_NF = torch.from_numpy((rows_NF - self.mean_) / self.scale_)
        device = next(self.network_.parameters()).device
        with torch.no_grad():
            parts = [
                self.network_(part.to(device)).cpu() for part in inputs_NF.split(_PREDICT_ROWS)
            ]
        found: np.ndarray = torch.cat(parts).numpy()
        return found


class _Weighted(Supervised):
    """A loss and a score in which every row has a weight: the last column of the labels."""

    def __call__(self, model: nn.Module, batch: Minibatch) -> Tensor:
        """The weighted sum of the rows' losses over their number: weights are 1 on average."""
        losses_N, weights_N = self._losses(*self._compared(model, batch), batch)
        return (losses_N * weights_N).mean()

    def _labels(self, batch: Minibatch) -> Tensor:
        labels_NT = super()._labels(batch)[:, :-1]
        return labels_NT if self.kind == "mse" else labels_NT[:, 0].long()

    def _losses(self, output: Tensor, labels: Tensor, batch: Minibatch) -> tuple[Tensor, Tensor]:
        """Of each row, and its weight."""
        if self.kind == "mse":
            losses_N = (output - labels.to(output.dtype)).square().mean(dim=1)
        else:
            losses_N = nn.functional.cross_entropy(output, labels, reduction="none")
        return losses_N, super()._labels(batch)[:, -1].to(losses_N)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Minibatch]) -> tuple[float, float]:
        """Weighted means: see `Supervised.evaluate`."""
        parts = []
        for batch in batches:
            compared = self._compared(model, batch)
            parts.append((*compared, *self._losses(*compared, batch)))
        output, labels, losses_N, weights_N = (
            torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)
        )
        loss = float(np.average(losses_N, weights=weights_N))
        if self.kind == "cross_entropy":
            return loss, float(accuracy_score(labels, output.argmax(1), sample_weight=weights_N))
        many = len(labels) > 1  # R^2 of one row is not defined
        score = r2_score(labels, output, sample_weight=weights_N) if many else np.nan
        return loss, float(score)


def _weighted_rows(
    sample_weight: Any, X: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows and targets that have any weight, and their weights; None if nobody gave any.

    Raises:
        ValueError: weights of another number than rows, negative ones, NaN or Inf, or all zero.
    """
    if sample_weight is None:
        return X, y, None
    weights_N = _check_sample_weight(
        sample_weight, X, dtype=np.float64, ensure_non_negative=True, copy=True
    )
    if not weights_N.any():
        raise ValueError("Sample weights are all zero: there is nothing to train on.")
    weights_N = weights_N / weights_N.max()
    kept_N = weights_N.astype(np.float32) > 0  # in what is trained
    return X[kept_N], y[kept_N], weights_N[kept_N]


def _mean_and_spread(
    rows_NF: np.ndarray, weights_N: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every column."""
    if weights_N is None:
        return rows_NF.mean(axis=0), rows_NF.std(axis=0)
    mean_F = np.average(rows_NF, axis=0, weights=weights_N)
    return mean_F, np.sqrt(np.average((rows_NF - mean_F) ** 2, axis=0, weights=weights_N))


class MPOClassifier(ClassifierMixin, _TensorNetwork):  # type: ignore[misc, unused-ignore]
    """A classifier whose hidden layers are matrix product operators.

    Inputs are standardized with the mean and spread of the training rows; hidden layers are
    `MPOLinear` with balanced sites, the last layer is dense. Training is `mpocompress.train` with
    cross-entropy.

    Args:
        hidden_layer_sizes: width of each hidden layer, or of the only one.
        n_sites: sites of each MPO.
        bond_dim: bond dimension of each MPO, clipped to the maximal one; with `grow` the largest.
        activation: "relu" or "tanh".
        method: "dmrg", sweeps along the cores; or "adam", all at once.
        grow: for "dmrg", start at bond dimension 1 and grow by two-site sweeps.
        epochs: passes over the training rows.
        batch_size: rows of a minibatch.
        learning_rate: peak, see `mpocompress.train`.
        validation_fraction: share of the rows that decides which weights are kept; 0 for none.
        patience: stop after so many evaluations without a better one; None: never.
        random_state: seed or `numpy.random.RandomState`.
        device: torch device that the network is trained on.

    Attributes:
        classes_: labels, in the order of `predict_proba`'s columns.
        network_: the trained `nn.Sequential`, for standardized inputs, in float64.
        history_: `TrainResult`.
        mean_, scale_: of the training rows, (features,).
        n_features_in_: number of features.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on X (rows, features) and labels y (rows,) of any type.

        Args:
            X: rows.
            y: labels.
            sample_weight: (rows,), relative to each other: of each row's loss, in the mean and the
                spread of the features, and in the score that decides which weights are kept. Rows
                of weight 0 are left out. None: all count alike.

        Raises:
            ValueError: shapes, NaN or Inf, fewer than two classes, or impossible parameters.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes_N = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"MPOClassifier needs at least two classes, the labels have one class: "
                f"{self.classes_[0]!r}."
            )
        X, codes_N, weights_N = _weighted_rows(sample_weight, X, codes_N)
        codes = torch.from_numpy(codes_N.astype(np.int64))
        self._fit(X, codes, len(self.classes_), weights_N)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities, (rows, classes), float64."""
        found: np.ndarray = torch.from_numpy(self._outputs(X)).softmax(dim=1).numpy()
        return found

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Logarithms of `predict_proba`, without its underflow."""
        found: np.ndarray = torch.from_numpy(self._outputs(X)).log_softmax(dim=1).numpy()
        return found

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of each row."""
        codes_N = self._outputs(X).argmax(axis=1)
        found: np.ndarray = self.classes_[codes_N]
        return found


class MPORegressor(RegressorMixin, _TensorNetwork):  # type: ignore[misc, unused-ignore]
    """A regressor whose hidden layers are matrix product operators.

    Like `MPOClassifier`, with the squared error of standardized targets, one or several.

    Args:
        hidden_layer_sizes: width of each hidden layer, or of the only one.
        n_sites: sites of each MPO.
        bond_dim: bond dimension of each MPO, clipped to the maximal one; with `grow` the largest.
        activation: "relu" or "tanh".
        method: "dmrg", sweeps along the cores; or "adam", all at once.
        grow: for "dmrg", start at bond dimension 1 and grow by two-site sweeps.
        epochs: passes over the training rows.
        batch_size: rows of a minibatch.
        learning_rate: peak, see `mpocompress.train`.
        validation_fraction: share of the rows that decides which weights are kept; 0 for none.
        patience: stop after so many evaluations without a better one; None: never.
        random_state: seed or `numpy.random.RandomState`.
        device: torch device that the network is trained on.

    Attributes:
        network_: the trained `nn.Sequential`, between standardized inputs and targets, in float64.
        history_: `TrainResult`; losses are of standardized targets.
        mean_, scale_: of the training rows, (features,).
        y_mean_, y_scale_: of the targets.
        n_features_in_: number of features.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on X (rows, features) and targets y (rows,) or (rows, targets).

        Args:
            X: rows.
            y: targets.
            sample_weight: (rows,), as in `MPOClassifier.fit`; also in the mean and the spread of
                the targets.

        Raises:
            ValueError: shapes, NaN or Inf, or impossible parameters.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        self._flat_targets = y.ndim == 1
        X, y, weights_N = _weighted_rows(sample_weight, X, y)
        targets_NT = y.reshape(len(y), -1)
        self.y_mean_, spread_T = _mean_and_spread(targets_NT, weights_N)
        self.y_scale_ = np.where(spread_T > 0, spread_T, 1.0)
        scaled_NT = torch.from_numpy((targets_NT - self.y_mean_) / self.y_scale_).float()
        self._fit(X, scaled_NT, targets_NT.shape[1], weights_N)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The target of each row, in the shape that `fit` was given."""
        found: np.ndarray = self._outputs(X) * self.y_scale_ + self.y_mean_
        return found[:, 0] if self._flat_targets else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
