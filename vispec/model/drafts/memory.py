"""What a draft remembers that keeps keys and values of its own.

B rows, H hidden size of the draft.
"""

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

from vispec.model.cache import TreeCache

Own = TypeVar("Own", bound="CachedMemory")


@dataclass
class CachedMemory:
    """The texts of a generation, as one draft has read them."""

    cache: TreeCache
    position: torch.Tensor
    """(B,) position of what the draft reads next."""
    estimate: torch.Tensor
    """(B, H) the draft's output at what it has read last."""

    @property
    def used(self) -> int:
        return self.cache.used

    @used.setter
    def used(self, places: int) -> None:
        self.cache.used = places

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        """All but the cache."""
        return tuple(getattr(self, field.name) for field in fields(self)[1:])

    def part(self: Own, start: int, stop: int) -> Own:
        return type(self)(self.cache.part(start, stop), *(tensor[start:stop] for tensor in self._tensors()))

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)
        for tensor in self._tensors():
            tensor[target] = tensor[source]

    def clear(self) -> None:
        self.cache.clear()
        for tensor in self._tensors():
            tensor.zero_()

    def enlarged(self: Own, capacity: int) -> Own:
        return replace(self, cache=self.cache.enlarged(capacity))

    def take_last(self, outputs: torch.Tensor, counts: torch.Tensor) -> None:
        """A pass's outputs (B, n, H) became part of the text, the first counts[b] of row b."""
        last = (counts - 1)[:, None, None].expand(-1, 1, outputs.shape[2])
        self.estimate.copy_(outputs.gather(1, last)[:, 0])
        self.cache.commit(counts)
        self.position += counts
