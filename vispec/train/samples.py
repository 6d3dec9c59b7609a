"""Sample files as batches of pairs: reading, noise, padding, and the order of an epoch.

Shapes: B samples, L tokens of the longest, H hidden size, F numbers of an input feature, S scored pairs, N image rows.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing.queues import Queue
from pathlib import Path
from traceback import clear_frames

import torch
from torch.utils.data import DataLoader

from vispec.cli import one_line
from vispec.ge_data.sample_file import SUFFIX, Sample, read_length, read_sample, read_tokens
from vispec.model.pairs import Span

HELD_OUT = 0.05
HELD_OUT_SEED = b"seed 0"
"""Of the digests that choose: another one holds out other samples."""
NOISE_LENGTH = 512
MOST_SECONDS = 600
"""That a batch may take to read."""
SIGNS_OF_WORKERS = ("DataLoader worker (pid", "DataLoader timed out", "shared memory", "No space left on device")
WINDOW = 16
"""Optimizer steps whose samples are sorted by length together, so that a batch has little padding."""


@dataclass
class Batch:
    """Padded samples."""

    ids: torch.Tensor
    """(B, L)."""
    hidden: torch.Tensor
    """(B, L, F) input features, with noise in training; zeros where none are stored."""
    image_rows: torch.Tensor
    """(N, H) embeddings of the image rows of all samples."""
    image_index: torch.Tensor
    """(N,) their places in the flattened (B * L) rows."""
    scored: torch.Tensor
    """(S,) places of the scored pairs in the flattened (B * L) rows."""
    targets: torch.Tensor
    """(S, H) the target's feature of the token after each scored pair."""
    images: list[list[Span]]
    lengths: list[int]
    names: list[str]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)

        return self._each(moved)

    def pin_memory(self) -> "Batch":
        """In page-locked memory, from which copies to a GPU run beside its work; a DataLoader calls this."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return Batch(**values | tensors)

    def embeds(self, table: torch.Tensor) -> torch.Tensor:
        """(B, L, H) merged input embeddings: text rows from the (V, H) table, image rows as stored."""
        embeds = table[self.ids]
        embeds.view(-1, embeds.shape[2])[self.image_index] = self.image_rows.to(embeds.dtype)
        return embeds


def sample_generator(seed: int, epoch: int, sample: int | str) -> torch.Generator:
    """What is random about a sample in an epoch."""
    digest = hashlib.blake2b(f"{seed} {epoch} {sample}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class Noise:
    """Uniform noise on input features.

    It depends on seed, epoch and sample alone, so batching and interruptions do not change it.
    """

    width: float
    """Of the noise at 512 tokens; longer samples get less, shorter ones more."""
    seed: int = 0

    def __call__(self, sample: Sample, index: int, epoch: int | None) -> torch.Tensor:
        """The sample's features (K, F) as the head reads them in an epoch; None: without noise."""
        _, features = sample.inputs
        if epoch is None or not self.width:
            return features
        noise = torch.rand(features.shape, generator=sample_generator(self.seed, epoch, index)) - 0.5
        return features + noise * (self.width * NOISE_LENGTH / max(len(sample), 1))


class SampleFiles(torch.utils.data.Dataset):
    """Some sample files; items are asked for as (index, epoch), epoch None for no noise.

    Args:
        paths: the files.
        max_len: longer samples are cut.
        skip: files among them that are left out; the order and the noise of the others do not change with it.
    """

    def __init__(self, paths: Sequence[Path], max_len: int, skip: Collection[Path] = ()):
        self.paths, self.max_len = list(paths), max_len
        self.lengths = read_lengths(paths, max_len)
        self.kept = [index for index, path in enumerate(paths) if path not in skip]
        """Places of the samples that are not left out."""

    def __len__(self) -> int:
        return len(self.paths)


