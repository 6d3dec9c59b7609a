"""Online training: the frozen target computes the features of a sample when the sample's turn comes.

The processes that load data read token ids and pictures only. The target runs in the training process, over one
unpadded sample at a time: exactly the pass of data generation, so the features are those that would have been stored.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vispec.ge_data.jobs import features, image_inputs
from vispec.ge_data.run_folder import MANIFEST, read_manifest
from vispec.ge_data.sample_file import Sample, Tokens, read_tokens
from vispec.ge_data.sources import LLAVA_PRETRAIN_FOLDER
from vispec.model.loading import load_target
from vispec.model.target import Target
from vispec.pictures import OutsideFolder, UnreadableImage, picture_path
from vispec.prompts import build_inputs, image_file, load_processor, user_turn
from vispec.train.samples import Batch, Noise, SampleFiles, collate

PIXEL_LIMIT_NAMES = ("min_pixels", "max_pixels")


@dataclass(frozen=True)
class Unseen:
    """What the target has not seen yet of a sample, and which item it is."""

    inputs: dict[str, torch.Tensor]
    """The processor's tensors of the image; empty without one."""
    index: int
    epoch: int | None


class Pictures:
    """The images of samples as the processor gave them when the samples were made.

    Args:
        model: the target, folder or hub id, whose processor is used.
        folders: where sample files are; each folder's manifest says where its images are, and Qwen's pixel limits.
        data_folder: the images' folder, instead of the manifests'.
        allow_outside: read images at absolute paths, and above that folder.
    """

    def __init__(
        self, model: str, folders: Iterable[Path], data_folder: str | None = None, allow_outside: bool = False
    ):
        self.data_folder, self.allow_outside = data_folder, allow_outside
        self._arguments = {folder: read_manifest(folder).get("arguments", {}) for folder in sorted(folders)}
        limits = {_pixel_limits(arguments) for arguments in self._arguments.values()}
        self._processors = {pair: _load_processor(model, pair) for pair in limits}

    def inputs(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        """The processor's image tensors of a sample; empty where it has no image.

        Raises:
            ValueError: the image cannot be found or read; names the sample and the image.
        """
        if not tokens.images:
            return {}
        if tokens.picture is None:
            raise ValueError(f"{tokens.name}: the file does not say where its image is")
        folder = Path(tokens.name).parent
        try:
            path = picture_path(self._image_folder(folder), tokens.picture, self.allow_outside)
        except OutsideFolder as error:
            raise ValueError(f"{tokens.name}: its image {error}") from None
        processor = self._processors[_pixel_limits(self._arguments[folder])]
        try:
            return image_inputs(build_inputs(processor, [user_turn(image_file(path))]))
        except UnreadableImage as error:
            raise ValueError(
                f"{tokens.name}: its image {path} cannot be read ({error}); --data-folder says where the images are"
            ) from None

    def _image_folder(self, folder: Path) -> Path:
        if self.data_folder is not None:
            return Path(self.data_folder)
        if not self._arguments[folder]:
            raise ValueError(f"{folder}: no {MANIFEST} that says where the images are; --data-folder can")
        return Path(self._arguments[folder].get("data_folder") or LLAVA_PRETRAIN_FOLDER)


class TokenFolder(SampleFiles):
    """Sample files without their features; `vocab_size` is the target's number of tokens."""

    def __init__(
        self, paths: Sequence[Path], max_len: int, pictures: Pictures, vocab_size: int, skip: Collection[Path]
    ):
        super().__init__(paths, max_len, skip)
        self.pictures, self.vocab_size = pictures, vocab_size

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tokens, Unseen]:
        index, epoch = key
        tokens = read_tokens(self.paths[index], self.vocab_size)
        return tokens, Unseen(self.pictures.inputs(tokens), index, epoch)


class OnlineFeatures:
    """Makes batches of a `TokenFolder`'s items, as `SampleFolder` and `collate` do of stored features.

    Args:
        target: frozen; on the device of the training process.
        max_len: longer samples are cut.
        noise: of the input features.
        all_features: also those of image positions.
        layers: those of the target whose inputs the head reads in place of its features.
    """

    def __init__(
        self,
        target: Target,
        max_len: int,
        noise: Noise,
        all_features: bool,
        layers: tuple[int, ...],
    ):
        self.target, self.max_len, self.noise = target, max_len, noise
        self.all_features, self.layers = all_features, layers
        target.model.requires_grad_(False)

    def batch(self, items: Sequence[tuple[Tokens, Unseen]]) -> Batch:
        """One pass of the target a sample; the features come out on the CPU, where noise is the same everywhere."""
        samples = [self._sample(tokens, unseen.inputs) for tokens, unseen in items]
        keys = [(unseen.index, unseen.epoch) for _, unseen in items]
        return collate([(sample, self.noise(sample, *key)) for sample, key in zip(samples, keys, strict=True)])

    def _sample(self, tokens: Tokens, inputs: dict[str, torch.Tensor]) -> Sample:
        store = "all" if self.all_features and tokens.images else "pairs"
        try:
            sample = features(self.target, tokens.input_ids, tokens.loss_mask, inputs, store, self.layers)
        except ValueError as error:
            raise ValueError(f"{tokens.name}: {error}") from None
        if sample.images != tokens.images:
            raise ValueError(
                f"{tokens.name}: images at tokens {tokens.images}, --basepath puts them at {sample.images}: the data "
                "was made with another target"
            )
        sample.name = tokens.name
        return sample.cut(self.max_len)


def load_frozen(model: str, dtype: str, device: torch.device) -> Target:
    """The target for online training; dtype is that of its weights for "auto"."""
    return Target(
        load_target(
            model,
            dtype if dtype == "auto" else getattr(torch, dtype),
            {"": device} if device.type == "cuda" else None,
        )
    )


def _pixel_limits(arguments: dict) -> tuple[int | None, ...]:
    return tuple(arguments.get(name) for name in PIXEL_LIMIT_NAMES)


def _load_processor(model: str, limits: tuple[int | None, ...]):
    given = {name: value for name, value in zip(PIXEL_LIMIT_NAMES, limits, strict=True) if value is not None}
    return load_processor(model, **given)
