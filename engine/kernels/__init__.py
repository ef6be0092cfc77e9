"""Operations that other projects can call: fused, streaming, grouped; see docs/kernels.md.

Every name is imported when it is first used. `cmi` and `cube_mix` are the functions; the folders of these names are
reached by `from engine.kernels.cmi import ...`.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from engine.lazy import lazy_names

_HOME = {
    "infonce": "engine.kernels.mi_bounds.op",
    "mi_lower_bound": "engine.kernels.mi_bounds.op",
    "siglip": "engine.kernels.contrastive.op",
    "grouped_mlp": "engine.kernels.critics.op",
    "grouped_infonce": "engine.kernels.critics.op",
    "concat_scores": "engine.kernels.critics.op",
    "concat_infonce": "engine.kernels.critics.op",
    "knn_product_samples": "engine.kernels.knn_product.op",
    "classifier_logits": "engine.kernels.cmi.op",
    "cmi": "engine.kernels.cmi.op",
    "cube_mix": "engine.kernels.cube_mix.op",
    "InfoNCE": "engine.kernels.modules",
    "SigLIP": "engine.kernels.modules",
    "KeyQueue": "engine.kernels.modules",
    "MILowerBound": "engine.kernels.modules",
    "use_backend": "engine.kernels.registry",
    "warm_up": "engine.kernels.warm",
}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from engine.kernels.cmi.op import classifier_logits as classifier_logits
    from engine.kernels.cmi.op import cmi as cmi
    from engine.kernels.contrastive.op import siglip as siglip
    from engine.kernels.critics.op import concat_infonce as concat_infonce
    from engine.kernels.critics.op import concat_scores as concat_scores
    from engine.kernels.critics.op import grouped_infonce as grouped_infonce
    from engine.kernels.critics.op import grouped_mlp as grouped_mlp
    from engine.kernels.cube_mix.op import cube_mix as cube_mix
    from engine.kernels.knn_product.op import knn_product_samples as knn_product_samples
    from engine.kernels.mi_bounds.op import infonce as infonce
    from engine.kernels.mi_bounds.op import mi_lower_bound as mi_lower_bound
    from engine.kernels.modules import InfoNCE as InfoNCE
    from engine.kernels.modules import KeyQueue as KeyQueue
    from engine.kernels.modules import MILowerBound as MILowerBound
    from engine.kernels.modules import SigLIP as SigLIP
    from engine.kernels.registry import use_backend as use_backend
    from engine.kernels.warm import warm_up as warm_up
else:
    __getattr__, __dir__ = lazy_names(__name__, _HOME)


class _Kernels(ModuleType):
    """This package. Importing a subpackage sets it as an attribute, which would hide the function of its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Kernels
