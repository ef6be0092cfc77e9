"""SimCLR on generated images: `engine.kernels.infonce` in place of the NT-Xent loss.

Two disturbed views of every image are pulled together and pushed away from all others. The usual loss forms all
[2B, 2B] similarities; `infonce` never does, and the training is the same. Run it with the name of either:

    python examples/simclr.py infonce
    python examples/simclr.py eager
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.kernels import infonce

IMAGES, BATCH, STEPS, TEMPERATURE = 512, 64, 60, 0.2


def make_images(generator: torch.Generator) -> Tensor:
    """[IMAGES, 1, 16, 16]: each a blob of its own place, size and brightness."""
    place = 4 + 8 * torch.rand(IMAGES, 2, 1, 1, generator=generator)
    size = 1 + 2 * torch.rand(IMAGES, 1, 1, generator=generator)
    bright = 0.5 + torch.rand(IMAGES, 1, 1, generator=generator)
    line = torch.arange(16.0)
    distance = (line[:, None] - place[:, 0]) ** 2 + (line[None, :] - place[:, 1]) ** 2
    return (bright * torch.exp(-distance / (2 * size**2)))[:, None]


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored or not, shifted by a pixel or not, noisy."""
    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(3)
    images = images.roll(int(torch.randint(-1, 2, (), generator=generator)), 2)
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def nt_xent(z: Tensor, positives: Tensor) -> Tensor:
    """The loss as it is usually written: z [2B, d], positives[i] the other view of i."""
    z = functional.normalize(z, dim=1)
    similarity = z @ z.t() / TEMPERATURE
    similarity.fill_diagonal_(-torch.inf)
    return functional.cross_entropy(similarity, positives)


def streaming(z: Tensor, positives: Tensor) -> Tensor:
    """The same without the similarities."""
    return infonce(z, z, temperature=TEMPERATURE, cosine=True, positives=positives, exclude_self=True)


def train(loss_of, steps: int = STEPS) -> list[float]:
    """Losses in nats, a step each."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = make_images(generator)
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 32),
    )  # fmt: skip
    optimizer = torch.optim.Adam(encoder.parameters(), 1e-3)
    positives = (torch.arange(2 * BATCH) + BATCH) % (2 * BATCH)
    losses = []
    for _ in range(steps):
        batch = images[torch.randint(IMAGES, (BATCH,), generator=generator)]
        z = encoder(torch.cat([view(batch, generator), view(batch, generator)]))
        loss = loss_of(z, positives)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "infonce"
    losses = train({"infonce": streaming, "eager": nt_xent}[name])
    for step in range(0, STEPS, 10):
        print(f"step {step:3}  loss {losses[step]:.4f} nats")
    print(f"step {STEPS - 1:3}  loss {losses[-1]:.4f} nats")


if __name__ == "__main__":
    main()
