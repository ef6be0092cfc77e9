"""Contrast of images and texts, after CLIP (Radford et al., ICML 2021), on several processes, on generated data.

Each process holds its share of the batch and takes the other processes' embeddings as negatives. The engine's version
is two processes with `infonce(..., gather=True)` under DistributedDataParallel. The plain version is one process on the
whole batch, with the loss as it is usually written. Both start from the same weights and train alike: gathered
negatives give the gradients of the whole batch.

    python examples/clip_style.py
"""

import time

import torch
from compare import Outcome, PeakMemory, main
from torch import Tensor, distributed, nn
from torch.nn import functional

from engine.kernels import infonce

RANKS, BATCH, STEPS, PAIRS, WIDTH = 2, 1024, 30, 4096, 64


def make_data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [count, 48] and texts [count, 32]: two views of 12 factors, each with disturbances of its own."""
    mixing = torch.Generator().manual_seed(1)
    shared = torch.randn(count, 12, generator=generator)
    views = []
    for width in (48, 32):
        private = torch.randn(count, 6, generator=generator)
        views.append(torch.cat([shared, private], 1) @ torch.randn(18, width, generator=mixing))
    return views[0], views[1]


class Towers(nn.Module):
    """Embeddings of images and of texts, [B, WIDTH] each, and the learned temperature."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(48, 128), nn.ReLU(), nn.Linear(128, WIDTH))
        self.text = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, WIDTH))
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(image), self.text(text), self.log_temperature.exp()


def plain(image: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
    """The loss as it is usually written, with all scores [B, B]."""
    scores = functional.normalize(image, dim=1) @ functional.normalize(text, dim=1).t() / temperature
    rows = torch.arange(len(scores))
    return (functional.cross_entropy(scores, rows) + functional.cross_entropy(scores.t(), rows)) / 2


def gathered(image: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
    """The same on this process's share of the batch."""
    return infonce(image, text, temperature=temperature, cosine=True, symmetric=True, gather=True)


def train_share(rank: int, ranks: int, steps: int, loss_of) -> Outcome:
    """Train on every batch's rows of one rank. With one rank that is the whole batch."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, texts = make_data(PAIRS, generator)
    towers = Towers()
    model = towers if ranks == 1 else nn.parallel.DistributedDataParallel(towers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(steps):
        rows = torch.randint(PAIRS, (BATCH,), generator=generator).chunk(ranks)[rank]
        loss = loss_of(*model(images[rows], texts[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    new_images, new_texts = make_data(500, torch.Generator().manual_seed(7))
    with torch.no_grad():
        image, text, _ = towers(new_images, new_texts)
        scores = functional.normalize(image, dim=1) @ functional.normalize(text, dim=1).t()
    return Outcome(losses, (scores.argmax(1) == torch.arange(500)).float().mean().item())


def run_rank(rank: int, steps: int, port: int, results) -> None:
    """One process of the engine's version."""
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        train_share(rank, RANKS, 2, gathered)  # loads libraries
        distributed.barrier()
        with PeakMemory() as memory:
            start = time.process_time()
            outcome = train_share(rank, RANKS, steps, gathered)
            seconds = time.process_time() - start
        if rank == 0:
            results.put((outcome.losses, outcome.score, seconds, memory.mib))
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def train(side: str, steps: int = STEPS) -> Outcome:
    """Losses of all steps, and how often the right one of 500 new texts is nearest to an image.

    Time and memory of two processes are those of rank 0.
    """
    if side == "plain":
        return train_share(0, 1, steps, plain)
    # on a port that is free; the processes meet there
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(run_rank, (steps, store.port, results), nprocs=RANKS)
    return Outcome(*results.get())


if __name__ == "__main__":
    main(train, STEPS, "found of 500")
