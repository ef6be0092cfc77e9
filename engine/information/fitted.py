"""`estimate_mi` and `estimate_cmi` as objects with `fit`, as in scikit-learn, which is not needed."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from engine.errors import EstimatorError
from engine.information.cmi import estimate_cmi
from engine.information.estimate import Estimate
from engine.information.inputs import Discrete
from engine.information.mi import estimate_mi
from engine.samples import columns_of, width

Own = TypeVar("Own", bound="_Fitted")


class _Fitted:
    """Parameters and fitted attributes, as scikit-learn's `clone` and searches expect them.

    Every parameter of `__init__` is an attribute of the same name. It is checked when `fit` is called.
    """

    _where = "fit"
    result_: Estimate

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name. `deep` changes nothing, as no parameter has parameters of its own."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self: Own, **parameters: Any) -> Own:
        """Set parameters by name, and return the estimator itself.

        Raises:
            EstimatorError: an unknown name.
        """
        known = self._names()
        for name, value in parameters.items():
            if name not in known:
                raise EstimatorError(
                    f"{type(self).__name__}.set_params",
                    f"parameter {name!r}",
                    f"one of {', '.join(known)}",
                    "Check the name.",
                )
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        default = inspect.signature(type(self)).parameters
        changed = [
            f"{name}={value!r}" for name, value in self.get_params().items() if value is not default[name].default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __getattr__(self, name: str) -> Any:
        """What is not there, and why."""
        own = type(self).__name__
        if name.endswith("_") and not name.startswith("_"):
            raise AttributeError(f"{own} has no {name} yet: call fit first")
        if name == "score":
            raise AttributeError(
                f"{own} has no score: half of the methods fit nothing that could be read on new rows; compare "
                "estimate_ and interval_ of fits"
            )
        raise AttributeError(f"{own!r} object has no attribute {name!r}")

    def __sklearn_is_fitted__(self) -> bool:
        return "result_" in self.__dict__

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn, which alone calls this, asks about an estimator."""
        from sklearn.utils import InputTags, Tags, TargetTags

        return Tags(estimator_type=None, target_tags=TargetTags(required=True), input_tags=InputTags(string=True))

    def _keep(self, x: Any, result: Estimate) -> None:
        columns = columns_of("x", x)
        self.result_ = result
        self.estimate_: float = result.value
        self.interval_: tuple[float, float] = result.interval
        self.standard_error_: float = result.standard_error
        self.flags_: tuple[str, ...] = result.flags
        self.history_: list[dict[str, Any]] = result.history
        self.n_features_in_: int = width(self._where, columns)
        self.__dict__.pop("feature_names_in_", None)
        if columns.labels is not None:
            import numpy

            self.feature_names_in_ = numpy.array(columns.labels, dtype=object)


class MIEstimator(_Fitted):
    """I(X;Y) in nats by `engine.estimate_mi`, with `fit` as in scikit-learn. It can be cloned and pickled.

    It measures samples. The module of the same name at `engine.MIEstimator` is something else: a bound with a critic
    that is trained within a model.

    Args:
        bound, steps, batch_size, lr, hidden, alpha, smile_tau, discrete, missing, seed: see `engine.estimate_mi`.

    Attributes:
        estimate_: the value, nats.
        interval_: (low, high), nats, meant to contain the truth in 95 of 100 cases.
        standard_error_: sampling error of the value alone, nats.
        flags_: reasons to doubt the value.
        history_: readings over the training, nats; empty for methods that train nothing.
        result_: the whole `Estimate`.
        n_features_in_, feature_names_in_: number of columns of x, and their names where x has names.

    Example:
        >>> import numpy
        >>> from engine.information import MIEstimator
        >>> x, noise = numpy.random.default_rng(0).normal(size=(2, 2000))
        >>> round(MIEstimator(seed=1).fit(x, x + noise).estimate_, 3)
        0.346
    """

    _where = "MIEstimator.fit"

    def __init__(
        self,
        *,
        bound: str = "auto",
        steps: int = 1500,
        batch_size: int = 256,
        lr: float = 4e-3,
        hidden: int = 64,
        alpha: float = 0.01,
        smile_tau: float = 5.0,
        discrete: Discrete = False,
        missing: str = "raise",
        seed: int = 0,
    ):
        self.bound, self.steps, self.batch_size, self.lr = bound, steps, batch_size, lr
        self.hidden, self.alpha, self.smile_tau = hidden, alpha, smile_tau
        self.discrete, self.missing, self.seed = discrete, missing, seed

    def fit(self, x: Any, y: Any, groups: Any = None) -> MIEstimator:
        """Estimate I(X;Y) from rows [N, dx] and [N, dy].

        Raises:
            EstimatorError: as `engine.estimate_mi`.
        """
        self._keep(x, estimate_mi(x, y, groups=groups, **self.get_params()))
        return self


class CMIEstimator(_Fitted):
    """I(X;Y|Z) in nats by `engine.estimate_cmi`, with `fit` as in scikit-learn. It can be cloned and pickled.

    It measures samples. The module `engine.CMIEstimator` is something else: an estimator that is trained within a
    model.

    Args:
        discrete, missing, steps, hidden, batch_size, lr, k, seed: see `engine.estimate_cmi`.

    Attributes:
        estimate_, interval_, standard_error_, flags_, history_, result_, n_features_in_, feature_names_in_: as those of
            `MIEstimator`.

    Example:
        >>> import numpy
        >>> from engine.information import CMIEstimator
        >>> z, e, f = numpy.random.default_rng(0).normal(size=(3, 500))
        >>> low, high = CMIEstimator(steps=20, hidden=8).fit(z + e, z + e + f, z).interval_
        >>> low < 0.347 < high  # log(2) / 2
        True
    """

    _where = "CMIEstimator.fit"

    def __init__(
        self,
        *,
        discrete: Discrete = False,
        missing: str = "raise",
        steps: int = 1200,
        hidden: int = 64,
        batch_size: int = 256,
        lr: float = 3e-3,
        k: int = 5,
        seed: int = 0,
    ):
        self.discrete, self.missing, self.steps, self.hidden = discrete, missing, steps, hidden
        self.batch_size, self.lr, self.k, self.seed = batch_size, lr, k, seed

    def fit(self, x: Any, y: Any, z: Any, groups: Any = None) -> CMIEstimator:
        """Estimate I(X;Y|Z) from rows [N, dx], [N, dy] and [N, dz].

        Raises:
            EstimatorError: as `engine.estimate_cmi`.
        """
        self._keep(x, estimate_cmi(x, y, z, groups=groups, **self.get_params()))
        return self
