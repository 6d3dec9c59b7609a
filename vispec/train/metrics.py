"""Numbers of an epoch: summed over batches and processes, then written for people and programs."""

import json
import math
from pathlib import Path

import torch

from vispec.train.losses import PARTS

DEPTH = 5
"""Longest draft whose tokens are checked in a row."""


class Sums:
    """Running sums of losses and hits."""

    def __init__(self, values: list[float] | None = None):
        # pairs, pair steps, samples, then the parts, then drafts right and drafts for each length
        self.values = torch.tensor(values) if values else torch.zeros(3 + len(PARTS) + 2 * DEPTH, dtype=torch.float64)
        self.values = self.values.double()

    def add(self, parts: torch.Tensor, pairs: int, steps: int, samples: int) -> None:
        self.values[:3] += torch.tensor([pairs, pairs * steps, samples])
        self.values[3 : 3 + len(PARTS)] += parts.double().cpu()

    def add_drafts(self, right: torch.Tensor, drafts: torch.Tensor) -> None:
        self.values[3 + len(PARTS) :] += torch.cat([right, drafts]).double().cpu()

    @property
    def loss(self) -> float:
        return float(self.values[3] / self.values[1].clamp(min=1))

    def summary(self) -> dict:
        """Means over pairs (hits: those of the first step of the chain), shares of drafts right in a row."""
        pairs, pair_steps, samples, *rest = self.values.tolist()
        means = {
            name: rest[i] / max(pairs if name.startswith("top") else pair_steps, 1) for i, name in enumerate(PARTS)
        }
        summary = {"samples": int(samples), "pairs": int(pairs), **means}
        right, drafts = rest[len(PARTS) : len(PARTS) + DEPTH], rest[len(PARTS) + DEPTH :]
        if any(drafts):
            shares = [r / d if d else 0.0 for r, d in zip(right, drafts, strict=True)]
            summary |= {f"first{m}": share for m, share in enumerate(shares, 1)}
            summary["tau_of_chain"] = sum(shares)  # mean accepted tokens of one draft of DEPTH tokens
        return {name: value if isinstance(value, int) else round(value, 6) for name, value in summary.items()}


class MetricsLog:
    """metrics.jsonl, one line an epoch, and TensorBoard where it is asked for."""

    def __init__(self, folder: Path, report_to: str):
        self.path = folder / "metrics.jsonl"
        self.writer = None
        if report_to == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--report-to tensorboard: the package tensorboard is not installed") from None
            self.writer = SummaryWriter(str(folder / "tensorboard"))

    def forget_after(self, epoch: int) -> None:
        """Drop the lines of epochs that a resumed run makes again."""
        if self.path.is_file():
            lines = [line for line in self.path.read_text().splitlines() if json.loads(line)["epoch"] <= epoch]
            self.path.write_text("".join(line + "\n" for line in lines))

    def step(self, step: int, values: dict) -> None:
        self._scalars("train_step", step, values)

    def epoch(self, epoch: int, line: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, **line}) + "\n")
        for name in ("train", "held_out"):
            self._scalars(name, epoch, line.get(name) or {})

    def _scalars(self, group: str, step: int, values: dict) -> None:
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self.writer.add_scalar(f"{group}/{name}", value, step)
            self.writer.flush()
