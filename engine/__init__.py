"""Mutual information objectives for multimodal models: estimators, two-stage training, and tasks built on them.

Every public name is imported when it is first used, so that `import engine` costs next to nothing and needs neither
torch nor any optional package.
"""

from typing import TYPE_CHECKING

from engine.lazy import lazy_names

__version__ = "0.1.0"

_HOME = {
    "train": "engine.trainer",
    "train_seeds": "engine.trainer",
    "evaluate": "engine.trainer",
    "predict": "engine.trainer",
    "sweep": "engine.sweeps",
    "tune": "engine.sweeps",
    "Task": "engine.task",
    "register_task": "engine.task",
    "Config": "engine.config",
    "load_config": "engine.config",
    "Objective": "engine.objective",
    "MI": "engine.objective",
    "CMI": "engine.objective",
    "probe": "engine.information.probing",
    "TwoStageStep": "engine.step",
    "MIEstimator": "engine.model.estimators",
    "CMIEstimator": "engine.model.cmi",
    "estimate_mi": "engine.information.mi",
    "estimate_cmi": "engine.information.cmi",
    "mi_matrix": "engine.information.matrix",
    "register_fusion": "engine.model.fusion",
    "use_backend": "engine.kernels.registry",
    "keep_memory": "engine.allocator",
    "EngineError": "engine.errors",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from engine.allocator import keep_memory as keep_memory
    from engine.config import Config as Config
    from engine.config import load_config as load_config
    from engine.errors import EngineError as EngineError
    from engine.information.cmi import estimate_cmi as estimate_cmi
    from engine.information.matrix import mi_matrix as mi_matrix
    from engine.information.mi import estimate_mi as estimate_mi
    from engine.information.probing import probe as probe
    from engine.kernels.registry import use_backend as use_backend
    from engine.model.cmi import CMIEstimator as CMIEstimator
    from engine.model.estimators import MIEstimator as MIEstimator
    from engine.model.fusion import register_fusion as register_fusion
    from engine.objective import CMI as CMI
    from engine.objective import MI as MI
    from engine.objective import Objective as Objective
    from engine.step import TwoStageStep as TwoStageStep
    from engine.sweeps import sweep as sweep
    from engine.sweeps import tune as tune
    from engine.task import Task as Task
    from engine.task import register_task as register_task
    from engine.trainer import evaluate as evaluate
    from engine.trainer import predict as predict
    from engine.trainer import train as train
    from engine.trainer import train_seeds as train_seeds
else:
    __getattr__, __dir__ = lazy_names(__name__, _HOME)
