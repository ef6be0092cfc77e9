"""The state of a `TwoStageStep` as one dict of tensors and plain values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from engine.step import TwoStageStep

PARTS = ("model", "objective", "random")
"""What a state may hold beside the step's own: both modules, and torch's random state."""

STAGES = {"main": "main_optimizer", "estimators": "estimator_optimizer"}


def state_of(step: TwoStageStep, parts: Collection[str]) -> dict[str, Any]:
    """As `TwoStageStep.state_dict`."""
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ConfigError("parts", f"{unknown}", f"some of {list(PARTS)}", "Correct the names.")
    state: dict[str, Any] = {"generator": step.generator.get_state(), "groups": {}}
    for stage, name in STAGES.items():
        optimizer = getattr(step, name)
        if optimizer is not None:
            state[name] = optimizer.state_dict()
            state["groups"][stage] = step.groups[stage].state_dict(optimizer)
    for name in ("average", "scaler"):
        if getattr(step, name) is not None:
            state[name] = getattr(step, name).state_dict()
    for name in ("model", "objective"):
        if name in parts and getattr(step, name) is not None:
            state[name] = getattr(step, name).state_dict()
    if "random" in parts:
        state["random"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["random"]["cuda"] = torch.cuda.get_rng_state_all()
    return state


def load_state(step: TwoStageStep, state: Mapping[str, Any]) -> None:
    """As `TwoStageStep.load_state_dict`."""
    for name in (*STAGES.values(), "average", "scaler"):
        if (name in state) != (getattr(step, name) is not None):
            has, lacks = ("the state", "this step") if name in state else ("this step", "the state")
            raise CheckpointError(
                "TwoStageStep.load_state_dict", f"{name} in {has}, but not in {lacks}", "the same in both",
                "Make the step with the arguments of the one that was saved.",
            )  # fmt: skip
    try:
        for name in ("model", "objective", *STAGES.values(), "average", "scaler"):
            if name in state and getattr(step, name) is not None:
                getattr(step, name).load_state_dict(state[name])
        for stage, group in state["groups"].items():
            step.groups[stage].load_state_dict(group, getattr(step, STAGES[stage]))
        step.generator.set_state(state["generator"].cpu())
    except (KeyError, RuntimeError, TypeError, ValueError) as cause:
        raise CheckpointError(
            "TwoStageStep.load_state_dict", str(cause), "the state of a step with these modules and optimisers",
            "Make the model, the objective and the optimisers as they were when it was saved.",
        ) from cause  # fmt: skip
    if "random" in state:
        set_random(state["random"])


def set_random(state: Mapping[str, Any]) -> None:
    """Put back torch's own random state, the part "random"."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
