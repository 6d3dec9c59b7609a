"""Where the rows come from: the published data sets, or local files in their layouts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vispec.files import parse_json, read_json

SHUFFLE_SEED = 42
SHAREGPT = "Aeala/ShareGPT_Vicuna_unfiltered"
LLAVA_PRETRAIN_FILE = "blip_laion_cc_sbu_558k.json"
LLAVA_PRETRAIN_FOLDER = "LLaVA-Pretrain"


@dataclass
class Rows:
    """Rows in shuffled order: `rows[i]` is the i-th of `shuffle(seed=42)`."""

    data: Sequence[dict]
    order: np.ndarray
    folder: Path | None = None
    """Where images are, relative to which the rows name them."""

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        return self.data[int(self.order[index])]

    def at(self, indices: Iterable[int]) -> dict[int, dict]:
        return {index: self[index] for index in indices}


def shuffled(data: Sequence[dict], folder: Path | None = None) -> Rows:
    """The order of `datasets`' shuffle(seed=42), without the library."""
    return Rows(data, np.random.default_rng(SHUFFLE_SEED).permutation(len(data)), folder)


def load_text(data_folder: str | None) -> Rows:
    """ShareGPT conversations, from the hub or from the .json and .jsonl files of a folder (or one such file)."""
    if data_folder is None:
        from datasets import load_dataset

        return shuffled(load_dataset(SHAREGPT, split="train"))
    path = Path(data_folder)
    files = [path] if path.is_file() else sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
    files = [file for file in files if file.name != LLAVA_PRETRAIN_FILE]
    if not files:
        raise ValueError(f"--data-folder {data_folder}: no .json or .jsonl file with conversations there")
    return shuffled([row for file in files for row in _read_rows(file)])


def load_image(data_folder: str | None) -> Rows:
    """LLaVA-Pretrain's rows; their images are relative to the folder."""
    folder = Path(data_folder or LLAVA_PRETRAIN_FOLDER)
    file = folder / LLAVA_PRETRAIN_FILE
    if not file.is_file():
        hint = "" if data_folder else "; --data-folder says where LLaVA-Pretrain is"
        raise ValueError(f"{file}: no such file{hint}")
    return shuffled(_read_rows(file), folder)


def _read_rows(file: Path) -> list[dict]:
    """A JSON list of objects, or one object a line; a row that is none is skipped where it is used."""
    if file.suffix != ".jsonl":
        return read_json(file, list)
    with open(file, "rb") as lines:
        return [parse_json(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
