"""Operations with parameters or state of their own, as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from engine.kernels.gradients import update_buffer
from engine.kernels.mi_bounds.embeddings import check_temperature
from engine.kernels.mi_bounds.op import infonce, mi_lower_bound
from engine.kernels.mi_bounds.reference import check_settings


class InfoNCE(nn.Module):
    """`engine.kernels.infonce` with a temperature that the module keeps, and learns if `learnable`.

    Args:
        temperature: A positive number; where it is learned, its value at the start.
        learnable: Make its logarithm the parameter `log_temperature`.
        cosine: As for `infonce`.
        symmetric: As for `infonce`.
        reduction: As for `infonce`.
        gather: As for `infonce`: take the keys of all ranks.
        group: As for `infonce`.
        local_loss: As for `infonce`.

    Raises:
        EstimatorError: A temperature that is not one positive number, or whatever `infonce` raises.

    Example:
        >>> clip = InfoNCE(temperature=0.07, learnable=True, cosine=True, symmetric=True)
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> clip(image, text).backward()
        >>> clip.log_temperature.grad.shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        learnable: bool = False,
        cosine: bool = False,
        symmetric: bool = False,
        reduction: str = "mean",
        gather: bool | str = False,
        group: Any = None,
        local_loss: bool = False,
    ):
        super().__init__()
        self.over_ranks = {"gather": gather, "group": group, "local_loss": local_loss}
        if isinstance(temperature, Tensor) and temperature.numel() == 1:
            temperature = temperature.item()
        check_temperature("InfoNCE", temperature)
        self.cosine, self.symmetric, self.reduction = cosine, symmetric, reduction
        self.fixed_temperature = temperature
        if learnable:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self) -> float | Tensor:
        return self.log_temperature.exp() if hasattr(self, "log_temperature") else self.fixed_temperature

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        negatives: Tensor | None = None,
        positives: Tensor | None = None,
        exclude_self: bool = False,
    ) -> Tensor:
        """Arguments and result of `infonce`: a loss in nats, to be minimised."""
        return infonce(
            q, k, temperature=self.temperature, cosine=self.cosine, symmetric=self.symmetric, negatives=negatives,
            positives=positives, exclude_self=exclude_self, reduction=self.reduction, **self.over_ranks,
        )  # fmt: skip

    def extra_repr(self) -> str:
        temperature = torch.as_tensor(self.temperature).item()
        return f"temperature={temperature:.4g}, cosine={self.cosine}, symmetric={self.symmetric}"


class MILowerBound(nn.Module):
    """`engine.kernels.mi_lower_bound` with MINE's moving average as state: the buffer `log_ema`, in state_dict.

    The first batch begins the average. Eval mode reads the average without changing it.

    Args:
        bound: As for `mi_lower_bound`.
        alpha: As for `mi_lower_bound`.
        smile_tau: As for `mi_lower_bound`.
        ema_rate: As for `mi_lower_bound`.
        groups: For mine: the number of critics; None for inputs without a first dimension of groups.
        gather: As for `mi_lower_bound`: the bound of the joined batch of all ranks.
        group: As for `mi_lower_bound`.

    Raises:
        EstimatorError: Numbers out of range, or whatever `mi_lower_bound` raises.

    Example:
        >>> mine = MILowerBound("mine")
        >>> round(float(mine(5 * torch.eye(8))), 4)
        5.0
        >>> float(mine.log_ema)  # the mean of e^0
        0.0
    """

    def __init__(
        self,
        bound: str = "infonce",
        *,
        alpha: float = 0.01,
        smile_tau: float = 5.0,
        ema_rate: float = 0.01,
        groups: int | None = None,
        gather: bool | str = False,
        group: Any = None,
    ):
        super().__init__()
        self.over_ranks = {"gather": gather, "group": group}
        check_settings("MILowerBound", alpha, smile_tau, ema_rate)
        self.bound, self.alpha, self.smile_tau, self.ema_rate = bound, alpha, smile_tau, ema_rate
        if bound == "mine":
            # -inf is the logarithm of an average that has not begun
            self.register_buffer("log_ema", torch.full(() if groups is None else (groups,), -math.inf))

    def forward(
        self,
        scores_or_q: Tensor,
        k: Tensor | None = None,
        *,
        log_baseline: Tensor | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Arguments and result of `mi_lower_bound`: a bound in nats, to be maximised."""
        settings = {
            "bound": self.bound, "log_baseline": log_baseline, "alpha": self.alpha, "smile_tau": self.smile_tau,
            "temperature": temperature, **self.over_ranks,
        }  # fmt: skip
        if self.bound != "mine":
            return mi_lower_bound(scores_or_q, k, **settings)
        value, log_ema = mi_lower_bound(scores_or_q, k, log_ema=self.log_ema, ema_rate=self.ema_rate, **settings)
        if self.training:
            update_buffer("MINE's moving average", self.log_ema, log_ema)
        return value

    def extra_repr(self) -> str:
        return self.bound
