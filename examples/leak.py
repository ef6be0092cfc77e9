"""Forget a disturbance: what each bound leaves of it in a learned feature.

Two factors are mixed into every observation: M, which the task wants, and S, which the feature Z should not keep, such
as the machine that made a recording. An encoder learns Z from the observation. The task loss asks for M, and a term
with a negative weight asks Z to drop S:

    -1.0 * MI("Z", "S", bound="club")

The term's value is no measure of what is left, because a critic that fails reads 0 as well. So the last column counts:
R² of nearest neighbours that predict S from Z on new observations.

    python examples/leak.py
"""

import time

import torch
from torch import Tensor, nn

from engine import MI, Objective, TwoStageStep, probe
from engine.config import ObjectiveConfig

METHODS = ("none", "infonce", "club", "club_sample", "l1out")
SAMPLES, BATCH, EPOCHS, STAGE1, WEIGHT = 1024, 128, 30, 4, 1.0


def make_data(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Observations [n, 16] of M [n, 2] and S [n, 2]: mixed, bent and noisy."""
    mixing = torch.Generator().manual_seed(1)
    m, s = torch.randn(n, 2, generator=generator), torch.randn(n, 2, generator=generator)
    mixed = torch.cat([m, s], 1) @ torch.randn(4, 16, generator=mixing)
    noise = 0.1 * torch.randn(n, 16, generator=generator)
    return mixed + 0.5 * torch.sin(mixed) + noise, m, s


class Model(nn.Module):
    """Encoder and head. S is a feature only for the objective."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        observation, s = inputs
        z = self.encoder(observation)
        return self.head(z), {"Z": z, "S": s}


def train(method: str, seed: int = 0) -> dict[str, float]:
    """Train with one method: the term's last value (nats), R² of S left in Z, and the task loss, on new rows."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, m, s = make_data(SAMPLES, generator)
    batches = [((x[r], s[r]), m[r], r) for r in torch.arange(SAMPLES).split(BATCH)]
    model, bound = Model(), None if method == "none" else method
    objective = Objective(
        [-(0.0 if method == "none" else WEIGHT) * MI("Z", "S", bound=bound).named("leak")],
        dims={"Z": 4, "S": 2},
        settings=ObjectiveConfig(hidden=64, embed=16),
        advise=False,
    )
    optimizers = torch.optim.Adam(model.parameters(), 2e-3), torch.optim.Adam(objective.parameters(), 2e-3)
    step = TwoStageStep(model, objective, nn.functional.mse_loss, *optimizers, label=None, generator=generator)
    bank = None
    for _ in range(EPOCHS):
        result, bank = step.train_epoch(batches, SAMPLES, bank, batch_size=BATCH, stage1_n=STAGE1)
    x, m, s = make_data(2000, generator)
    with torch.no_grad():
        prediction, features = model((x, s))
    left = probe(features["Z"], s)
    return {
        "reading": result.information["leak"],
        "knn": left.knn,
        "linear": left.linear,
        "loss": nn.functional.mse_loss(prediction, m).item(),
    }


def main() -> dict[str, dict[str, float]]:
    """The table of all methods."""
    print(f"{'bound':12} {'reading, nats':>14} {'kNN R² of S left':>17} {'linear R² left':>15} {'task loss':>10}")
    rows = {}
    for method in METHODS:
        row = rows[method] = train(method)
        print(f"{method:12} {row['reading']:14.3f} {row['knn']:17.3f} {row['linear']:15.3f} {row['loss']:10.4f}")
    return rows


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
