"""Information of samples.

`estimate_mi`, `estimate_cmi` and `mi_matrix` are functions; `MIEstimator` and `CMIEstimator` are the same for those who
know scikit-learn. They are no modules: `engine.MIEstimator` and `engine.CMIEstimator` are, for use within a model.
"""

from typing import TYPE_CHECKING

from engine.lazy import lazy_names

_HOME = {
    "estimate_mi": "engine.information.mi",
    "estimate_cmi": "engine.information.cmi",
    "mi_matrix": "engine.information.matrix",
    "MIEstimator": "engine.information.fitted",
    "CMIEstimator": "engine.information.fitted",
    "MIMatrix": "engine.information.matrix",
    "Estimate": "engine.information.estimate",
}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from engine.information.cmi import estimate_cmi as estimate_cmi
    from engine.information.estimate import Estimate as Estimate
    from engine.information.fitted import CMIEstimator as CMIEstimator
    from engine.information.fitted import MIEstimator as MIEstimator
    from engine.information.matrix import MIMatrix as MIMatrix
    from engine.information.matrix import mi_matrix as mi_matrix
    from engine.information.mi import estimate_mi as estimate_mi
else:
    __getattr__, __dir__ = lazy_names(__name__, _HOME)
