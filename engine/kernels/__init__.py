"""Operations that other projects can call: fused, streaming, grouped; see docs/kernels.md.

Every name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "infonce": "engine.kernels.mi_bounds.op",
    "mi_lower_bound": "engine.kernels.mi_bounds.op",
    "use_backend": "engine.kernels.registry",
}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from engine.kernels.mi_bounds.op import infonce as infonce
    from engine.kernels.mi_bounds.op import mi_lower_bound as mi_lower_bound
    from engine.kernels.registry import use_backend as use_backend


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine.kernels' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
