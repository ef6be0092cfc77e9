"""Formulas of FLOPs against torch's own count of the reference backend, which does the same products in plain torch."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.kernels import flops, registry
from engine.kernels.cmi.op import classifier_logits
from engine.kernels.critics.op import concat_infonce, concat_scores, grouped_infonce, grouped_mlp
from engine.kernels.cube_mix.op import cube_mix
from engine.kernels.knn_product.op import knn_product_samples
from engine.kernels.mi_bounds.op import infonce, mi_lower_bound
from engine.kernels.recurrent.op import bidirectional
from tests.kernels.compiled import needs_compiler

flops.register()

B, D, H, E = 6, 5, 7, 4


def counted(function, backend: str) -> int:
    with registry.use_backend(backend), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def leaf(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, requires_grad=True)


def towers(count: int):
    x = [leaf(B, D), leaf(B, D + 1)]
    first = [(leaf(count, H, D), leaf(count, H)), (leaf(count, H, D + 1), leaf(count, H))]
    rest = [(leaf(2 * count, H, H), leaf(2 * count, H)), (leaf(2 * count, E, H), leaf(2 * count, E))]
    return x, first, rest


def layers():
    return [(leaf(H, 2 * D), leaf(H)), (leaf(H, H), leaf(H)), (leaf(1, H), leaf(1))]


def mlps():
    grouped_mlp(*towers(2)).sum().backward()


def cubes(residual: bool = True):
    x, width = leaf(B, 3, D), H if residual else 3
    weights = leaf(H, 3), leaf(H), leaf(width, H), leaf(width), leaf(width, 3) if residual else None
    cube_mix(x, 1, *weights, leaf(width), leaf(width), activation="gelu").sum().backward()


@pytest.mark.parametrize("function", [mlps, cubes, lambda: cubes(False)], ids=["mlps", "cube", "cube without residual"])
def test_the_same_products_as_plain_torch(function):
    assert counted(function, "cpu") == counted(function, "reference") > 0


def test_grouped_infonce_needs_no_second_pass_over_its_scores():
    x, first, rest = towers(2)
    ours = counted(lambda: grouped_infonce(x, first, rest, [0, 1], [2, 3]).sum().backward(), "cpu")
    plain = counted(lambda: grouped_mlp(x, first, rest).sum().backward(), "cpu")
    assert ours == plain + 3 * 2 * 2 * B * B * E


def test_concat_critics_split_their_first_layer():
    x, y, weights = leaf(B, D), leaf(B + 1, D), layers()
    first, pairs = 2 * (B + B + 1) * D * H, 2 * B * (B + 1) * (H * H + H)
    assert counted(lambda: concat_scores(x, y, weights), "cpu") == first + pairs
    # the backward pass computes the pairs again
    assert counted(lambda: concat_scores(x, y, weights).sum().backward(), "cpu") == 4 * first + 4 * pairs
    both = counted(lambda: concat_infonce(x, leaf(B, D), weights).backward(), "cpu")
    assert both == 3 * 2 * 2 * B * D * H + 3 * 2 * B * B * (H * H + H)


def test_streaming_computes_its_scores_again():
    q, k = leaf(600, D), leaf(600, D)
    product = 2 * 600 * 600 * D
    assert counted(lambda: infonce(q, k).backward(), "cpu") in (3 * product, 4 * product)
    assert counted(lambda: infonce(q.detach(), k.detach()), "cpu") == product
    assert counted(lambda: mi_lower_bound(q.detach(), k.detach(), bound="nwj"), "cpu") == product


def test_contrastive_losses_do_what_plain_torch_does():
    """With a mean the scores are computed once; per row they are computed again. A queue receives no gradient."""
    q, k, queue, labels = leaf(B, D), leaf(B, D), leaf(9, D).detach(), torch.arange(B) % 2
    scores = 2 * B * B * D
    for reduction, times in (("mean", 3), ("none", 4)):
        call = partial(infonce, q, k, labels=labels, reduction=reduction)
        assert counted(lambda call=call: call().sum().backward(), "cpu") == times * scores
    assert counted(lambda: infonce(q, k, labels=labels).backward(), "reference") == 3 * scores
    of_queue = counted(lambda: infonce(q, k, negatives=queue, in_batch=False).backward(), "cpu")
    assert of_queue == 2 * 2 * B * 9 * D


def test_classifiers_of_conditional_information_read_a_label_as_one_column():
    joint, k, p = [leaf(B, D), leaf(B, 1), leaf(B, D)], 2, 4
    product = [(torch.randn(p, D), torch.randn(p // k, 1), torch.randn(p // k, D))]
    first, rest = (leaf(1, H, 3 * D), leaf(1, H)), [(leaf(1, 1, H), leaf(1, 1))]

    def run():
        of_joint, of_product = classifier_logits(first, rest, joint, [(0, 1, 2)], product, k)
        (of_joint.sum() + of_product.sum()).backward()

    of_joint, of_product = 2 * B * H * (2 * D + 1), 2 * H * (p * D + p // k * (D + 1))
    last = 2 * (B + p) * H
    assert counted(run, "cpu") == of_joint + of_product + last + 2 * last + 2 * of_joint + of_product


@needs_compiler
@pytest.mark.parametrize("input_grad", [False, True])
def test_recurrences(input_grad):
    rnn = torch.nn.GRU(D, H, num_layers=2, bidirectional=True, batch_first=True)
    weights = [p for names in rnn.all_weights for p in (names if isinstance(names, list) else [names])]
    x, length = leaf(2, 3, D).detach().requires_grad_(input_grad), torch.tensor([3, 2])
    matrices = sum(2 * 5 * w.numel() for w in weights if w.dim() == 2)
    inputs = 2 * 5 * 2 * 3 * H * D
    found = counted(lambda: bidirectional(x, length, weights, "gru").sum().backward(), "cpu")
    assert found == 3 * matrices - (0 if input_grad else inputs)


def test_distances_to_the_whole_bank():
    x, z = torch.randn(50, D), torch.randn(50, D)
    assert counted(lambda: knn_product_samples(x, x, z, 6, 2), "cpu") == 2 * 6 * 50 * D
