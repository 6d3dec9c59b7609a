"""From rows to sample files: what one process does, whether it is the only one, a worker or an actor."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from vispec.ge_data.conversations import SkipRow
from vispec.ge_data.jobs import ImageJob, Settings, TextJob
from vispec.ge_data.run_folder import RunFolder
from vispec.ge_data.sample_file import write_sample
from vispec.model.loading import load_config, load_target
from vispec.model.target import Target
from vispec.prompts import load_processor, load_tokenizer


@dataclass
class Without:
    """Rows that have no sample, with the reasons."""

    skipped: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


class Maker:
    """Makes samples with a target that is loaded once.

    Args:
        args: of the command line.
        folder: where sample files go.
        images: the folder in which rows name images, where they do.
    """

    def __init__(self, args: argparse.Namespace, folder: RunFolder, images: Path | None):
        self._folder, self._job = folder, _load_job(args, images)

    def make(self, batch: Mapping[int, dict]) -> Without:
        """Make the missing samples of a batch of rows."""
        without = Without()
        for index, outcome in self._job.samples(batch, self._folder.missing(batch)):
            if isinstance(outcome, Exception):
                (without.skipped if isinstance(outcome, SkipRow) else without.failed)[index] = str(outcome)
            else:
                write_sample(self._folder.sample_path(index), outcome, {"index": index, **_origin(batch[index])})
        return without


def _load_job(args: argparse.Namespace, images: Path | None) -> TextJob | ImageJob:
    names = {field.name for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in vars(args).items() if name in names})
    limits = {name: getattr(settings, name) for name in ("min_pixels", "max_pixels") if getattr(settings, name)}
    if args.stage == "text":
        tokenizer = load_tokenizer(args.model)
        if args.store == "tokens":
            return TextJob(load_config(args.model), tokenizer, settings, target=None)
    else:
        processor = load_processor(args.model, **limits)
    device_map = None
    if torch.cuda.is_available():
        device_map = "auto" if args.gpus_per_model > 1 else "cuda"
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    target = Target(load_target(args.model, dtype, device_map))
    if args.stage == "text":
        return TextJob(target.config, tokenizer, settings, target)
    return ImageJob(target, processor, images, settings)


def _origin(row: dict) -> dict:
    return {key: row[key] for key in ("id", "image") if isinstance(row.get(key), str | int)}
