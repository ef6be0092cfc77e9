"""FLOPs of the matrix products that an epoch needs: of valid tokens and frames only, and nothing twice.

A product of [m, k] and [k, n] is 2mkn. A linear layer's backward is one product for the weight and one for the input.
Counted: the text encoder with its attention, projections, recurrences, CubeMLP (of its first time mix, valid rows
only), head, estimators, distances of the nearest-neighbour search. Not counted: anything elementwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.config import Config

CONDITIONS = 3  # T, A and V: the label's draws need no distances
MI_TERMS, CMI_TERMS = 5, 6
PARTS = ("text", "recurrence", "fusion", "estimators", "neighbours")


def text_forward(tokens: Sequence[int], layers: int, hidden: int, intermediate: int, d_common: int) -> float:
    """Encoder and projection of texts with these token counts."""
    n = np.asarray(tokens, np.float64)
    layer = 2 * n * (4 * hidden**2 + 2 * hidden * intermediate) + 4 * n**2 * hidden
    return float((layers * layer + 2 * n * hidden * d_common).sum())


def gru_forward(frames: Sequence[int], d_in: int, width: int, layers: int = 2) -> tuple[float, float]:
    """A bidirectional GRU: (all products, products of the first layer with its input, which need no input gradient)."""
    n = float(np.sum(frames))
    first = 2 * n * 2 * 3 * width * d_in
    later = (layers - 1) * 2 * n * 2 * 3 * width * 2 * width
    return first + later + layers * 2 * n * 2 * 3 * width * width, first


def cube_forward(
    valid_rows: float, samples: int, shapes: Sequence[Sequence[int]], hiddens: Sequence[Sequence[int]]
) -> float:
    """CubeMLP from shapes[0] through shapes[1:]; `valid_rows`: valid (sample, time, modality) positions."""
    total = 0.0
    for block, (before, after, hidden) in enumerate(zip(shapes[:-1], shapes[1:], hiddens, strict=True)):
        (l0, k0, d0), (l1, k1, d1), (lh, kh, dh) = before, after, hidden
        rows = valid_rows if block == 0 else samples * l0 * k0
        total += 2 * rows * d0 * (lh + l1) + 2 * samples * k0 * d0 * lh * l1
        total += 2 * samples * l1 * d0 * (k0 * kh + kh * k1 + k0 * k1)
        total += 2 * samples * l1 * k1 * (d0 * dh + dh * d1 + d0 * d1)
    return total


def estimator_products(batch: int, width: int, hidden: int, embed: int) -> dict[str, float]:
    """One batch through all eleven estimators: forward, and the backward of stage 1 and of stage 2."""
    first, middle, last = width * hidden, 2 * hidden**2, hidden * embed
    towers = 2 * 2 * batch * (first + middle + last) + 2 * batch**2 * embed
    towers_first = 2 * 2 * batch * first
    c_first, c_rest = 3 * width * hidden, 2 * hidden**2 + hidden
    rows = 2 * batch  # joint and product
    forward = MI_TERMS * towers + CMI_TERMS * 2 * rows * (c_first + c_rest)
    # stage 1: no gradient of the features; stage 2: none of the weights, and of the joint rows alone
    scores = 2 * batch**2 * embed
    stage1 = MI_TERMS * (2 * towers - towers_first) + CMI_TERMS * 2 * rows * (c_first + 2 * c_rest)
    stage2 = MI_TERMS * (towers + scores) + CMI_TERMS * 2 * batch * (c_first + c_rest)
    return {"forward": forward, "stage1": stage1, "stage2": stage2}


def epoch(
    config: Config,
    tokens: Sequence[int],
    audio: Sequence[int],
    vision: Sequence[int],
    widths: tuple[int, int],
    text: tuple[int, int, int],
) -> dict[str, float]:
    """FLOPs of a steady-state epoch by part (`PARTS`).

    Args:
        config: resolved; its stage1_features decides how many forward passes stage 1 needs.
        tokens, audio, vision: valid lengths of every sample; tokens already cut to time_len.
        widths: columns of audio and vision. text: layers, hidden and intermediate size of the text encoder.
    """
    m, n, b = config.model, len(tokens), config.batch_size
    passes = {"cached": 1, "fresh": config.train.stage1_n, "bank": 0}[config.train.stage1_features]
    cap = config.data.time_len
    layers, hidden, intermediate = text
    text_products = text_forward(tokens, layers, hidden, intermediate, m.d_common)
    recurrent = [gru_forward(f, w, m.d_common) for f, w in ((audio, widths[0]), (vision, widths[1]))]
    valid = float(sum(np.minimum(lengths, cap).sum() for lengths in (tokens, audio, vision)))
    shapes = [(cap, 3, m.d_common), *m.cubemlp.d_outs]
    cube = cube_forward(valid, n, shapes, m.cubemlp.d_hiddens)
    o, batches = config.objective, n / b
    estimators = estimator_products(b, m.d_common, o.hidden, o.embed)
    updates = config.train.stage1_n
    draws = (updates + 1) * batches
    return {
        "text": (passes + 3) * text_products,
        "recurrence": sum((passes + 3) * total - first for total, first in recurrent),
        "fusion": (passes + 3) * cube,
        "estimators": batches
        * (updates * (estimators["forward"] + estimators["stage1"]) + estimators["forward"] + estimators["stage2"]),
        "neighbours": draws * CONDITIONS * 2 * (b // o.k_neighbor) * n * m.d_common,
    }
