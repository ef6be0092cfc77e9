"""Content without style, after CLUB (Cheng et al., ICML 2020), on generated data.

A sample has content, which decides its label, and one of four styles. An upper bound on I(Z;S) is minimised, so that
the encoding Z forgets the style. What is left is measured on new data by a linear classifier of the style, which
knows nothing of the training; by chance its accuracy is 1 in 4. The engine's version is a term by the bound "club" and
`train_batch`, which updates the estimator five times for each step of the model. The plain version writes classifier,
bound and both stages by hand. Both start from the same weights and train alike.

    python examples/club_style.py
"""

import torch
from compare import Outcome, main
from torch import Tensor, nn
from torch.nn import functional

from engine import MI, Objective, TwoStageStep
from engine.config import ObjectiveConfig

STYLES, SAMPLES, BATCH, STEPS, WIDTH, HIDDEN, WEIGHT, UPDATES = 4, 2048, 256, 100, 8, 64, 0.5, 5


def make_data(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [samples, 20], labels [samples] and styles [samples, 1]."""
    mixing = torch.Generator().manual_seed(1)
    content = torch.randn(samples, 4, generator=generator)
    label = (content.sum(1) > 0).long()
    style = torch.randint(STYLES, (samples,), generator=generator)
    marks = torch.randn(STYLES, 20, generator=mixing)
    inputs = content @ torch.randn(4, 20, generator=mixing) + 2 * marks[style]
    return inputs + torch.randn(samples, 20, generator=generator), label, style[:, None].float()


class Content(nn.Module):
    """The encoding Z and the label's logits."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, style: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        return {"prediction": self.head(z), "Z": z, "S": style}


def make_objective(weight: float) -> Objective:
    return Objective(
        [-weight * MI("Z", "S", bound="club")], dims={"Z": WIDTH, "S": 1}, discrete={"S": STYLES},
        settings=ObjectiveConfig(hidden=HIDDEN),
    )  # fmt: skip


def with_engine(model: Content, batches: list[dict[str, Tensor]], weight: float) -> list[float]:
    objective = make_objective(weight)
    step = TwoStageStep(
        model,
        objective,
        functional.cross_entropy,
        torch.optim.Adam(model.parameters(), 1e-3),
        torch.optim.Adam(objective.parameters(), 3e-3),
        label=None,
    )
    return [step.train_batch(batch, stage1_n=UPDATES).loss.item() for batch in batches]


def club(logits: Tensor, style: Tensor) -> Tensor:
    """mean log q(s_i|z_i) - mean over i != j of log q(s_j|z_i), over all pairs [B, B]."""
    pairs = logits.log_softmax(1)[:, style]  # of z_i and s_j
    count = len(style)
    return pairs.diagonal().mean() - (pairs.sum() - pairs.diagonal().sum()) / (count * (count - 1))


def by_hand(model: Content, batches: list[dict[str, Tensor]], weight: float) -> list[float]:
    start = make_objective(weight).estimator_state()  # the same first weights as the engine's
    q = nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, STYLES),
    )  # fmt: skip
    q.load_state_dict({name.split("logits.")[1]: value for name, value in start.items()})
    optimizer, q_optimizer = torch.optim.Adam(model.parameters(), 1e-3), torch.optim.Adam(q.parameters(), 3e-3)
    losses = []
    for batch in batches:
        out, style = model(batch["x"], batch["style"]), batch["style"][:, 0].long()
        for _ in range(UPDATES):
            q_optimizer.zero_grad()
            functional.cross_entropy(q(out["Z"].detach()), style).backward()
            q_optimizer.step()
        q.requires_grad_(False)
        loss = functional.cross_entropy(out["prediction"], batch["y"]) + weight * club(q(out["Z"]), style)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        q.requires_grad_(True)
        losses.append(loss.item())
    return losses


def style_left(z: Tensor, style: Tensor) -> float:
    """Accuracy on the second half of the rows of a linear classifier that was fitted to the first half."""
    z, style = (z - z.mean(0)) / z.std(0), style[:, 0].long()
    half, classifier = len(z) // 2, nn.Linear(z.shape[1], STYLES)
    optimizer = torch.optim.Adam(classifier.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        functional.cross_entropy(classifier(z[:half]), style[:half]).backward()
        optimizer.step()
    return (classifier(z[half:]).argmax(1) == style[half:]).float().mean().item()


def train(side: str, steps: int = STEPS, weight: float = WEIGHT) -> Outcome:
    """Losses of all steps, and the style that is left in the encodings of 4,000 new samples."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    inputs, label, style = make_data(SAMPLES, generator)
    rows = [torch.randint(SAMPLES, (BATCH,), generator=generator) for _ in range(steps)]
    batches = [{"x": inputs[i], "style": style[i], "y": label[i]} for i in rows]
    model = Content()
    losses = {"engine": with_engine, "plain": by_hand}[side](model, batches, weight)
    inputs, label, style = make_data(4000, torch.Generator().manual_seed(7))
    with torch.no_grad():
        out = model(inputs, style)
    torch.manual_seed(1)
    return Outcome(losses, style_left(out["Z"], style))


if __name__ == "__main__":
    main(train, STEPS, "style left")
