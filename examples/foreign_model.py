"""Information terms on a model that is not MIMRL, trained in two stages.

Two sensors see the same event, each through its own strong disturbance, and only a few events are labelled. The task
loss can use only these. The information term I(Z1;Z2) asks both encoders for what the two views share, which needs no
label. Compare the accuracy on new events with and without it.

    python examples/foreign_model.py
"""

import torch
from torch import Tensor, nn

from engine import MI, Objective, TwoStageStep
from engine.config import ObjectiveConfig

EVENTS, LABELLED, BATCH, EPOCHS = 1024, 32, 128, 15


def make_data(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Views [n, 20] twice and labels [n]: 4 shared factors decide the label, 6 private ones a view disturb it."""
    mixing = torch.Generator().manual_seed(1)
    shared = torch.randn(n, 4, generator=generator)
    views = []
    for _ in range(2):
        private = 2 * torch.randn(n, 6, generator=generator)
        noise = 0.3 * torch.randn(n, 20, generator=generator)
        views.append(torch.cat([shared, private], 1) @ torch.randn(10, 20, generator=mixing) + noise)
    label = (shared @ torch.randn(4, generator=mixing) > 0).float()
    return views[0], views[1], label


class TwoViews(nn.Module):
    """Any module will do as long as it returns (prediction, features)."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(2))
        self.head = nn.Linear(16, 1)

    def forward(self, views: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        z1, z2 = (encoder(view) for encoder, view in zip(self.encoders, views, strict=True))
        return self.head(torch.cat([z1, z2], 1)), {"Z1": z1, "Z2": z2}


class Loader:
    """Batches of (inputs, target, index); the target of an unlabelled event is NaN."""

    def __init__(self, data: tuple[Tensor, Tensor, Tensor], generator: torch.Generator):
        self.view1, self.view2, self.label = data
        self.label = torch.where(torch.arange(EVENTS) < LABELLED, self.label, torch.nan)
        self.generator = generator

    def __iter__(self):
        for rows in torch.randperm(EVENTS, generator=self.generator).split(BATCH):
            yield (self.view1[rows], self.view2[rows]), self.label[rows], rows


def labelled_loss(prediction: Tensor, target: Tensor) -> Tensor:
    known = ~target.isnan()
    loss = nn.functional.binary_cross_entropy_with_logits(prediction[known, 0], target[known], reduction="sum")
    return loss / known.sum().clamp(min=1)


def main(weight: float, seed: int = 0) -> tuple[float, float]:
    """Accuracy on 4,000 new events and the last epoch's I(Z1;Z2) in nats, with the term weighted by `weight`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = TwoViews()
    objective = Objective(
        [weight * MI("Z1", "Z2")],
        dims={"Z1": 8, "Z2": 8},
        settings=ObjectiveConfig(hidden=64, embed=16, compat="none"),
    )
    step = TwoStageStep(
        model,
        objective,
        labelled_loss,
        torch.optim.Adam(model.parameters(), 3e-3),
        torch.optim.Adam(objective.parameters(), 3e-3),
        label=None,
    )
    loader, bank = Loader(make_data(EVENTS, generator), generator), None
    for _ in range(EPOCHS):
        result, bank = step.train_epoch(loader, EVENTS, bank, batch_size=BATCH, stage1_n=2)
    view1, view2, label = make_data(4000, generator)
    with torch.no_grad():
        prediction, _ = model((view1, view2))
    return ((prediction[:, 0] > 0).float() == label).float().mean().item(), result.information["I(Z1;Z2)"]


if __name__ == "__main__":
    for weight in (0.0, 1.0):
        accuracy, nats = main(weight)
        print(f"weight {weight:g}: accuracy on new events {accuracy:.3f}, I(Z1;Z2) at least {nats:.2f} nats")
