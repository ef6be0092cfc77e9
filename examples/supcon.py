"""Supervised contrastive learning (Khosla et al., NeurIPS 2020) of generated images of ten classes.

Every view is pulled to all other views of its class and pushed away from all others (L_out of the paper). The engine's
version is one call of `infonce` with `labels`, which never holds the [2B, 2B] similarities. The plain version is the
loss as it is usually written. Both start from the same weights and train alike.

    python examples/supcon.py
"""

import torch
from compare import Outcome, main
from torch import Tensor, nn
from torch.nn import functional

from engine.kernels import infonce

CLASSES, IMAGES, BATCH, STEPS, TEMPERATURE = 10, 2048, 768, 30, 0.1


def make_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [count, 64] and classes [count]: a pattern per class, mixed with another pattern, in noise."""
    patterns = torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    others = torch.randint(CLASSES, (count,), generator=generator)
    strength = 0.6 + 0.8 * torch.rand(count, 1, generator=generator)
    return strength * patterns[labels] + 0.5 * patterns[others], labels


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels are dropped and disturbed."""
    kept = torch.rand(images.shape, generator=generator) < 0.7
    return images * kept + 0.7 * torch.randn(images.shape, generator=generator)


def supcon(z: Tensor, labels: Tensor) -> Tensor:
    """L_out as it is usually written: z [n, d], labels [n]."""
    z = functional.normalize(z, dim=1)
    scores = z @ z.t() / TEMPERATURE
    scores = scores.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    same = (labels[:, None] == labels[None, :]).fill_diagonal_(False)
    log_share = scores - scores.logsumexp(1, keepdim=True)
    return -(log_share.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def streaming(z: Tensor, labels: Tensor) -> Tensor:
    """The same without the similarities."""
    return infonce(z, z, temperature=TEMPERATURE, cosine=True, labels=labels, exclude_self=True)


def train(side: str, steps: int = STEPS) -> Outcome:
    """Losses of all steps, and the share of 2,000 new images whose class has the nearest mean."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, labels = make_images(IMAGES, generator)
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.Adam(encoder.parameters(), 2e-3)
    loss_of = {"engine": streaming, "plain": supcon}[side]
    losses = []
    for _ in range(steps):
        rows = torch.randint(IMAGES, (BATCH,), generator=generator)
        views = torch.cat([view(images[rows], generator), view(images[rows], generator)])
        loss = loss_of(encoder(views), labels[rows].repeat(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    new, classes = make_images(2000, generator)
    with torch.no_grad():
        z, new_z = (functional.normalize(encoder(x), dim=1) for x in (images, new))
    means = torch.stack([z[labels == c].mean(0) for c in range(CLASSES)])
    return Outcome(losses, ((new_z @ means.t()).argmax(1) == classes).float().mean().item())


if __name__ == "__main__":
    main(train, STEPS, "accuracy")
