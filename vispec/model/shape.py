"""What a draft tree is to look like. Command lines read it before they import torch, which takes seconds."""

import re
from dataclasses import dataclass, replace

from vispec.model.arguments import whole

AUTO, TUNE = "auto", "tune"
"""What a tree may be called besides total_token/depth/top_k."""


@dataclass(frozen=True)
class TreeShape:
    """How large a tree is: N nodes with the root, `depth` expansions, `top_k` nodes a level."""

    total_token: int = 30
    depth: int = 3
    top_k: int = 8

    def __post_init__(self):
        for name, least in (("total_token", 2), ("depth", 0), ("top_k", 1)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))

    @classmethod
    def parse(cls, text: str) -> "TreeShape":
        """total_token/depth/top_k, as in "30/3/8"; raises ValueError where the text says something else."""
        if not re.fullmatch(r"[0-9]+/[0-9]+/[0-9]+", text):
            raise ValueError(f"a tree is total_token/depth/top_k such as 30/3/8, found {text!r}")
        return cls(*map(int, text.split("/")))

    def __str__(self) -> str:
        return f"{self.total_token}/{self.depth}/{self.top_k}"

    @property
    def candidates(self) -> int:
        return self.top_k + self.depth * self.top_k**2

    @property
    def levels(self) -> int:
        """Levels below the root: at most so many draft tokens are accepted in a round."""
        return self.depth + 1

    @property
    def chain(self) -> "TreeShape":
        """The tree of this depth whose nodes have one child each."""
        return replace(self, total_token=min(self.total_token, self.levels + 1), top_k=1)

    def fitted(self, vocabulary: int, depth: int | None = None) -> "TreeShape":
        """The largest tree not above this one that a vocabulary of that size can fill; `depth` replaces its own."""
        depth = self.depth if depth is None else depth
        shape = replace(self, depth=depth, top_k=min(self.top_k, vocabulary))
        return replace(shape, total_token=min(self.total_token, shape.candidates + 1))
