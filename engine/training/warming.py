"""Compiling the Triton kernels of a run side by side before its first step."""

from __future__ import annotations

import contextlib
import warnings

import torch

from engine.kernels import registry
from engine.kernels.knn_product import Bank
from engine.kernels.registry import has_triton, interpreting
from engine.kernels.warm import warm_up
from engine.loaders.batch import Batch
from engine.step import TwoStageStep
from engine.training.parts import Parts
from engine.training.random_state import unchanged_random_state


def compiles_kernels(device: torch.device) -> bool:
    """Whether training on `device` has Triton kernels to compile."""
    return device.type == "cuda" and has_triton() and not interpreting()


def warm_kernels(parts: Parts) -> None:
    """Have the Triton kernels of a step compiled side by side. It changes nothing else."""
    buffers = [(b, b.clone()) for module in (parts.model, parts.objective) for b in module.buffers()]
    with unchanged_random_state(parts.step.generator):
        try:
            loader, static = parts.loaders["train"], parts.step.static
            batch = next(iter(loader)) if static is None else static.first_batch(loader)
            with contextlib.nullcontext() if static is None else registry.static():
                warm_up(lambda: try_out(parts.step, batch, parts.samples))
        except Exception as cause:  # whatever it was: a real step meets it again, if it matters
            warnings.warn(f"kernels are compiled when first used: {' '.join(str(cause).split())}", stacklevel=2)
        finally:
            for optimizer in parts.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def try_out(step: TwoStageStep, batch: Batch, size: int) -> None:
    """Both stages' passes on one batch, with a bank of `size` samples, and updates of no weight of the step."""
    step.model.train()
    with torch.no_grad():
        step.forward(batch, batch.label)
    prediction, features = step.forward(batch, batch.label)
    loss = step.task_loss(prediction, batch.label)
    if step.objective is not None and len(batch) >= step.objective.min_batch:
        detached = {name: value.detach() for name, value in features.items()}
        bank = Bank({name: value.new_zeros(size, *value.shape[1:]) for name, value in detached.items()})
        products = step.draw_products(bank, len(batch))
        step.objective.train()
        loss = loss + step.objective.estimator_loss(detached, products).loss
        with step._frozen_estimators():
            loss = loss + step.objective.model_loss(features, products).loss
    loss.backward()
    for optimizer in (step.main_optimizer, step.estimator_optimizer):
        if optimizer is not None:
            step.try_update(optimizer)
