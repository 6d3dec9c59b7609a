"""One training sample, one safetensors file.

A draft head reads much less than a target computes. Of an image ViSpec reads the input embeddings and nothing else, so
the features of image positions are left out, and the embeddings of text rows follow from the token ids. What
remains is half of what two full (L, H) matrices take. Token ids alone take kilobytes: the target computes the features
again when they are needed (`--store tokens`, training with `--online`). EAGLE-3 reads what goes into some layers of the
target instead of features, of all tokens (`--store eagle3`).

Shapes: L tokens, H hidden size, K stored features, N image rows, A tokens up to the last pair that is scored.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vispec.files import write_atomic
from vispec.model.pairs import Span

SUFFIX = ".safetensors"
FORMAT = 1


TOKEN_TENSORS = ("input_ids", "loss_mask", "images")
FEATURE_TENSORS = ("image_embeds", "hidden_positions", "hidden")
AUX_TENSORS = ("aux_layers", "aux")
INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    aux: torch.Tensor | None = field(default=None, kw_only=True)
    """(A, layers * H) what goes into some layers at the first tokens, side by side; None where it is not stored."""
    aux_layers: tuple[int, ...] = field(default=(), kw_only=True)
    """Their numbers, ascending."""

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a head reads, once `read_by` has said of which layers: the tokens' places (K,), and features (K, F)."""
        return (self.hidden_positions, self.hidden) if self.aux is None else (torch.arange(len(self.aux)), self.aux)

    def read_by(self, layers: tuple[int, ...]) -> "Sample":
        """As a head is trained on it that reads the inputs of these layers, or with none of them the features.

        Raises:
            ValueError: the sample does not have them; names it.
        """
        if not layers:
            return replace(self, aux=None, aux_layers=())
        if layers != self.aux_layers:
            wanted = " ".join(map(str, layers))
            found = " ".join(map(str, self.aux_layers)) or "none"
            raise ValueError(
                f"{self.name}: the inputs of layers {wanted} are not stored ({found} are), which this head reads; make "
                f"the data with --store eagle3 --aux-layers {wanted}"
            )
        return self

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
            aux=None if self.aux is None else self.aux[: len(tokens)],
            aux_layers=self.aux_layers,
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
    scored, needed = scored_pairs(loss_mask), torch.zeros_like(loss_mask)
    needed[: read_tokens_of(loss_mask)] = True
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
    aux: torch.Tensor | None = None,
    aux_layers: tuple[int, ...] = (),
) -> Sample:
    """Keep of the target's full `embeds` and `hidden` (L, H) what training needs.

    Args:
        store: "pairs" keeps what ViSpec reads; all others keep all features.
        aux: (L, layers * H) what goes into the layers `aux_layers`; none of it is kept when None.
    """
    positions = needed_positions(loss_mask, images) if store == "pairs" else torch.arange(len(input_ids))
    rows = torch.cat([torch.arange(start, end) for start, end in images] or [torch.zeros(0, dtype=torch.long)])
    return Sample(
        input_ids.cpu(),
        loss_mask.cpu(),
        list(images),
        embeds[rows.to(embeds.device)].cpu(),
        positions,
        hidden[positions.to(hidden.device)].cpu(),
        aux=None if aux is None else aux[: read_tokens_of(loss_mask)].cpu(),
        aux_layers=aux_layers,
    )


def read_tokens_of(loss_mask: torch.Tensor) -> int:
    """A: the tokens up to the last scored pair; those behind it influence nothing."""
    places = scored_pairs(loss_mask).nonzero()[:, 0]
    return int(places[-1]) + 1 if len(places) else 0


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
        if sample.aux is not None:
            tensors["aux_layers"] = torch.tensor(sample.aux_layers, dtype=torch.int32)
            tensors["aux"] = sample.aux
    # one metadata key only: the writer orders several at random, and equal samples are to be equal files
    metadata = {"vispec": json.dumps({"format": FORMAT, **(note or {})}, sort_keys=True)}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomic(path, lambda file: file.write(content))
    return len(content)


def read_tokens(path: str | Path, vocab_size: int | None = None) -> Tokens:
    """The token ids of a sample, whatever else its file holds.

    Args:
        vocab_size: tokens of the target, where it is known.

    Raises:
        ValueError: it is no such file, or what it holds does not fit together; names it.
    """
    tensors, note = _read(path, TOKEN_TENSORS)
    return Tokens(**_token_fields(path, tensors, vocab_size), picture=note.get("image"), name=str(path))


