"""Every differentiable operation as a function of tensors: what the tests of gradients and transforms run over."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import torch
from torch import Tensor

import engine
from engine.kernels import classifier_logits, cmi, cube_mix, infonce, mi_lower_bound, siglip
from engine.kernels.critics.op import concat_infonce, concat_scores, grouped_infonce, grouped_mlp
from engine.kernels.cube_mix import op as cube
from engine.kernels.dropout.op import dropout
from engine.kernels.recurrent import cudnn
from engine.kernels.recurrent import op as recurrent
from engine.kernels.stacked import stack_sequences
from engine.kernels.transformer import parts_of, plan
from engine.kernels.transformer.embedding import _EmbedNorm
from engine.kernels.transformer.op import add_norm, attention, bias_gelu
from engine.model.lowered import lower
from tests.kernels import critic_cases
from tests.kernels.critic_cases import draw

Case = tuple[Callable[..., Tensor], list[Tensor]]

LENGTH = torch.tensor([3, 1])


def functions() -> set[type]:
    """Every autograd.Function of the engine, whatever module it is in."""
    for module in pkgutil.walk_packages(engine.__path__, "engine."):
        if not module.name.endswith((".triton", ".__main__")) and "dali" not in module.name:
            importlib.import_module(module.name)
    return {f for f in _below(torch.autograd.Function) if f.__module__.startswith("engine.")}


def _below(kind: type) -> set[type]:
    return {found for child in kind.__subclasses__() for found in (child, *_below(child))}


def _classifiers(first, rest, joint) -> Tensor:
    product = [tuple(draw(4 if i == 0 else 2, 3, seed=10 * g + i) for i in range(3)) for g in range(2)]
    logits = classifier_logits(first, rest, joint, [(0, 1, 2), (2, 0, 1)], product, 2)
    return logits[0].sum() + logits[1].square().sum()


def _reading(joint: Tensor, product: Tensor) -> Tensor:
    found = cmi(joint, product, "dv")
    return found.loss + found.value


def _dropped(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return dropout(x, 0.4).square()


def _cube_pair(x: Tensor, *weights: Tensor) -> Tensor:
    return cube._CubePair.apply(x, "gelu", False, 1e-6, "fp32", *weights)


def _stacked(*sequences: Tensor) -> Tensor:
    cube, means = stack_sequences(sequences, [LENGTH, LENGTH], 3, fill=[True, False])
    return cube.sum() + sum(mean.square().sum() for mean in means)


def _embedded(*tensors: Tensor) -> Tensor:
    token_ids = torch.tensor([[1, 2, 1], [3, 0, 2]])
    return _EmbedNorm.apply(token_ids, None, *tensors, (None, 0.0, 1e-5, None, None))[0].square()


def _cube_weights(d_in: int, hidden: int, d_out: int, seed: int) -> list[Tensor]:
    shapes = (hidden, d_in), (hidden,), (d_out, hidden), (d_out,), (d_out, d_in), (d_out,), (d_out,)
    return [draw(*shape, seed=seed + i, scale=0.5) for i, shape in enumerate(shapes)]


def _rnn_tensors() -> list[Tensor]:
    """Input and weights of a GRU."""
    gru = torch.nn.GRU(2, 2, batch_first=True, bidirectional=True)
    weights = [draw(*w.shape, seed=i, scale=0.5) for i, w in enumerate(recurrent.parameters(gru))]
    return [draw(2, 3, 2, seed=99), *weights]


def cases() -> dict[str, Case]:
    """Name -> (function, tensors in fp64, all small): gradients with respect to all of these."""
    q, k, a = draw(4, 3, seed=0), draw(4, 3, seed=1), draw(4, seed=2)
    temperature = torch.tensor(0.7, dtype=torch.float64)
    positives = torch.tensor([2, 3, 0, 1])
    layers = [critic_cases.linear(2, o, i, seed=o, dtype=torch.float64) for o, i in ((5, 9), (5, 5), (1, 5))]
    joint = [draw(4, 3, seed=s) for s in range(3)]
    norm = draw(3, 4, seed=0), draw(4, seed=1), draw(4, seed=2), draw(4, seed=3), draw(3, 4, seed=4)
    bias = [draw(4, seed=s) for s in (1, 2, 3)]
    mask = torch.zeros(2, 1, 1, 3, dtype=torch.float64)
    found: dict[str, Case] = {
        "infonce": (lambda q, k, t: infonce(q, k, temperature=t), [q, k, temperature]),
        "infonce, none": (lambda q, k: infonce(q, k, reduction="none"), [q, k]),
        "infonce, cosine": (lambda q, k: infonce(q, k, cosine=True), [q, k]),
        "infonce, symmetric": (lambda q, k: infonce(q, k, symmetric=True), [q, k]),
        "infonce, positives": (lambda q: infonce(q, q, positives=positives, exclude_self=True), [q]),
        "infonce, own negatives": (lambda q, k, n: infonce(q, k, negatives=n), [q, k, draw(4, 2, 3, seed=3)]),
        "infonce, labels": (lambda q, k, t: infonce(q, k, temperature=t, labels=positives % 2), [q, k, temperature]),
        "infonce, hard": (lambda q, k: infonce(q, k, row_ids=positives % 3, hardness=0.5, reduction="none"), [q, k]),
        "infonce, MoCo": (lambda q, k, n: infonce(q, k, negatives=n, in_batch=False), [q, k, draw(5, 3, seed=3)]),
        "infonce, own negatives decoupled": (
            lambda q, k, n: infonce(q, k, negatives=n, decoupled=True), [q, k, draw(4, 2, 3, seed=3)]
        ),
        "infonce, own negatives and the batch": (
            lambda q, k, n: infonce(q, k, negatives=n, in_batch=True), [q, k, draw(4, 2, 3, seed=3)]
        ),
        "siglip": (lambda q, k, t, b: siglip(q, k, t, b), [q, k, temperature, draw(seed=4)]),
        "towers": critic_cases.by_tensors(grouped_mlp, critic_cases.grouped(4, (3, 2), (2, 1), 4, 2, 1)),
        "critics": critic_cases.by_tensors(
            lambda *c: grouped_infonce(*c, [0, 3], [1, 2]), critic_cases.grouped(4, (3, 2), (2, 2), 4, 2, 1)
        ),
        "concat": critic_cases.by_tensors(concat_scores, critic_cases.concat(4, 3, (3, 2), 4, 1)),
        "concat infonce": critic_cases.by_tensors(concat_infonce, critic_cases.concat(4, 4, (3, 2), 4, 1)),
        "classifiers": critic_cases.by_tensors(_classifiers, (layers[0], layers[1:], joint)),
        "cmi": (_reading, [draw(2, 5, seed=0), draw(2, 4, seed=1)]),
        "cube_mix": (lambda x, *w: cube_mix(x, 1, *w), [draw(2, 3, 2, 2, seed=0), *_cube_weights(3, 4, 5, 1)]),
        "recurrence": (lambda x, *w: recurrent.bidirectional(x, LENGTH, w, "gru"), _rnn_tensors()),
        "add_norm": (lambda x, w, s, b, r: add_norm(x, w, s, bias=b, residual=r)[0], list(norm)),
        "attention": (lambda x, *b: attention(x, *b, mask, heads=2), [draw(6, 12, seed=0), *bias]),
        "bias_gelu": (bias_gelu, [draw(3, 4, seed=0), draw(4, seed=1)]),
        "dropout": (_dropped, [draw(3, 4, seed=0)]),
    }  # fmt: skip
    for bound in ("dv", "mine", "tuba", "nwj", "js", "js_fgan", "smile", "interpolate"):

        def of(*source: Tensor, a: Tensor, bound: str = bound) -> Tensor:
            return mi_lower_bound(*source, bound=bound, log_baseline=a, alpha=0.3)

        found[f"bound {bound}"] = (lambda q, k, a, of=of: of(q, k, a=a), [q, k, a])
        found[f"scores {bound}"] = (lambda s, a, of=of: of(s, a=a), [draw(4, 4, seed=0), a])
    return found


def bare_cases() -> dict[str, Case]:
    """Functions that the operations call on a GPU, or under autocast, alone."""
    weights = [*_cube_weights(2, 3, 2, 1), *_cube_weights(4, 3, 5, 11)]
    shapes = (4, 3), (3, 3), (1, 3), (3,), (3,), (plan.norm_programs(6, 3), 3, 3)
    embeddings = [draw(*shape, seed=s).float() for s, shape in enumerate(shapes)]
    return {
        "cube_pair": (_cube_pair, [draw(2, 2, 4, seed=0), *weights]),
        "cudnn": (lambda x, *w: cudnn.bidirectional(x, LENGTH, w, "gru"), _rnn_tensors()),
        "stack_sequences": (_stacked, [draw(2, 3, 2, seed=s).float() for s in range(2)]),
        "embed_norm": (_embedded, embeddings),
        "parts_of": (lambda *v: parts_of([(3, v)])[0].sum(), [draw(4, seed=s).float() for s in range(2)]),
        "lower": (lambda *w: lower([w], torch.bfloat16)[0].float(), [draw(2, 3, seed=s).float() for s in range(2)]),
    }  # fmt: skip