class SampleFolder(SampleFiles):
    """Sample files with their features.

    Args:
        noise: on input features.
        all_features: refuse samples without the features of image positions.
        sizes: (V, H) of the draft head, which ids and features have to fit; None does not look.
        layers: those of the target whose inputs the head reads in place of its features.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        max_len: int,
        noise: Noise | None = None,
        all_features: bool = False,
        sizes: tuple[int, int] | None = None,
        layers: tuple[int, ...] = (),
        skip: Collection[Path] = (),
    ):
        super().__init__(paths, max_len, skip)
        self.noise, self.all_features = noise or Noise(0.0), all_features
        self.sizes, self.layers = sizes or (), layers

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Sample, torch.Tensor]:
        """The sample and its input features (K, F)."""
        index, epoch = key
        sample = read_sample(self.paths[index], *self.sizes).cut(self.max_len).read_by(self.layers)
        if self.all_features and sample.images and not sample.has_all_features():
            raise ValueError(
                f"{sample.name}: features of image positions are not stored, which this head reads; make the data with "
                "--store all"
            )
        return sample, self.noise(sample, index, epoch)


def collate(items: Sequence[tuple[Sample, torch.Tensor]]) -> Batch:
    """Pad samples and their input features to one batch."""
    samples = [sample for sample, _ in items]
    lengths = [len(sample) for sample in samples]
    longest, size = max(lengths), items[0][1].shape[1]
    dtype = items[0][1].dtype
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    hidden = torch.zeros(len(samples) * longest, size, dtype=dtype)
    image_index, scored, targets = [], [], []
    for row, (sample, features) in enumerate(items):
        offset = row * longest
        ids[row, : len(sample)] = sample.input_ids
        places, _ = sample.inputs
        hidden[offset + places] = features.to(dtype)
        image_index += [torch.arange(offset + start, offset + end) for start, end in sample.images]
        pairs = sample.scored().nonzero()[:, 0]
        scored.append(pairs + offset)
        targets.append(sample.hidden[torch.searchsorted(sample.hidden_positions, pairs + 1)])
    return Batch(
        ids,
        hidden.view(len(samples), longest, size),
        torch.cat([sample.image_embeds for sample in samples]),
        torch.cat(image_index) if image_index else torch.zeros(0, dtype=torch.long),
        torch.cat(scored),
        torch.cat(targets),
        [sample.images for sample in samples],
        lengths,
        [sample.name for sample in samples],
    )


def without_tracebacks(batches: DataLoader) -> Iterator:
    """The batches of a loader; what goes wrong in one of its processes is one line, and never a wait without end."""
    if batches.num_workers:
        batches.timeout, batches.worker_init_fn = MOST_SECONDS, _end_where_nothing_goes_out
    try:
        yield from batches
    except (ValueError, OSError) as error:
        if not str(error).startswith("Caught "):
            raise
        # its frames hold the loader's processes in a cycle; one that dies while garbage is collected is waited for
        clear_frames(error.__traceback__)
        last = str(error).rstrip().splitlines()[-1]
        raise ValueError(last.partition("Error: ")[2] or last) from None
    except RuntimeError as error:
        if not any(sign in str(error) for sign in SIGNS_OF_WORKERS):
            raise
        raise ValueError(
            "a process that reads samples has died or gives nothing, perhaps for want of shared memory: "
            f"--num-workers 0 does without, docker run --shm-size gives more ({one_line(error)[:200]})"
        ) from None


def _end_where_nothing_goes_out(worker: int) -> None:
    """A process that finds no shared memory for a batch would say so, live on, and be waited for."""
    Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))


def find_samples(folders: Sequence[str], flag: str = "--tmpdir") -> list[Path]:
    """All sample files of some folders, in a fixed order; `flag` is where the user gave them."""
    paths = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"{flag} {folder}: no such folder")
        found = sorted(Path(folder).rglob(f"[0-9]*{SUFFIX}"))  # not a checkpoint that lies there too
        if not found:
            raise ValueError(f"{flag} {folder}: no sample files ({SUFFIX}) there")
        paths += found
    return paths


def skipped_samples(paths: Sequence[Path], names: Sequence[str]) -> set[Path]:
    """The files that --skip names, by path or by name alone.

    Raises:
        ValueError: a name fits none of them, or several.
    """
    skipped = set()
    for name in names:
        found = [path for path in paths if path == Path(name) or path.name == name]
        if len(found) != 1:
            those = f"several samples: {', '.join(map(str, found))}" if found else "no sample of --tmpdir"
            raise ValueError(f"--skip {name}: {those}")
        skipped.add(found[0])
    return skipped


def hold_out(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Training and held-out files: about 5 % of each folder are held out, at least one of two or more.

    What a sample says decides, its token ids and its image's name: other files, their order or other folders do not.
    """
    with ThreadPoolExecutor(8) as pool:
        places = dict(zip(paths, pool.map(_place, paths), strict=True))
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    held: set[Path] = set()
    for together in folders.values():
        found = [path for path in together if places[path] < HELD_OUT]
        if len(together) > 1 and not 0 < len(found) < len(together):
            found = [min(together, key=places.__getitem__)]
        held.update(found if len(together) > 1 else ())
    return [path for path in paths if path not in held], [path for path in paths if path in held]


def _place(path: Path) -> float:
    """Of a sample among all that there could be, from 0 to 1."""
    tokens = read_tokens(path)
    digest = hashlib.blake2b(tokens.input_ids.numpy().tobytes(), digest_size=8, person=HELD_OUT_SEED)
    digest.update((tokens.picture or "").encode())
    return int.from_bytes(digest.digest(), "little") / 2**64


def read_lengths(paths: Sequence[Path], max_len: int) -> list[int]:
    """Tokens of each sample, from the files' headers."""
    with ThreadPoolExecutor(8) as pool:
        return [min(length, max_len) for length in pool.map(read_length, paths)]


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**63)


def epoch_groups(lengths: Sequence[int], group_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The samples of each optimizer step of an epoch, in random order, similar lengths together.

    Depends on the size of a step alone, not on how it is divided into batches and processes.
    """
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = group_size * (WINDOW if group_size > 1 else 1)
    groups = []
    for start in range(0, len(order), window):
        members = sorted(order[start : start + window], key=lambda i: lengths[i])
        groups += [members[i : i + group_size] for i in range(0, len(members), group_size)]
    return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]


def micro_batches(group: Sequence[int], batch_size: int, process: int, processes: int) -> list[Sequence[int]]:
    """The batches of one process in one optimizer step; in an epoch's last steps some processes may have fewer."""
    batches = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return batches[process::processes]
