"""Forget a disturbance: what each bound leaves of it in a learned feature.

Two factors are mixed into every observation: M, which the task wants, and S, which the feature Z should not keep, such
as the machine that made a recording. The task loss asks for M, and a term with a negative weight asks Z to drop S:

    -0.03 * MI("Z", "S", bound="club")

The term's reading does not measure what is left of S, because the estimator may lag behind the encoder. So nearest
neighbours and ridge regression predict S from Z on new observations: see `engine.probe`.

    python examples/leak.py
"""

import time

import torch
from torch import Tensor, nn

from engine import MI, Objective, TwoStageStep, probe
from engine.config import ObjectiveConfig

METHODS = ("none", "infonce", "club", "club_sample", "l1out")
SAMPLES, BATCH, STEPS, UPDATES, WEIGHT = 4096, 128, 600, 4, 0.03


def make_data(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Observations [n, 16] of M [n, 2] and S [n, 2]: mixed, bent and noisy."""
    mixing = torch.Generator().manual_seed(1)
    m, s = torch.randn(n, 2, generator=generator), torch.randn(n, 2, generator=generator)
    mixed = torch.cat([m, s], 1) @ torch.randn(4, 16, generator=mixing)
    noise = 0.1 * torch.randn(n, 16, generator=generator)
    return mixed + 0.5 * torch.sin(mixed) + noise, m, s


class Model(nn.Module):
    """Encoder and head. S passes through, so that the objective can read it."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
        self.head = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        observation, s = inputs
        z = self.encoder(observation)
        return self.head(z), {"Z": z, "S": s}


def train(method: str, seed: int = 0, steps: int = STEPS, weight: float = WEIGHT) -> dict[str, float]:
    """Train with one method; then the term's reading (nats), R² of S left in Z and the task loss, on new rows."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, m, s = make_data(SAMPLES, generator)
    model, bound = Model(), "infonce" if method == "none" else method
    objective = Objective(
        [-weight * MI("Z", "S", bound=bound).named("leak")],
        dims={"Z": 8, "S": 2},
        settings=ObjectiveConfig(hidden=64, embed=16),
        advise=False,  # this script minimises InfoNCE to show what comes of it
    )
    optimizers = torch.optim.Adam(model.parameters(), 3e-4), torch.optim.Adam(objective.parameters(), 3e-3)
    step = TwoStageStep(model, objective, nn.functional.mse_loss, *optimizers, label=None)

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        rows = torch.randint(SAMPLES, (BATCH,), generator=generator)
        return (x[rows], s[rows]), m[rows]

    for _ in range(steps):
        # The estimator must follow the encoder closely: some updates of it for each one of the encoder.
        for _ in range(0 if method == "none" else UPDATES):
            step.stage1(step.features(*batch()), None)
        step.stage2(*batch(), None, information=method != "none")
    x, m, s = make_data(2000, generator)
    with torch.no_grad():
        prediction, features = model((x, s))
        reading = objective.eval().model_loss(features).values["leak"].item()
    left = probe(features["Z"], s)
    loss = nn.functional.mse_loss(prediction, m).item()
    return {
        "reading": float("nan") if method == "none" else reading,
        "knn": left.knn,
        "linear": left.linear,
        "loss": loss,
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
