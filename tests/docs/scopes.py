"""What the blocks of a page find when they are run: files in the folder, and names that the text speaks of."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from engine import CMI, MI, MIEstimator, Objective, TwoStageStep
from engine.config import ObjectiveConfig
from engine.loaders.make_data import make_data
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer


def of_page(page: str, folder: Path) -> dict[str, Any]:
    """Write the files that the page's blocks name into `folder`, and return the names that they use."""
    make = {
        "README.md": _mosi,
        "config.md": _mosi,
        "data.md": _declarelab,
        "loaders.md": _dataset,
        "measuring_information.md": _arrays,
        "moving_from_mmsa.md": _mmsa,
        "objective.md": _two_views,
        "sweeps.md": _space,
    }.get(page)
    return make(folder) if make else {}


def _mosi(folder: Path) -> dict[str, Any]:
    make_data(folder / "data/mosi", "mosi", 40, "declarelab", 0)
    return {}


def _space(folder: Path) -> dict[str, Any]:
    """The page's own space.yaml, which stands there after the command that reads it."""
    page = (Path(__file__).resolve().parents[2] / "docs/sweeps.md").read_text(encoding="utf-8")
    (folder / "space.yaml").write_text(page.partition("with this `space.yaml`:\n\n```\n")[2].partition("```")[0])
    return {}


def _mmsa(folder: Path) -> dict[str, Any]:
    make_data(folder / "made", "mosi", 40, "mmsa", 0)
    (made,) = (folder / "made").glob("*.pkl")
    made.rename(folder / "unaligned_50.pkl")
    return {}


def _declarelab(folder: Path) -> dict[str, Any]:
    writers.write_declarelab(folder, writers.samples())
    return {}


def _dataset(folder: Path) -> dict[str, Any]:
    from engine.config import DataConfig
    from engine.loaders import open_dataset

    path = writers.dump(writers.mmsa(writers.samples()), folder / "x.pkl")
    return {"dataset": open_dataset(path, DataConfig(), str(small_tokenizer(folder / "encoder")))}


def _arrays(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    return {"x": x, "y": x + rng.normal(size=(400, 2))}


class _TwoViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(4, 8) for _ in range(2))
        self.head = nn.Linear(16, 1)

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        z1, z2 = (encoder(part) for encoder, part in zip(self.encoders, views.chunk(2, 1), strict=True))
        return self.head(torch.cat([z1, z2], 1)), {"Z1": z1, "Z2": z2, "M": views[:, :1].sign()}


def _two_views(folder: Path) -> dict[str, Any]:
    """A model of two views, its objective as on the page, a loader, and a bank of features."""
    torch.manual_seed(0)
    rows, batch = 96, 32
    views, generator = torch.randn(rows, 8), torch.Generator().manual_seed(0)
    label = (views.sum(1, keepdim=True) > 0).float()
    model = _TwoViews()
    machine = -1.0 * (CMI("Z1", "M", given="Y") + CMI("Z2", "M", given="Y"))
    objective = Objective(
        [0.1 * MI("Z1", "Z2"), machine], dims={"Z1": 8, "Z2": 8, "M": 1, "Y": 1}, discrete=("Y",),
        settings=ObjectiveConfig(hidden=16, embed=8, compat="none"),
    )  # fmt: skip
    optimizers = torch.optim.Adam(model.parameters(), 1e-3), torch.optim.Adam(objective.parameters(), 1e-3)
    loader = DataLoader(TensorDataset(views, label, torch.arange(rows)), batch)
    step = TwoStageStep(model, objective, nn.functional.mse_loss, *optimizers, label="Y")
    _, bank = step.train_epoch(loader, rows, None, batch_size=batch)
    return {
        "torch": torch, "model": model, "task_loss": nn.functional.mse_loss, "main_optimizer": optimizers[0],
        "estimator_optimizer": optimizers[1], "loader": loader, "n_train": rows, "bank": bank, "step": step,
        "generator": generator, "number": 0, "module": MIEstimator(8, 8), "tower": nn.Linear(8, 128),
        "TwoStageStep": TwoStageStep, "z": torch.randn(60, 8), "s": torch.randn(60, 2),
    }  # fmt: skip
