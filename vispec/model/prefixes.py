"""Prompts whose keys are kept, so that the next one is read on from what it shares with one of them.

What a prompt may share is text with all of its images: the same ids, and the same pixels, sizes and grids. So the next
turn of a conversation and another question about a picture are read on; a prompt with one more picture is read whole.
Then all that is left to read is text, and the text decoder alone reads it, as it reads a drafted chain.

Beside the keys stand features and embeddings: a draft reads every prompt from these, from its beginning. That is
cheap beside the target's pass, and exact for every draft, whatever it remembers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import torch

from vispec.model.families import PER_TOKEN
from vispec.model.prompt import Prompt


@dataclass(frozen=True)
class KeptPrompt:
    """What is left of a prompt of one row and L tokens."""

    source: tuple
    """What has to be the same besides the ids: a digest of the images, and the layers whose inputs a draft reads."""
    ids: torch.Tensor
    """(L,) on the CPU."""
    prompt: Prompt
    """Without its inputs."""
    keys: tuple
    """Of `TreeCache.saved`."""
    text_from: int
    """Tokens up to the end of the last image: text alone follows."""


class PrefixCache:
    """Kept prompts, of so many tokens together; the one that was least recently used goes first.

    Args:
        tokens: most tokens of all kept prompts; a longer prompt is not kept.
    """

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.reads_on: dict[tuple, bool] = {}
        """Whether tokens are read alike whatever follows them: by what a prompt's inputs are called and whether it
        shows images, once one has shown it."""
        self._kept: list[KeptPrompt] = []  # the most recently used last
        self._lock = Lock()

    def find(self, source: tuple, ids: torch.Tensor) -> tuple[KeptPrompt, int] | None:
        """The kept prompt that shares most with the ids (L,), and how many; None where an image is left to read."""
        with self._lock:
            alike = [(_shared(one.ids, ids), one) for one in self._kept if one.source == source]
            length, best = max(alike, key=lambda pair: pair[0], default=(0, None))
            length = min(length, len(ids) - 1)  # the last token's logits are asked for
            if best is None or length < max(best.text_from, 1):
                return None
            self._kept = [one for one in self._kept if one is not best] + [best]
            return best, length

    def keep(self, new: KeptPrompt) -> None:
        """Keep a prompt in place of those that it begins with."""
        if len(new.ids) > self.tokens:
            return
        with self._lock:
            others = [one for one in self._kept if one.source != new.source or _shared(one.ids, new.ids) < len(one.ids)]
            self._kept = [*others, new]
            while sum(len(one.ids) for one in self._kept) > self.tokens:
                self._kept.pop(0)

    def clear(self) -> None:
        """Keep none of the prompts any longer."""
        with self._lock:
            self._kept = []


def digest(inputs: Mapping, layers: Sequence[int]) -> tuple:
    """What two prompts have to have in common besides their ids."""
    found = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        if name in PER_TOKEN or value is None:
            continue
        found.update(f"{name} {getattr(value, 'dtype', '')} {getattr(value, 'shape', value)}".encode())
        if isinstance(value, torch.Tensor):
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.digest(), tuple(layers), given(inputs)


def given(inputs: Mapping) -> tuple[str, ...]:
    """The names of a prompt's inputs: some targets read a prompt in another way where its kinds of tokens are told."""
    return tuple(sorted(name for name, value in inputs.items() if value is not None))


def _shared(left: torch.Tensor, right: torch.Tensor) -> int:
    n = min(len(left), len(right))
    return int((left[:n] == right[:n]).long().cumprod(0).sum())
