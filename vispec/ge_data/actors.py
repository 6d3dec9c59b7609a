"""Samples by Ray actors on the machines of a cluster, which share the batches and write into one folder."""

import argparse
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from vispec.cli import changes
from vispec.ge_data.maker import Maker, Without
from vispec.ge_data.run_folder import RunFolder
from vispec.ge_data.sources import Rows
from vispec.ge_data.target_identity import identify_target
from vispec.ray_pool import MOST_DEATHS, Pool


class Actor(Maker):
    """A `Maker` on a machine that has to have the folders of the command's own.

    Args:
        mark: a file in the output folder of which only the command knows.
        threads: the command's; sums over others round differently.
    """

    def __init__(self, args: argparse.Namespace, folder: RunFolder, images: Path | None, mark: Path, threads: int):
        here = socket.gethostname()
        if not mark.is_file():
            raise ValueError(f"--outdir {folder.path}: expected a shared file system, {here} has another folder there")
        if images is not None and not images.is_dir():
            raise ValueError(f"{images}: no such folder on {here}")
        torch.set_num_threads(threads)
        super().__init__(args, folder, images)
        self._settings = {"target": identify_target(args.model, args.dtype)}

    def loaded_settings(self) -> dict[str, dict]:
        return self._settings


def make_by_actors(
    args: argparse.Namespace, folder: RunFolder, rows: Rows, batches: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], Without]]:
    """Make the missing samples of batches, in the order in which actors are done with them.

    Only the rows of a batch travel, and the images that they name are read where the actor is.
    """
    with folder.marked() as mark:
        arguments = [args, folder, rows.folder, mark, torch.get_num_threads()]
        with closing(Pool(Actor, arguments, args.ray or None, args.gpus_per_model, "--ray")) as pool:
            found = pool.settings["target"]
            if differences := changes(folder.manifest.get("target", found), found):
                raise ValueError(f"--model {args.model}: the actors' machines have another target ({differences})")
            for batch, without in pool.results(batches, lambda actor, batch: actor.make.remote(rows.at(batch))):
                if without is None:
                    reason = f"{MOST_DEATHS} actors died while they made its batch"
                    without = Without(failed=dict.fromkeys(folder.missing(batch), reason))
                yield batch, without
    folder.remove_unfinished()
