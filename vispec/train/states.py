"""The checkpoints state_<epoch>: each folder appears whole or not at all; only the newest stay where that is asked."""

import os
import re
import shutil
from pathlib import Path

from vispec.model.drafts import BaseHead
from vispec.model.drafts.checkpoints import save_draft

STATE = re.compile(r"state_(\d+)")


def write_state(head: BaseHead, folder: Path, epoch: int) -> None:
    """Write `folder`/state_<epoch>; one that is there already, of a run killed before it could note it, is replaced."""
    final = folder / f"state_{epoch}"
    unfinished = folder / f".{final.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_draft(head, unfinished)
    _sync(unfinished)
    _remove(final)
    unfinished.rename(final)
    _sync(folder)


def prune_states(folder: Path, keep: int, epoch: int) -> None:
    """Remove all but the newest `keep` checkpoints of epochs up to `epoch`; 0 keeps all."""
    found = sorted(int(match[1]) for path in folder.iterdir() if (match := STATE.fullmatch(path.name)))
    done = [number for number in found if number <= epoch]
    for number in done[:-keep] if keep else []:
        _remove(folder / f"state_{number}")


def remove_leftovers(folder: Path, files: tuple[str, ...]) -> None:
    """Remove what a killed run has left half-written: checkpoints, and temporary files beside `files`."""
    for path in folder.glob(".state_*"):
        shutil.rmtree(path)
    for name in files:
        for path in folder.glob(f".{name}.*"):
            path.unlink()


def _remove(path: Path) -> None:
    """Under another name first, so that a kill on the way leaves no half of a checkpoint."""
    if path.exists():
        removed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)
        shutil.rmtree(removed)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
