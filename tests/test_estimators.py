"""The scikit-learn estimators: scikit-learn's own checks, what they learn, what they refuse."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, make_friedman1
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures
from sklearn.utils.estimator_checks import parametrize_with_checks

from mpocompress import MPOClassifier, MPORegressor
from mpocompress.layers import MPOLinear

SMALL = {"hidden_layer_sizes": (64,), "bond_dim": 4, "epochs": 40}


# Minibatches of other rows are another run, so that a weight of 2 is as good as the row twice, but
# not the same to the last digit.
NOT_TO_THE_LAST_DIGIT = {
    "check_sample_weight_equivalence_on_dense_data": "trained on random minibatches",
}


@parametrize_with_checks(
    [
        MPOClassifier(**SMALL),
        MPORegressor(**SMALL),
        MPOClassifier(**SMALL, method="adam"),
        MPORegressor(**SMALL, grow=True),
    ],
    expected_failed_checks=lambda estimator: NOT_TO_THE_LAST_DIGIT,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_a_classifier_learns_real_data_with_labels_of_any_type():
    X, y = load_breast_cancer(return_X_y=True)
    names = np.array(["malignant", "benign"])[y]
    X_train, X_test, y_train, y_test = train_test_split(X, names, random_state=0, stratify=y)
    model = MPOClassifier(**SMALL, random_state=0).fit(X_train, y_train)
    assert model.score(X_test, y_test) > 0.93
    assert list(model.classes_) == ["benign", "malignant"]
    np.testing.assert_allclose(model.predict_proba(X_test).sum(axis=1), 1)
    assert isinstance(model.network_[0], MPOLinear)
    assert model.history_.score_name == "accuracy"
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(X_test), model.predict_proba(X_test))


def test_a_regressor_learns_and_takes_several_targets():
    X, y = make_friedman1(1200, noise=0.5, random_state=0)
    model = MPORegressor(**SMALL, random_state=0).fit(X[:900], y[:900])
    assert model.score(X[900:], y[900:]) > 0.85
    both = MPORegressor(**SMALL, random_state=0).fit(X[:900], np.stack([y, -y], 1)[:900])
    assert both.predict(X[900:]).shape == (300, 2)


def test_weights_of_rows_decide_between_contradicting_labels():
    generator = np.random.default_rng(0)
    X = generator.normal(size=(300, 4))
    truth = X[:, 0] * X[:, 1]
    twice, y = np.concatenate((X, X)), np.concatenate((truth, -truth))
    weights = np.repeat((10.0, 0.1), 300)
    regressor = MPORegressor(**SMALL, random_state=0).fit(twice, y, sample_weight=weights)
    assert regressor.score(X, truth) > 0.8
    classifier = MPOClassifier(**SMALL, random_state=0).fit(twice, y > 0, sample_weight=weights)
    assert classifier.score(X, truth > 0) > 0.9
    # The score that is kept is weighted, too: unweighted it would be one half.
    assert classifier.history_.score_name == "accuracy"
    assert classifier.history_.kept.score > 0.8


def test_equal_weights_change_nothing_and_zeros_leave_rows_out():
    X, y = make_friedman1(120, n_features=5, random_state=0)
    few = {"hidden_layer_sizes": (16,), "epochs": 5, "random_state": 0}
    plain = MPORegressor(**few).fit(X, y)
    weighted = MPORegressor(**few).fit(X, y, sample_weight=np.full(120, 7.0))
    np.testing.assert_allclose(weighted.predict(X), plain.predict(X), rtol=1e-4)
    assert weighted.history_.kept.score == pytest.approx(plain.history_.kept.score, abs=1e-4)
    zeros = np.ones(120)
    zeros[::3] = 0
    part = MPORegressor(**few).fit(X, y, sample_weight=zeros)
    alone = MPORegressor(**few).fit(X[zeros > 0], y[zeros > 0])
    np.testing.assert_allclose(part.predict(X), alone.predict(X), rtol=1e-4)
    assert np.isfinite(MPORegressor(**few).fit(X, y, np.logspace(-300, 300, 120)).predict(X)).all()
    for bad, message in ((-zeros, "[Nn]egative"), (0 * zeros, "zero"), (zeros[1:], "shape")):
        with pytest.raises(ValueError, match=message):
            MPORegressor(**few).fit(X, y, sample_weight=bad)


def test_logarithms_of_probabilities_do_not_underflow():
    X, y = load_breast_cancer(return_X_y=True)
    model = MPOClassifier((16,), epochs=5, random_state=0).fit(X, y)
    logs = model.predict_log_proba(X)
    np.testing.assert_allclose(np.exp(logs), model.predict_proba(X))
    assert np.isfinite(model.predict_log_proba(1e6 * X)).all()


def test_bonds_grow_to_the_cap():
    X, y = make_friedman1(400, random_state=0)
    model = MPORegressor(**SMALL, grow=True, random_state=0).fit(X, y)
    assert model.history_.history[0].bond_dims["0"] == (1,)
    assert model.network_[0].bond_dims == (4,)


def test_pipelines_and_grid_searches():
    X, y = make_friedman1(200, n_features=5, random_state=0)
    pipeline = make_pipeline(PolynomialFeatures(2), MPORegressor((16,), epochs=5, random_state=0))
    search = GridSearchCV(pipeline, {"mporegressor__bond_dim": [1, 2]}, cv=2).fit(X, y)
    assert set(search.best_params_) == {"mporegressor__bond_dim"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"hidden_layer_sizes": ()}, r"hidden_layer_sizes \(\): give one size"),
        ({"hidden_layer_sizes": (8.0,)}, r"hidden_layer_sizes \(8.0,\): give one size"),
        ({"hidden_layer_sizes": 0}, "hidden_layer_sizes 0: give one size"),
        ({"bond_dim": 0}, "bond dimension"),
        ({"epochs": 0}, "epochs 0"),
        ({"method": "sgd"}, "method 'sgd'"),
    ],
)
def test_impossible_parameters_are_value_errors_at_fit(change, message):
    X, y = make_friedman1(50, random_state=0)
    with pytest.raises(ValueError, match=message):
        MPORegressor(**change).fit(X, y)


@torch.inference_mode()
def test_one_size_alone_and_fits_under_inference_mode():
    X, y = make_friedman1(50, random_state=0)
    found = MPORegressor(hidden_layer_sizes=8, epochs=1, random_state=0).fit(X, y)
    assert found.network_[0].out_features == 8
    assert not any(parameter.is_inference() for parameter in found.network_.parameters())


def test_bad_data_gives_scikit_learns_kind_of_error():
    X, y = make_friedman1(50, random_state=0)
    with pytest.raises(NotFittedError, match="not fitted"):
        MPORegressor().predict(X)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        MPORegressor().fit(np.where(X > 0.9, np.nan, X), y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        MPORegressor().fit(X, y[:-1])
    with pytest.raises(ValueError, match="Unknown label type"):
        MPOClassifier().fit(X, y)
    with pytest.raises(ValueError, match="one class"):
        MPOClassifier().fit(X, np.zeros(50, dtype=int))
    model = MPORegressor((8,), epochs=1).fit(X, y)
    with pytest.raises(ValueError, match="9 features, but MPORegressor is expecting 10"):
        model.predict(X[:, :9])


def test_without_scikit_learn_the_extra_is_named():
    code = (
        "import sys; sys.modules['sklearn'] = None; sys.modules['sklearn.base'] = None\n"
        "import mpocompress\n"
        "try:\n    mpocompress.MPOClassifier\n"
        "except ImportError as error:\n    print(type(error).__name__, error)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "MissingExtraError" in finished.stdout
    assert "mpocompress[sklearn]" in finished.stdout
