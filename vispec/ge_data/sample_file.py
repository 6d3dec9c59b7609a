"""One training sample, one safetensors file.

A draft head reads much less than a target computes. Of an image ViSpec reads the input embeddings and nothing else, so
the features of image positions are left out, and the embeddings of text rows follow from the token ids. What
remains is half of what two full (L, H) matrices take. Token ids alone take kilobytes: the target computes the features
again when they are needed (`--store tokens`, training with `--online`).

Shapes: L tokens, H hidden size, K stored features, N image rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vispec.files import write_atomic
from vispec.model.pairs import Span

SUFFIX = ".safetensors"
FORMAT = 1


TOKEN_TENSORS = ("input_ids", "loss_mask", "images")


@dataclass
class Tokens:
    """A conversation as token ids, without features: all that `--store tokens` keeps."""

    input_ids: torch.Tensor
    """(L,) int64."""
    loss_mask: torch.Tensor
    """(L,) bool, True at the assistant's tokens with their end tokens."""
    images: list[Span]
    """Token spans of the images, ascending."""
    picture: str | None = field(default=None, kw_only=True)
    """Where the image is, relative to the data folder; None where the file does not say."""
    name: str = field(default="", kw_only=True)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def length_within(self, max_len: int) -> int:
        """How many of the first `max_len` tokens stay: an image that would be cut in two goes with all that follows."""
        length = min(len(self), max_len)
        return min([length] + [start for start, end in self.images if start < length < end])

    def cut(self, max_len: int) -> "Tokens":
        """The first `max_len` tokens, see `length_within`."""
        length = self.length_within(max_len)
        images = [span for span in self.images if span[1] <= length]
        return Tokens(self.input_ids[:length], self.loss_mask[:length], images, picture=self.picture, name=self.name)

    def scored(self) -> torch.Tensor:
        """(L,) bool: pair i is scored iff token i+2, which its target feature predicts, is the assistant's."""
        return scored_pairs(self.loss_mask)


@dataclass
class Sample(Tokens):
    """A conversation with the target's features where training needs them."""

    image_embeds: torch.Tensor
    """(N, H) the target's input embeddings of all image rows, in order."""
    hidden_positions: torch.Tensor
    """(K,) int64, ascending: the tokens whose features are stored."""
    hidden: torch.Tensor
    """(K, H) the target's last hidden states at these tokens."""

    def has_all_features(self) -> bool:
        """Whether a head that keeps image rows as ordinary pairs (EAGLE-2) can be trained on the sample too."""
        return self.hidden_positions.shape[0] >= len(self) - 1

    def cut(self, max_len: int) -> "Sample":
        """The first `max_len` tokens with their features, see `length_within`."""
        tokens = super().cut(max_len)
        kept = self.hidden_positions < len(tokens)
        return Sample(
            **vars(tokens),
            image_embeds=self.image_embeds[: sum(end - start for start, end in tokens.images)],
            hidden_positions=self.hidden_positions[kept],
            hidden=self.hidden[kept],
        )


def scored_pairs(loss_mask: torch.Tensor) -> torch.Tensor:
    """(L,) bool mask over tokens -> (L,) bool mask over pairs, shifted by two."""
    scored = torch.zeros_like(loss_mask)
    scored[:-2] = loss_mask[2:]
    return scored


def needed_positions(loss_mask: torch.Tensor, images: Sequence[Span]) -> torch.Tensor:
    """The tokens whose features ViSpec training reads or scores.

    Pair i reads feature i unless token i+1 belongs to an image: the compressed image stands for these pairs. It scores
    against feature i+1. Pairs behind the last scored one influence nothing.

    Args:
        loss_mask: (L,) bool over tokens.
        images: token spans of the images.

    Returns:
        (K,) int64, ascending.
    """
    scored = scored_pairs(loss_mask)
    places = scored.nonzero()[:, 0]
    last = int(places[-1]) if len(places) else -1
    needed = torch.zeros_like(loss_mask)
    needed[: last + 1] = True
    for start, end in images:
        needed[max(start - 1, 0) : max(end - 1, 0)] = False
    needed[1:] |= scored[:-1]
    return needed.nonzero()[:, 0]


def make_sample(
    input_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    images: Sequence[Span],
    embeds: torch.Tensor,
    hidden: torch.Tensor,
    store: str = "pairs",
) -> Sample:
    """Keep of the target's full `embeds` and `hidden` (L, H) what training needs; `store="all"` keeps all features."""
    positions = torch.arange(len(input_ids)) if store == "all" else needed_positions(loss_mask, images)
    rows = torch.cat([torch.arange(start, end) for start, end in images] or [torch.zeros(0, dtype=torch.long)])
    return Sample(
        input_ids.cpu(),
        loss_mask.cpu(),
        list(images),
        embeds[rows.to(embeds.device)].cpu(),
        positions,
        hidden[positions.to(hidden.device)].cpu(),
    )


def file_name(index: int) -> str:
    return f"{index:08d}{SUFFIX}"


def write_sample(path: str | Path, sample: Tokens, note: Mapping | None = None) -> int:
    """Write a sample whole or not at all, without features where it has none; returns the bytes.

    `note` says in JSON where the sample comes from; its key "image" is the image's path.
    """
    tensors = {
        "input_ids": sample.input_ids.to(torch.int32),
        "loss_mask": sample.loss_mask,
        "images": torch.tensor(sample.images, dtype=torch.int32).reshape(-1, 2),
    }
    if isinstance(sample, Sample):
        tensors["image_embeds"] = sample.image_embeds
        tensors["hidden_positions"] = sample.hidden_positions.to(torch.int32)
        tensors["hidden"] = sample.hidden
    # one metadata key only: the writer orders several at random, and equal samples are to be equal files
    metadata = {"vispec": json.dumps({"format": FORMAT, **(note or {})}, sort_keys=True)}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomic(path, lambda file: file.write(content))
    return len(content)


def read_tokens(path: str | Path) -> Tokens:
    """The token ids of a sample, whatever else its file holds; ValueError names a file that is none."""
    tensors, note = _read(path, TOKEN_TENSORS)
    return Tokens(**_token_fields(tensors), picture=note.get("image"), name=str(path))


def read_sample(path: str | Path) -> Sample:
    """Read a sample with its features; ValueError names a file that is none or that holds token ids only."""
    tensors, note = _read(path)
    if "hidden" not in tensors and "input_ids" in tensors:
        raise ValueError(
            f"{path}: token ids without features (--store tokens); train with --online, or make the data with "
            "--store pairs"
        )
    try:
        return Sample(
            **_token_fields(tensors),
            image_embeds=tensors["image_embeds"],
            hidden_positions=tensors["hidden_positions"].long(),
            hidden=tensors["hidden"],
            picture=note.get("image"),
            name=str(path),
        )
    except KeyError as error:
        raise ValueError(f"{path}: not a training sample ({error})") from None


def _read(path: str | Path, names: Sequence[str] | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of a file, all of them by default, and its note."""
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("vispec", "{}"))
            return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}, note
    except SafetensorError as error:
        raise ValueError(f"{path}: not a training sample ({error})") from None


def _token_fields(tensors: Mapping[str, torch.Tensor]) -> dict:
    return {
        "input_ids": tensors["input_ids"].long(),
        "loss_mask": tensors["loss_mask"],
        "images": [(start, end) for start, end in tensors["images"].tolist()],
    }


def read_note(path: str | Path) -> dict:
    """The JSON note of a sample file."""
    return _read(path, ())[1]


def read_length(path: str | Path) -> int:
    """Tokens of a sample, from the file's header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice("input_ids").get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a training sample ({error})") from None
