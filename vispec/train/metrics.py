"""Numbers of an epoch: summed over batches and processes, then written for people and programs."""

import math
import os
from pathlib import Path

import torch

from vispec.files import json_bytes, naming, parse_json, write_bytes_atomic
from vispec.train.losses import PARTS

DEPTH = 5
"""Longest draft whose tokens are checked in a row."""

METRICS_FILE = "metrics.jsonl"


class Sums:
    """Running sums of losses, hits and gradient norms."""

    def __init__(self, values: list[float] | None = None):
        # pairs, pair steps, samples, then the parts, then drafts right and drafts for each length, then gradient norms
        # and how many of them
        size = 3 + len(PARTS) + 2 * DEPTH + 2
        self.values = torch.tensor(values or [0.0] * size, dtype=torch.float64)

    def add(self, parts: torch.Tensor, pairs: int, steps: int, samples: int) -> None:
        self.values[:3] += torch.tensor([pairs, pairs * steps, samples])
        self.values[3 : 3 + len(PARTS)] += parts.double().cpu()

    def add_drafts(self, right: torch.Tensor, drafts: torch.Tensor) -> None:
        self.values[3 + len(PARTS) : -2] += torch.cat([right, drafts]).double().cpu()

    def add_gradient_norm(self, norm: float) -> None:
        self.values[-2:] += torch.tensor([norm, 1.0])

    @property
    def pairs(self) -> int:
        return int(self.values[0])

    @property
    def loss(self) -> float:
        return float(self.values[3] / self.values[1].clamp(min=1))

    def summary(self) -> dict:
        """Means over pairs (hits: of the chain's first step), shares of drafts right in a row, mean gradient norm."""
        pairs, pair_steps, samples, *rest, norms, steps = self.values.tolist()
        means = {
            name: rest[i] / max(pairs if name.startswith("top") else pair_steps, 1) for i, name in enumerate(PARTS)
        }
        summary = {"samples": int(samples), "pairs": int(pairs), **means}
        right, drafts = rest[len(PARTS) : len(PARTS) + DEPTH], rest[len(PARTS) + DEPTH :]
        if any(drafts):
            shares = [r / d if d else 0.0 for r, d in zip(right, drafts, strict=True)]
            summary |= {f"first{m}": share for m, share in enumerate(shares, 1)}
            summary["tau_of_chain"] = sum(shares)  # mean accepted tokens of one draft of DEPTH tokens
        if steps:
            summary["gradient_norm"] = norms / steps
        return {name: value if isinstance(value, int) else round(value, 6) for name, value in summary.items()}


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a training's epochs; none where it has not begun.

    Raises:
        ValueError: the file holds something else.
    """
    path = folder / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    # one without its end was being written when the run was killed
    found = [parse_json(line, str(path)) for line in lines if line.endswith(b"\n")]
    for one in found:
        if not isinstance(one, dict) or type(one.get("epoch")) is not int:
            raise ValueError(f"{path}: {one!r:.60} is no line of an epoch's metrics")
    return found


def _line(values: dict) -> bytes:
    return json_bytes(values) + b"\n"


class MetricsLog:
    """metrics.jsonl, one line an epoch, and TensorBoard where it is asked for, whose scalars lie at steps done.

    What a run that is resumed after `epochs` epochs and `steps` steps makes again is dropped from both.
    """

    def __init__(self, folder: Path, report_to: str, epochs: int, steps: int):
        self.path = folder / METRICS_FILE
        self.writer = None
        if report_to == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--report-to tensorboard: the package tensorboard is not installed") from None
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1)
        if self.path.is_file():
            kept = [_line(one) for one in read_metrics(folder) if one["epoch"] <= epochs]
            write_bytes_atomic(self.path, b"".join(kept))

    def step(self, step: int, values: dict) -> None:
        self._scalars("train_step", step, values)

    def epoch(self, epoch: int, line: dict) -> None:
        with naming(self.path), open(self.path, "ab") as file:
            file.write(_line({"epoch": epoch, **line}))
            file.flush()
            os.fsync(file.fileno())
        self._scalars("train", line["step"], line["train"] | {"lr": line["lr"]})
        self._scalars("held_out", line["step"], line["held_out"] or {})

    def _scalars(self, group: str, step: int, values: dict) -> None:
        if self.writer is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self.writer.add_scalar(f"{group}/{name}", value, step)
            self.writer.flush()
