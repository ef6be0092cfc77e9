"""Information terms on a model that is not MIMRL, trained in two stages.

Two sensors see the same event, and each also records which machine it sits on: a nuisance that happens to go with the
label in training but not in the field. We ask for features that the two views share, I(Z1;Z2), and that know nothing of
the machine beyond what the label explains, I(Z1;M|Y) and I(Z2;M|Y).

    python examples/foreign_model.py
"""

import torch
from torch import nn

from engine import CMI, MI, Objective, TwoStageStep

SEED, N, BATCH, EPOCHS = 0, 2048, 128, 12


def make_data(n: int, agreement: float, generator: torch.Generator):
    """Views [n, 16] twice, label [n] and machine [n, 1]; `agreement` = P(machine is the one usual for the label)."""
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    label = (torch.rand(n, generator=generator) < 0.5).float()
    machine = torch.where(torch.rand(n, generator=generator) < agreement, label, 1 - label)
    directions = torch.Generator().manual_seed(1)
    views = []
    for _ in range(2):
        w_label, w_machine = torch.randn(16, generator=directions), torch.randn(16, generator=directions)
        views.append(0.5 * (label - 0.5)[:, None] * w_label + 2 * (machine - 0.5)[:, None] * w_machine + 1.5 * draw(n, 16))
    return views[0], views[1], label, machine[:, None]


class TwoViews(nn.Module):
    """Any module will do as long as it returns (prediction, features)."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(2))
        self.head = nn.Linear(16, 1)

    def forward(self, inputs):
        view1, view2, machine = inputs
        z1, z2 = self.encoders[0](view1), self.encoders[1](view2)
        return self.head(torch.cat([z1, z2], 1)), {"Z1": z1, "Z2": z2, "M": machine}


def batches(data, generator):
    view1, view2, label, machine = data
    for rows in torch.randperm(len(label), generator=generator).split(BATCH):
        yield (view1[rows], view2[rows], machine[rows]), label[rows], rows


def main(weight: float) -> tuple[float, dict[str, float]]:
    """Field accuracy and the last epoch's information terms, with the terms weighted by `weight`."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    train, field = make_data(N, 0.9, generator), make_data(N, 0.5, generator)
    model = TwoViews()
    objective = Objective(
        [
            0.02 * weight * MI("Z1", "Z2"),
            -weight * (CMI("Z1", "M", given="Y") + CMI("Z2", "M", given="Y")).named("machine"),
        ],
        dims={"Z1": 8, "Z2": 8, "M": 1, "Y": 1},
        discrete=("Y",),
    )
    step = TwoStageStep(
        model, objective, lambda prediction, y: nn.functional.binary_cross_entropy_with_logits(prediction[:, 0], y),
        torch.optim.Adam(model.parameters(), 1e-3), torch.optim.Adam(objective.parameters(), 1e-3), label="Y",
    )  # fmt: skip
    bank = None
    for _ in range(EPOCHS):

        class Loader:
            def __iter__(self):
                return batches(train, generator)

        result, bank = step.train_epoch(Loader(), N, bank, batch_size=BATCH, stage1_n=3)
    with torch.no_grad():
        prediction, _ = model((field[0], field[1], field[3]))
    return ((prediction[:, 0] > 0).float() == field[2]).float().mean().item(), result.information


if __name__ == "__main__":
    for weight in (0.0, 1.0):
        accuracy, information = main(weight)
        terms = "  ".join(f"{name} {nats:+.3f} nats" for name, nats in information.items())
        print(f"weight {weight:g}: accuracy in the field {accuracy:.3f}   {terms}")
