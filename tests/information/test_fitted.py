"""The estimators with `fit`: conventions of scikit-learn, and the same numbers as the functions."""

import inspect
import io
import pickle
import subprocess
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn.base
import sklearn.utils.validation
import torch

import engine
from engine.errors import EstimatorError
from engine.information import CMIEstimator, MIEstimator

QUICK = {"steps": 20, "hidden": 8}


def samples(rows: int = 200) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    x, y, z = np.random.default_rng(0).normal(size=(3, rows))
    return pd.DataFrame({"pitch": x + y, "pause": z}), y + z, z


def fitted() -> tuple[MIEstimator, CMIEstimator]:
    x, y, z = samples()
    return MIEstimator(**QUICK).fit(x, y), CMIEstimator(**QUICK, seed=3).fit(x, y, z)


def test_the_same_numbers_as_the_functions():
    x, y, z = samples()
    groups = np.arange(200) // 4
    mi, cmi = fitted()
    assert mi.result_ == engine.estimate_mi(x, y, **QUICK)
    assert cmi.result_ == engine.estimate_cmi(x, y, z, seed=3, **QUICK)
    grouped = MIEstimator(**QUICK).fit(x, y, groups=groups).result_
    assert grouped == engine.estimate_mi(x, y, groups=groups, **QUICK) and grouped.groups == 50
    for estimator in (mi, cmi):
        result = estimator.result_
        assert (estimator.estimate_, estimator.interval_) == (result.value, result.interval)
        assert estimator.standard_error_ == result.standard_error and estimator.flags_ == result.flags
        assert estimator.history_ == result.history and len(estimator.history_) > 1
        assert estimator.n_features_in_ == 2 and estimator.feature_names_in_.tolist() == ["pitch", "pause"]


@pytest.mark.parametrize("kind, function", [(MIEstimator, engine.estimate_mi), (CMIEstimator, engine.estimate_cmi)])
def test_parameters_are_those_of_the_function(kind, function):
    own, options = inspect.signature(kind).parameters, inspect.signature(function).parameters
    expected = {
        name: option.default
        for name, option in options.items()
        if option.kind is option.KEYWORD_ONLY and name != "groups"
    }
    assert {name: parameter.default for name, parameter in own.items()} == expected
    assert kind().get_params() == expected


def test_clones_have_the_parameters_and_no_fit():
    mi, cmi = fitted()
    for estimator in (mi, cmi):
        names = ["job"]
        clone = sklearn.base.clone(estimator.set_params(discrete=names, steps=7))
        assert clone.get_params() == estimator.get_params() and clone.steps == 7
        assert clone.discrete is not names  # a copy of its own
        assert not hasattr(clone, "estimate_")
        sklearn.utils.validation.check_is_fitted(estimator)
        tags = sklearn.utils.get_tags(estimator)
        assert tags.target_tags.required and tags.input_tags.string and tags.estimator_type is None
        with pytest.raises(sklearn.exceptions.NotFittedError):
            sklearn.utils.validation.check_is_fitted(clone)


def test_nothing_is_checked_or_changed_before_fit():
    odd = object()
    estimator = MIEstimator(steps=-1, discrete=odd)
    assert estimator.get_params()["discrete"] is odd and estimator.steps == -1
    assert set(vars(estimator)) == set(estimator.get_params())  # no attribute is set but the parameters
    with pytest.raises(EstimatorError, match="steps = -1"):
        MIEstimator(steps=-1).fit(*samples()[:2])
    assert repr(MIEstimator(steps=7)) == "MIEstimator(steps=7)"
    with pytest.raises(EstimatorError, match=r"MIEstimator.set_params: found parameter 'step'; expected one of bound"):
        MIEstimator().set_params(step=3)


def test_a_second_fit_replaces_the_first():
    x, y, _ = samples()
    estimator = MIEstimator(**QUICK).fit(x, y)
    estimator.fit(x.to_numpy()[:, 0], y)
    assert estimator.n_features_in_ == 1 and not hasattr(estimator, "feature_names_in_")
    assert estimator.result_.method == "neighbours" and estimator.history_ == []


def test_fitted_estimators_are_pickled():
    for estimator in fitted():
        file = io.BytesIO()
        joblib.dump(estimator, file)
        file.seek(0)
        for again in (pickle.loads(pickle.dumps(estimator)), joblib.load(file)):
            assert again.result_ == estimator.result_ and again.get_params() == estimator.get_params()
            assert torch.equal(again.result_.pointwise, estimator.result_.pointwise)


def test_these_are_not_the_modules_of_the_same_name():
    assert issubclass(engine.MIEstimator, torch.nn.Module) and engine.MIEstimator is not MIEstimator


def test_scikit_learn_and_pandas_are_not_needed():
    code = (
        "import sys, numpy\n"
        "sys.modules['sklearn'] = sys.modules['pandas'] = None\n"
        "from engine.information import MIEstimator, mi_matrix\n"
        "x = numpy.random.default_rng(0).normal(size=(100, 2))\n"
        "MIEstimator().fit(x[:, 0], x[:, 1])\n"
        "try:\n    mi_matrix(x).to_frame()\n"
        "except Exception as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout == "MIMatrix.to_frame: found no pandas; expected pandas to be installed. Run pip install pandas.\n"
    )
