"""Operations with parameters or state of their own, as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.kernels.arguments import check_count, check_number, exact_type
from engine.kernels.compiling import as_read
from engine.kernels.contrastive.op import check_reduction, siglip
from engine.kernels.gradients import transformed, update_buffer
from engine.kernels.mi_bounds.embeddings import check_temperature
from engine.kernels.mi_bounds.op import infonce, mi_lower_bound
from engine.kernels.mi_bounds.reference import BOUNDS, check_settings


def _shown(value: float | Tensor) -> str:
    """A number in a few digits; what has no data has none."""
    value = torch.as_tensor(value).detach()
    return "?" if value.is_meta else f"{value.item():.4g}"


class _Temperature(nn.Module):
    """A temperature that is kept, or whose logarithm is the parameter `log_temperature`."""

    def __init__(self, temperature: float, learnable: bool, max_scale: float | None):
        super().__init__()
        name = type(self).__name__
        if isinstance(temperature, Tensor) and temperature.numel() == 1:
            temperature = temperature.item()
        check_temperature(name, temperature)
        if max_scale is not None:
            check_number(name, "max_scale", max_scale, 0, above=True)
            if temperature < 1 / max_scale:
                what = f"temperature {temperature:g} with max_scale {max_scale:g}"
                raise EstimatorError(name, what, f"at least {1 / max_scale:g}", "Change one of them.")
        self.fixed_temperature, self.max_scale = temperature, max_scale
        if learnable:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self) -> float | Tensor:
        return self.log_temperature.exp() if hasattr(self, "log_temperature") else self.fixed_temperature

    def clamp_(self) -> None:
        """Bring a learned 1 / temperature back to `max_scale`, as CLIP does after every step. `forward` calls it."""
        if self.max_scale is not None and hasattr(self, "log_temperature") and not transformed():
            with torch.no_grad():
                self.log_temperature.clamp_(min=-math.log(self.max_scale))

    def extra_repr(self) -> str:
        return f"temperature={_shown(self.temperature)}"


class InfoNCE(_Temperature):
    """`engine.kernels.infonce` with a temperature that the module keeps, and learns if `learnable`.

    Args:
        temperature: A positive number; where it is learned, its value at the start.
        learnable: Make its logarithm the parameter `log_temperature`.
        max_scale: The most that a learned 1 / temperature may be; CLIP takes 100. In training mode the parameter is
            brought back at the start of every call. None: no limit.
        cosine: As for `infonce`.
        symmetric: As for `infonce`.
        decoupled: As for `infonce`.
        hardness: As for `infonce`.
        label_smoothing: As for `infonce`.
        reduction: As for `infonce`.
        gather: As for `infonce`: take the keys of all ranks.
        group: As for `infonce`.
        local_loss: As for `infonce`.

    Raises:
        EstimatorError: A temperature that is not one positive number or below 1 / max_scale, or whatever `infonce`
            raises.

    Example:
        >>> clip = InfoNCE(temperature=0.07, learnable=True, max_scale=100, cosine=True, symmetric=True)
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
        max_scale: float | None = None,
        cosine: bool = False,
        symmetric: bool = False,
        decoupled: bool = False,
        hardness: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        gather: bool | str = False,
        group: Any = None,
        local_loss: bool = False,
    ):
        super().__init__(temperature, learnable, max_scale)
        check_reduction("InfoNCE", reduction)
        self.over_ranks = {"gather": gather, "group": group, "local_loss": local_loss}
        self.cosine, self.symmetric, self.reduction = cosine, symmetric, reduction
        self.decoupled, self.hardness, self.label_smoothing = decoupled, hardness, label_smoothing

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        negatives: Tensor | None = None,
        positives: Tensor | None = None,
        exclude_self: bool = False,
        labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        mask: Tensor | None = None,
        row_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        in_batch: bool | None = None,
    ) -> Tensor:
        """Arguments and result of `infonce`: a loss in nats, to be minimised."""
        if self.training:
            self.clamp_()
        return infonce(
            q, k, temperature=self.temperature, cosine=self.cosine, symmetric=self.symmetric, negatives=negatives,
            positives=positives, exclude_self=exclude_self, labels=labels, key_labels=key_labels, mask=mask,
            row_ids=row_ids, key_ids=key_ids, in_batch=in_batch, decoupled=self.decoupled, hardness=self.hardness,
            label_smoothing=self.label_smoothing, reduction=self.reduction, **self.over_ranks,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cosine={self.cosine}, symmetric={self.symmetric}"


class SigLIP(_Temperature):
    """`engine.kernels.siglip` with a temperature and a bias that the module learns, or keeps.

    Args:
        temperature: A positive number, at the start. The default is that of the paper.
        bias: A number, at the start. The default is that of the paper.
        learnable: Make the temperature's logarithm and the bias the parameters `log_temperature` and `bias`.
        max_scale: As for `InfoNCE`.
        cosine: As for `infonce`.
        reduction: As for `siglip`.
        gather: As for `infonce`: take the keys of all ranks.
        group: As for `infonce`.
        local_loss: As for `infonce`.

    Raises:
        EstimatorError: As for `InfoNCE`, or whatever `siglip` raises.

    Example:
        >>> loss = SigLIP()
        >>> loss(torch.randn(8, 16), torch.randn(8, 16)).backward()
        >>> loss.bias.grad.shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        *,
        learnable: bool = True,
        max_scale: float | None = None,
        cosine: bool = True,
        reduction: str = "mean",
        gather: bool | str = False,
        group: Any = None,
        local_loss: bool = False,
    ):
        super().__init__(temperature, learnable, max_scale)
        self.over_ranks = {"gather": gather, "group": group, "local_loss": local_loss}
        check_number("SigLIP", "bias", bias)
        check_reduction("SigLIP", reduction)
        self.bias = nn.Parameter(torch.tensor(float(bias))) if learnable else float(bias)
        self.cosine, self.reduction = cosine, reduction

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        negatives: Tensor | None = None,
        positives: Tensor | None = None,
        labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        mask: Tensor | None = None,
        row_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        exclude_self: bool = False,
    ) -> Tensor:
        """Arguments and result of `siglip`: a loss in nats, to be minimised."""
        if self.training:
            self.clamp_()
        return siglip(
            q, k, self.temperature, self.bias, cosine=self.cosine, negatives=negatives, positives=positives,
            labels=labels, key_labels=key_labels, mask=mask, row_ids=row_ids, key_ids=key_ids,
            exclude_self=exclude_self, reduction=self.reduction, **self.over_ranks,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={_shown(self.bias)}, cosine={self.cosine}"


class KeyQueue(nn.Module):
    """The last keys that were pushed, as the negatives of MoCo. Buffers `stored` and `position`, in state_dict.

    It starts with random directions, as MoCo's does; they are easy negatives until `size` keys have been pushed.

    Args:
        size: How many keys it holds.
        width: Their width.
        gather: Of several processes, `push` takes the keys of all ranks, rank 0's first, so that the queue is the same
            on all of them, as `negatives` of `infonce(gather=True)` are. It then starts with the same directions.
        group: As for `infonce`.

    Raises:
        EstimatorError: Sizes that are no whole numbers above 0, or keys that do not fit.

    Example:
        >>> queue, q, k = KeyQueue(64, 8), torch.randn(4, 8), torch.randn(4, 8)
        >>> loss = InfoNCE(0.07, cosine=True)(q, k, negatives=queue.keys(), in_batch=False)
        >>> queue.push(k)
        >>> torch.equal(queue.keys()[:4], k)
        True
    """

    def __init__(self, size: int, width: int, *, gather: bool = False, group: Any = None):
        super().__init__()
        check_count("KeyQueue", "size", size)
        check_count("KeyQueue", "width", width)
        self.gather, self.group = gather, group
        generator = torch.Generator().manual_seed(size) if gather else None
        self.register_buffer("stored", nn.functional.normalize(torch.randn(size, width, generator=generator), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def keys(self) -> Tensor:
        """A copy, [size, width], so that a later `push` does not change what a backward pass needs.

        Raises:
            ConfigError: In training mode while a backward pass runs: keys may have been pushed since the forward pass.
        """
        advice = "Read keys() outside of checkpoint and of hooks, and pass them in."
        stored = as_read("KeyQueue", self.stored, self.training, advice)
        return stored if torch.compiler.is_compiling() else stored.clone()  # in a graph it is a copy already

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replace the oldest keys by `keys`, [n, width], n at most `size`; with `gather` by those of all ranks."""
        size, width = self.stored.shape
        if self.gather or self.group is not None:
            from engine.kernels.ranks.columns import keys_of_all

            keys = keys_of_all("KeyQueue", keys, width, self.gather, self.group)
        exact_type("KeyQueue", keys)
        if keys.dim() != 2 or keys.shape[1] != width or len(keys) > size:
            expected = f"[n, {width}] with n at most {size}"
            raise EstimatorError("KeyQueue", f"keys {list(keys.shape)}", expected, "Push the keys of one batch.")
        place = (self.position + torch.arange(len(keys), device=self.stored.device)) % size
        self.stored[place] = keys.to(self.stored)
        self.position.copy_((self.position + len(keys)) % size)

    def extra_repr(self) -> str:
        return f"size={self.stored.shape[0]}, width={self.stored.shape[1]}"


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
        if bound not in BOUNDS:
            raise EstimatorError(
                "MILowerBound", f"bound {bound!r}", f"one of {', '.join(BOUNDS)}", "Choose one of these."
            )
        check_settings("MILowerBound", alpha, smile_tau, ema_rate)
        if groups is not None:
            check_count("MILowerBound", "groups", groups)
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
        average = as_read("MINE's moving average", self.log_ema, self.training)
        value, log_ema = mi_lower_bound(scores_or_q, k, log_ema=average, ema_rate=self.ema_rate, **settings)
        if self.training:
            update_buffer("MINE's moving average", self.log_ema, log_ema)
        return value

    def extra_repr(self) -> str:
        return self.bound
