"""The trainer of stacked fold networks: what it keeps, and how a fold's checkpoint is chosen."""

import math

import pytest
import torch

from engine.information.folds import FoldTrainer, batches_of, best_on_others

TARGET = torch.tensor([1.0, -2.0, 3.0])


def trainer(**options) -> FoldTrainer:
    """Three folds of one number each, which are to reach TARGET."""
    weight = torch.zeros(3, 1, requires_grad=True)

    def read(weights):
        distance = (weights[0][:, 0].detach() - TARGET).abs()
        return -distance, -2 * distance

    return FoldTrainer(
        [weight],
        lambda rows: (weight[:, 0] - TARGET).square().sum(),
        read,
        batches_of([torch.arange(4)] * 3, 2, torch.Generator().manual_seed(0)),
        **{"rate": lambda step: 0.1, "every": 5, "weight_decay": 0.0} | options,
    )


def test_checks_hold_readings_and_weights():
    made = trainer()
    made.train(12)
    assert [check.step for check in made.checks] == [0, 5, 10, 12]
    assert torch.equal(made.checks[0].held_out, -2 * TARGET.abs())
    assert made.best() == 3 and made.gain() == pytest.approx((made.held_out[3] - made.held_out[0]).mean().item())
    assert made.history()[0] == {"step": 0, "training": -2.0, "held_out": -4.0}


def test_each_fold_gets_the_weights_of_its_own_check():
    made = trainer()
    made.train(10)
    chosen = made.chosen([0, 2, 1])[0][:, 0]
    expected = [made.checks[check].weights[0][fold, 0] for fold, check in enumerate([0, 2, 1])]
    assert chosen.tolist() == [0.0, *map(float, expected[1:])]
    made.load([0, 2, 1])
    assert torch.equal(made.parameters[0][:, 0].detach(), chosen)


def test_the_rate_and_the_average_are_followed():
    still = trainer(rate=lambda step: 0.1 if step > 5 else 0.0)
    still.train(5)
    assert torch.equal(still.checks[1].weights[0], torch.zeros(3, 1))
    averaged, plain = trainer(average=0.9), trainer()
    for made in (averaged, plain):
        made.train(5)
    assert (averaged.checks[1].weights[0].abs() < plain.checks[1].weights[0].abs()).all()


def test_the_average_is_the_mean_of_all_weights_so_far_until_it_forgets():
    averaged, plain = trainer(average=0.8, every=1), trainer(every=1)
    for made in (averaged, plain):
        made.train(6)
    weights, found = ([check.weights[0] for check in made.checks] for made in (plain, averaged))
    for step in range(5):  # 1 - 0.8 = 1 / 5
        torch.testing.assert_close(found[step], torch.stack(weights[: step + 1]).mean(0))
    torch.testing.assert_close(found[6], 0.8 * (0.8 * found[4] + 0.2 * weights[5]) + 0.2 * weights[6])


def test_rates_weight_decay_and_clipping():
    """The first step of Adam is the rate, whatever the gradient; decay takes the weight's share of it before."""
    rates = []
    made = trainer(rate=lambda step: rates.append(step) or 0.1, weight_decay=0.5)
    with torch.no_grad():
        made.parameters[0].add_(10)
    made.train(3)
    assert rates == [1, 2, 3] and made.optimizer.param_groups[0]["lr"] == 0.1
    first = trainer(weight_decay=0.5)
    with torch.no_grad():
        first.parameters[0].add_(10)
    first.train(1)
    torch.testing.assert_close(first.parameters[0].detach()[:, 0], torch.full((3,), 10 * (1 - 0.05) - 0.1))
    clipped = trainer(most_gradient=1.0)
    clipped.train(1)
    gradient = clipped.parameters[0].grad[:, 0]
    torch.testing.assert_close(gradient, -TARGET / TARGET.norm(), rtol=1e-4, atol=1e-6)


def test_networks_that_broke_are_never_chosen():
    made = trainer()
    made.read = lambda weights: (torch.ones(3), torch.tensor([math.nan, 5.0, 5.0]))
    made.train(5)
    assert made.best() == 0 and made.held_out[1].tolist() == [-math.inf, 5.0, 5.0]
    assert best_on_others(made.held_out) == [1, 0, 0]


def test_readings_before_the_first_step_may_be_given():
    before = torch.tensor([1.0, 2.0, 3.0])
    made = trainer(before=(before, 2 * before))
    assert made.history() == [{"step": 0, "training": 2.0, "held_out": 4.0}]


def test_the_other_folds_choose():
    readings = torch.tensor([[0.0, 0.0, 0.0], [9.0, 1.0, 1.0], [0.0, 3.0, 3.0]])
    assert best_on_others(readings) == [2, 1, 1]  # fold 0 does not see its own 9
    assert best_on_others(readings, margin=4.0) == [0, 1, 1]  # 3 is no more than 4; 5 is
    assert best_on_others(readings - 2, margin=1.1) == [0, 1, 1]  # -2 + 1.1 (1 + 2) = 1.3: 1 is no more; 3 is
    assert best_on_others(torch.tensor([[1.0, 1.0], [1.0, 1.0]])) == [0, 0]


def test_batches_pass_over_all_rows_before_any_comes_again():
    parts = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])]
    batches = batches_of(parts, 2, torch.Generator().manual_seed(0))
    for _ in range(3):
        both = torch.cat([next(batches), next(batches)], 1)
        assert [sorted(rows) for rows in both.tolist()] == [part.tolist() for part in parts]
