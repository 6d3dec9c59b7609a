"""One training sample, one safetensors file.

A draft head reads much less than a target computes. Of an image ViSpec reads the input embeddings and nothing else, so
the features of image positions are left out, and the embeddings of text rows follow from the token ids. What
remains is half of what two full (L, H) matrices take.

Shapes: L tokens, H hidden size, K stored features, N image rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vispec.cli import write_atomic
from vispec.model.pairs import Span

SUFFIX = ".safetensors"
FORMAT = 1


@dataclass
class Sample:
    """A conversation as token ids with the target's features where training needs them."""

    input_ids: torch.Tensor
    """(L,) int64."""
    loss_mask: torch.Tensor
    """(L,) bool, True at the assistant's tokens with their end tokens."""
    images: list[Span]
    """Token spans of the images, ascending."""
    image_embeds: torch.Tensor
    """(N, H) the target's input embeddings of all image rows, in order."""
    hidden_positions: torch.Tensor
    """(K,) int64, ascending: the tokens whose features are stored."""
    hidden: torch.Tensor
    """(K, H) the target's last hidden states at these tokens."""
    name: str = ""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def scored(self) -> torch.Tensor:
        """(L,) bool: pair i is scored iff token i+2, which its target feature predicts, is the assistant's."""
        return scored_pairs(self.loss_mask)

    def full_hidden(self) -> torch.Tensor:
        """(L, H), zeros where no feature is stored."""
        full = self.hidden.new_zeros(len(self), self.hidden.shape[1])
        full[self.hidden_positions] = self.hidden
        return full

    def has_all_features(self) -> bool:
        """Whether a head that keeps image rows as ordinary pairs (EAGLE-2) can be trained on the sample too."""
        return self.hidden_positions.shape[0] >= len(self) - 1

    def cut(self, max_len: int) -> "Sample":
        """The first `max_len` tokens; an image that would be cut in two is left out with all that follows."""
        length = min(len(self), max_len)
        length = min([length] + [start for start, end in self.images if start < length < end])
        if length == len(self):
            return self
        images = [span for span in self.images if span[1] <= length]
        kept = self.hidden_positions < length
        return Sample(
            self.input_ids[:length],
            self.loss_mask[:length],
            images,
            self.image_embeds[: sum(end - start for start, end in images)],
            self.hidden_positions[kept],
            self.hidden[kept],
            self.name,
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


def write_sample(path: str | Path, sample: Sample, note: Mapping | None = None) -> int:
    """Write a sample whole or not at all; returns the bytes. `note` says in JSON where it comes from."""
    tensors = {
        "input_ids": sample.input_ids.to(torch.int32),
        "loss_mask": sample.loss_mask,
        "images": torch.tensor(sample.images, dtype=torch.int32).reshape(-1, 2),
        "image_embeds": sample.image_embeds,
        "hidden_positions": sample.hidden_positions.to(torch.int32),
        "hidden": sample.hidden,
    }
    # one metadata key only: the writer orders several at random, and equal samples are to be equal files
    metadata = {"vispec": json.dumps({"format": FORMAT, **(note or {})}, sort_keys=True)}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomic(path, lambda file: file.write(content))
    return len(content)


def read_sample(path: str | Path) -> Sample:
    """Read a sample; ValueError names a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return Sample(
            tensors["input_ids"].long(),
            tensors["loss_mask"],
            [(start, end) for start, end in tensors["images"].tolist()],
            tensors["image_embeds"],
            tensors["hidden_positions"].long(),
            tensors["hidden"],
            name=str(path),
        )
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: not a training sample ({error})") from None


def read_note(path: str | Path) -> dict:
    """The JSON note of a sample file."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("vispec", "{}"))


def read_length(path: str | Path) -> int:
    """Tokens of a sample, from the file's header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice("input_ids").get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a training sample ({error})") from None
