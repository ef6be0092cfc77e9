"""Multimodal fusion held by information terms, after MMIM (Han, Chen and Poria, EMNLP 2021), on generated data.

Text, audio and vision each see one sentiment through their own disturbance. Information terms ask text for what it
shares with audio and vision, and the fused feature for what each modality holds. Five estimators learn in stage 1, the
model in stage 2, both on every batch. The engine's version is `train_batch` of a `TwoStageStep`. The plain version
writes critics, InfoNCE and both stages by hand. Both start from the same weights and train alike.

    python examples/mmim_style.py
"""

import math

import torch
from compare import Outcome, main
from torch import Tensor, nn
from torch.nn import functional

from engine import MI, Objective, TwoStageStep
from engine.config import ObjectiveConfig

WIDTHS = {"T": 40, "A": 20, "V": 12}
TERMS = (("T", "A"), ("T", "V"), ("F", "T"), ("F", "A"), ("F", "V"))
BATCH, SAMPLES, STEPS, WIDTH, HIDDEN, EMBED, WEIGHT = 128, 1024, 150, 32, 64, 32, 0.1


def make_data(samples: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Modalities [samples, width] and labels [samples, 1]: shared factors under strong private ones."""
    mixing = torch.Generator().manual_seed(1)
    shared = torch.randn(samples, 4, generator=generator)
    inputs = {}
    for name, width in WIDTHS.items():
        private = 1.5 * torch.randn(samples, 6, generator=generator)
        mixed = torch.cat([shared, private], 1) @ torch.randn(10, width, generator=mixing)
        inputs[name] = mixed + 0.3 * torch.randn(samples, width, generator=generator)
    return inputs, shared.sum(1, keepdim=True).tanh() * 3


class Fusion(nn.Module):
    """A feature per modality, the fused feature F, and a head."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(w, 64), nn.ReLU(), nn.Linear(64, WIDTH)) for n, w in WIDTHS.items()}
        )
        self.fusion = nn.Sequential(nn.Linear(3 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, T: Tensor, A: Tensor, V: Tensor) -> dict[str, Tensor]:
        features = {name: self.encoders[name](x) for name, x in {"T": T, "A": A, "V": V}.items()}
        features["F"] = features["T"] + self.fusion(torch.cat(list(features.values()), 1))
        return {"prediction": self.head(features["F"]), **features}


def make_objective() -> Objective:
    return Objective(
        [WEIGHT * MI(x, y) for x, y in TERMS],
        dims=dict.fromkeys("TAVF", WIDTH),
        settings=ObjectiveConfig(bound="infonce", hidden=HIDDEN, embed=EMBED),
    )


class PlainCritic(nn.Module):
    """InfoNCE with a separable critic, as it is usually written."""

    def __init__(self):
        super().__init__()
        self.g, self.h = (
            nn.Sequential(
                nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
                nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EMBED),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = self.h(y) @ self.g(x).t()
        return math.log(len(x)) - functional.cross_entropy(scores, torch.arange(len(x)))


def with_engine(model: Fusion, batches: list[dict[str, Tensor]]) -> list[float]:
    objective = make_objective()
    step = TwoStageStep(
        model,
        objective,
        functional.l1_loss,
        torch.optim.Adam(model.parameters(), 1e-3),
        torch.optim.Adam(objective.parameters(), 1e-3),
        label=None,
    )
    return [step.train_batch(batch).loss.item() for batch in batches]


def by_hand(model: Fusion, batches: list[dict[str, Tensor]]) -> list[float]:
    start = make_objective().estimator_state()  # the same first weights as the engine's
    critics = nn.ModuleList(PlainCritic() for _ in TERMS)
    for (x, y), critic in zip(TERMS, critics, strict=True):
        prefix = f"estimators.{x}_{y}.critic."
        critic.load_state_dict({k.removeprefix(prefix): v for k, v in start.items() if k.startswith(prefix)})
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    critic_optimizer = torch.optim.Adam(critics.parameters(), 1e-3)
    losses = []
    for batch in batches:
        out = model(batch["T"], batch["A"], batch["V"])
        fixed = {name: out[name].detach() for name in "TAVF"}
        bound = sum(critic(fixed[x], fixed[y]) for (x, y), critic in zip(TERMS, critics, strict=True))
        critic_optimizer.zero_grad()
        (-bound).backward()
        critic_optimizer.step()
        critics.requires_grad_(False)
        bound = sum(critic(out[x], out[y]) for (x, y), critic in zip(TERMS, critics, strict=True))
        loss = functional.l1_loss(out["prediction"], batch["y"]) - WEIGHT * bound
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        critics.requires_grad_(True)
        losses.append(loss.item())
    return losses


def train(side: str, steps: int = STEPS) -> Outcome:
    """Losses of all steps, and the mean absolute error on 4,000 new samples."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    inputs, label = make_data(SAMPLES, generator)
    rows = [torch.randint(SAMPLES, (BATCH,), generator=generator) for _ in range(steps)]
    batches = [{**{name: x[i] for name, x in inputs.items()}, "y": label[i]} for i in rows]
    model = Fusion()
    losses = {"engine": with_engine, "plain": by_hand}[side](model, batches)
    inputs, label = make_data(4000, torch.Generator().manual_seed(7))
    with torch.no_grad():
        error = functional.l1_loss(model(**inputs)["prediction"], label).item()
    return Outcome(losses, error)


if __name__ == "__main__":
    main(train, STEPS, "error on new")
