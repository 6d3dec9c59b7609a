"""What a training folder holds: checkpoints, and the state from which a run goes on.

Checkpoints are folders state_<epoch>: each appears whole or not at all; only the newest stay where that is asked.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from vispec.cli import changes
from vispec.files import UNFINISHED, read_json, remove_unfinished
from vispec.model.drafts import BaseHead
from vispec.model.drafts.checkpoints import save_draft
from vispec.model.drafts.vocabulary import DraftVocabulary
from vispec.train.metrics import METRICS_FILE, Sums
from vispec.train.recipe import Recipe

STATE = re.compile(r"state_(\d+)")
REMOVED = ".removed"

RESUME_FILE, START_FILE = "resume.pt", "training.json"
RESUME_FORMAT = 4
RESUME_KINDS = {
    "identity": dict,
    "epoch": int,
    "step_in_epoch": int,
    "sums": list,
    "seconds": float,
    "head": dict,
    "draft_vocab": dict | None,
    "moments": dict,
}


def read_resume(folder: Path) -> dict | None:
    """The state that a run has left in a folder to go on from; None where there is none.

    Raises:
        ValueError: the file is damaged, or of another version; or there is none beside files of others with the names
            of ours; the message names them.
    """
    path = folder / RESUME_FILE
    if not path.is_file():
        _refuse_unknown(folder)
        return None
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file leads to many of them
            kind = type(error).__name__
            raise ValueError(f"{path}: cut off, or no state of a training ({kind}); choose another --cpdir") from None
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is not int or found != RESUME_FORMAT:
        raise ValueError(f"{path}: format {found!r:.60}, expected {RESUME_FORMAT}; choose another --cpdir")
    for name, kind in RESUME_KINDS.items():
        if name not in state or not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise ValueError(f"{path}: {name} is {type(state.get(name)).__name__}, expected {_name(kind)}")
    if not all(isinstance(tensor, torch.Tensor) for tensor in state["head"].values()):
        raise ValueError(f"{path}: head holds something else than tensors")
    vocabulary = state["draft_vocab"]
    if vocabulary is not None and vocabulary.keys() != {one.name for one in fields(DraftVocabulary)}:
        raise ValueError(f"{path}: draft_vocab is no draft vocabulary")
    try:
        json.dumps(state["identity"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: identity holds more than plain values ({error})") from None
    if not isinstance(state["identity"].get("config", {}), dict):
        raise ValueError(f"{path}: the draft head's config is none")
    for name in ("epoch", "step_in_epoch", "seconds"):
        if not 0 <= state[name] < math.inf:
            raise ValueError(f"{path}: {name} is {state[name]}, expected a number from 0 on")
    sums = state["sums"]
    if len(sums) != len(Sums().values) or not all(isinstance(one, float) and math.isfinite(one) for one in sums):
        raise ValueError(f"{path}: sums are not {len(Sums().values)} finite numbers")
    return state


def refuse_others(folder: Path, found: Mapping, asked: Mapping) -> None:
    """Go on with a run of the same arguments only."""
    if differences := changes(found, asked):
        raise ValueError(f"--cpdir {folder} holds a run of other arguments ({differences}); choose another folder")


def check_weights(path: Path, found: Mapping, expected: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights of `path` that are not finite, or not those of a head's state_dict in name or shape."""
    if odd := found.keys() ^ expected.keys():
        raise ValueError(f"{path}: missing or unexpected weights {', '.join(sorted(map(str, odd)))}")
    for name, tensor in expected.items():
        _check(path, name, found[name], tensor)


def check_moments(path: Path, found: Mapping, parameters: Sequence[torch.Tensor], begun: bool) -> None:
    """Refuse moments of AdamW that are not finite, or not those of `parameters`; there are none before one step."""
    if (found or begun) and found.keys() != set(range(len(parameters))):
        raise ValueError(f"{path}: moments of {len(found)} parameters, expected {len(parameters)}")
    for index, one in found.items():
        if not isinstance(one, dict) or one.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"{path}: the moments of parameter {index} are not those of AdamW")
        for name, tensor in one.items():
            _check(path, f"{name} {index}", tensor, torch.zeros(()) if name == "step" else parameters[index])


def _check(path: Path, name: str, found: object, expected: torch.Tensor) -> None:
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{path}: {name} is {type(found).__name__}, expected a tensor")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        there, asked = ((tuple(tensor.shape), str(tensor.dtype)) for tensor in (found, expected))
        raise ValueError(f"{path}: {name} is {' '.join(map(str, there))}, expected {' '.join(map(str, asked))}")
    if not found.isfinite().all():
        raise ValueError(f"{path}: {name} is not finite")


def _name(kind) -> str:
    return getattr(kind, "__name__", str(kind))


def write_state(head: BaseHead, folder: Path, epoch: int, recipe: Recipe) -> None:
    """Write `folder`/state_<epoch>; one that is there already, of a run killed before it could note it, is replaced."""
    final = folder / f"state_{epoch}"
    unfinished = folder / f".{final.name}{UNFINISHED}"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_draft(head, unfinished, getattr(torch, recipe.save_dtype), recipe.save_embedding)
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


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run has left half-written or half-removed."""
    halves = re.compile(rf"\.{STATE.pattern}({re.escape(UNFINISHED)}|{re.escape(REMOVED)})")
    for path in folder.iterdir():
        if halves.fullmatch(path.name):
            shutil.rmtree(path)
    remove_unfinished(folder, "|".join(map(re.escape, (RESUME_FILE, METRICS_FILE, START_FILE))))


def _refuse_unknown(folder: Path) -> None:
    """A run that was killed before its first state has left its start alone; more was made by others."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = {name for name in found if STATE.fullmatch(name)} | found & {METRICS_FILE}
    if START_FILE in found and not _is_start(folder / START_FILE):
        others.add(START_FILE)
    if others:
        raise ValueError(
            f"--cpdir {folder} holds {', '.join(sorted(others))}, but no {RESUME_FILE} to go on from; choose another "
            "folder"
        )


def _is_start(path: Path) -> bool:
    try:
        return read_json(path).keys() >= {"command", "arguments", "versions"}
    except ValueError:
        return False


def _remove(path: Path) -> None:
    """Under another name first, so that a kill on the way leaves no half of a checkpoint."""
    if path.exists():
        removed = path.with_name(f".{path.name}{REMOVED}")
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)
        shutil.rmtree(removed)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
