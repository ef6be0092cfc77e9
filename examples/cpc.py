"""Contrastive predictive coding of a generated signal, with a queue of negatives and a temperature that is learned.

From the past of a signal the context must tell the encoding of its future apart from the futures of other signals:
those of the batch, and those of earlier batches, kept in a queue. log(candidates) - loss is a lower bound on the
information between past and future. Run it with the name of either loss:

    python examples/cpc.py infonce
    python examples/cpc.py eager
"""

import math
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.kernels import infonce

BATCH, PAST, FUTURE, QUEUE, STEPS = 64, 16, 4, 256, 80


def signals(generator: torch.Generator) -> Tensor:
    """[BATCH, PAST + FUTURE]: oscillations of unknown frequency and phase in noise."""
    frequency = 0.2 + 0.8 * torch.rand(BATCH, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(BATCH, 1, generator=generator)
    time = torch.arange(float(PAST + FUTURE))
    return torch.sin(frequency * time + phase) + 0.1 * torch.randn(BATCH, PAST + FUTURE, generator=generator)


class Coder(nn.Module):
    """Predictions from the past and encodings of the future, [B, 32] each."""

    def __init__(self):
        super().__init__()
        self.context = nn.GRU(1, 48, batch_first=True)
        self.predict = nn.Linear(48, 32)
        self.encode = nn.Sequential(nn.Linear(FUTURE, 48), nn.ReLU(), nn.Linear(48, 32))
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        _, state = self.context(signal[:, :PAST, None])
        return self.predict(state[0]), self.encode(signal[:, PAST:])


def eager(q: Tensor, k: Tensor, queue: Tensor, temperature: Tensor) -> Tensor:
    """The loss as it is usually written, with all scores [B, B + queue]."""
    scores = functional.normalize(q, dim=1) @ functional.normalize(torch.cat([k, queue]), dim=1).t()
    return functional.cross_entropy(scores / temperature, torch.arange(len(q)))


def streaming(q: Tensor, k: Tensor, queue: Tensor, temperature: Tensor) -> Tensor:
    """The same without the scores."""
    return infonce(q, k, temperature=temperature, cosine=True, negatives=queue)


def train(loss_of, steps: int = STEPS) -> tuple[list[float], float]:
    """Losses in nats, a step each, and the temperature learned."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    coder = Coder()
    optimizer = torch.optim.Adam(coder.parameters(), 3e-3)
    queue = torch.randn(QUEUE, 32, generator=generator)
    losses = []
    for _ in range(steps):
        q, k = coder(signals(generator))
        loss = loss_of(q, k, queue, coder.log_temperature.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = torch.cat([k.detach(), queue])[:QUEUE]
        losses.append(loss.item())
    return losses, coder.log_temperature.exp().item()


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "infonce"
    losses, temperature = train({"infonce": streaming, "eager": eager}[name])
    for step in (*range(0, STEPS, 10), STEPS - 1):
        bound = math.log(BATCH + QUEUE) - losses[step]
        print(f"step {step:3}  loss {losses[step]:.4f}  information of past and future >= {bound:.4f} nats")
    print(f"temperature {temperature:.4f}")


if __name__ == "__main__":
    main()