def read_sample(path: str | Path, vocab_size: int | None = None, hidden_size: int | None = None) -> Sample:
    """Read a sample with its features.

    Args:
        vocab_size, hidden_size: of the draft head, where they are known.

    Raises:
        ValueError: as for `read_tokens`; or it holds token ids only.
    """
    tensors, note = _read(path)
    if "hidden" not in tensors and "input_ids" in tensors:
        raise ValueError(
            f"{path}: token ids without features (--store tokens); train with --online, or make the data with "
            "--store pairs"
        )
    if missing := [name for name in (*TOKEN_TENSORS, *FEATURE_TENSORS) if name not in tensors]:
        raise ValueError(f"{path}: not a training sample (no {', '.join(missing)})")
    fields = _token_fields(path, tensors, vocab_size)
    embeds, hidden = tensors["image_embeds"], tensors["hidden"]
    _check(path, "hidden_positions", tensors["hidden_positions"], 1, INTEGERS)
    _check(path, "image_embeds", embeds, 2, FLOATS)
    _check(path, "hidden", hidden, 2, FLOATS)
    positions = tensors["hidden_positions"].long()
    if hidden_size is not None and hidden.shape[1] != hidden_size:
        raise ValueError(f"{path}: features of {hidden.shape[1]} numbers, the draft head has {hidden_size}")
    if embeds.shape[1] != hidden.shape[1]:
        raise ValueError(f"{path}: image rows of {embeds.shape[1]} numbers, features of {hidden.shape[1]}")
    if len(embeds) != sum(end - start for start, end in fields["images"]):
        raise ValueError(f"{path}: {len(embeds)} image rows, but images at tokens {fields['images']}")
    if len(positions) != len(hidden) or _outside(positions, len(fields["input_ids"])) or (positions.diff() <= 0).any():
        raise ValueError(f"{path}: hidden_positions are not the ascending places of {len(hidden)} features")
    if not torch.isin(needed_positions(fields["loss_mask"], fields["images"]), positions).all():
        raise ValueError(f"{path}: features that training reads are missing")
    aux, layers = (tensors.get(name) for name in reversed(AUX_TENSORS))
    if aux is not None:
        layers = _aux_layers(path, aux, layers, hidden.shape[1], read_tokens_of(fields["loss_mask"]))
    return Sample(
        **fields,
        image_embeds=embeds,
        hidden_positions=positions,
        hidden=hidden,
        aux=aux,
        aux_layers=layers or (),
        picture=note.get("image"),
        name=str(path),
    )


def _read(path: str | Path, names: Sequence[str] | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of a file, all of them by default, and its note."""
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("vispec", "{}"))
            tensors = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a training sample ({error})") from None
    if not isinstance(note, dict) or not isinstance(note.get("image"), str | None):
        raise ValueError(f"{path}: not a training sample (its note is {note!r:.40})")
    return tensors, note


def _aux_layers(path, aux: torch.Tensor, layers: torch.Tensor | None, size: int, tokens: int) -> tuple[int, ...]:
    """The layers whose inputs a file holds, of features of `size` numbers and so many tokens that are read."""
    if layers is None:
        raise ValueError(f"{path}: inputs of layers, but not of which")
    _check(path, "aux_layers", layers, 1, INTEGERS)
    _check(path, "aux", aux, 2, FLOATS)
    if tuple(aux.shape) != (tokens, size * len(layers)) or (layers.diff() <= 0).any():
        raise ValueError(
            f"{path}: inputs {tuple(aux.shape)} of layers {layers.tolist()}, expected {(tokens, size * len(layers))}"
        )
    return tuple(layers.tolist())


def _token_fields(path: str | Path, tensors: Mapping[str, torch.Tensor], vocab_size: int | None) -> dict:
    ids, mask, spans = (tensors[name] for name in TOKEN_TENSORS)
    _check(path, "input_ids", ids, 1, INTEGERS)
    _check(path, "loss_mask", mask, 1, (torch.bool,))
    _check(path, "images", spans, 2, INTEGERS)
    if len(ids) == 0 or len(mask) != len(ids):
        raise ValueError(f"{path}: {len(ids)} input_ids and a loss_mask of {len(mask)}")
    if _outside(ids, vocab_size or 2**31):
        odd = int(ids.min() if ids.min() < 0 else ids.max())
        raise ValueError(f"{path}: token {odd}" + (f", but the target has {vocab_size} tokens" if vocab_size else ""))
    places = spans.flatten()
    # ascending and apart: each end behind its start, each start not before the end before it
    apart = spans.shape[1] == 2 and (spans[:, 0] < spans[:, 1]).all() and (places.diff() >= 0).all()
    if not apart or _outside(places, len(ids) + 1):
        raise ValueError(f"{path}: images at {spans.tolist()} of {len(ids)} tokens; expected ascending [start, end)")
    return {"input_ids": ids.long(), "loss_mask": mask, "images": [(start, end) for start, end in spans.tolist()]}


def _check(path: str | Path, name: str, tensor: torch.Tensor, dimensions: int, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dim() != dimensions or tensor.dtype not in dtypes:
        asked = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        raise ValueError(f"{path}: {name} is {found}, expected {asked} in {dimensions} dimension(s)")


def _outside(values: torch.Tensor, end: int) -> bool:
    """Whether one of some whole numbers is not in [0, end)."""
    values = values.long()  # `end` need not fit into what they are stored as
    return bool(((values < 0) | (values >= end)).any())


def read_note(path: str | Path) -> dict:
    """The JSON note of a sample file."""
    return _read(path, ())[1]


def read_length(path: str | Path) -> int:
    """Tokens of a sample, from the file's header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            shape = file.get_slice("input_ids").get_shape()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a training sample ({error})") from None
    if len(shape) != 1:
        raise ValueError(f"{path}: not a training sample (input_ids are {shape})")
    return shape[0]
