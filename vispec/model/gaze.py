"""How much a target looks at its images: ViSkip, MMSpec's method (arXiv 2603.14989).

Where the next token depends on what is seen, a draft is likely to be wrong, so one plain step is done instead. r is the
attention mass of the last accepted node's query on the image keys, in the last layer, a mean over its heads; the gate
fires where r is at least a threshold (published: 0.35). It is asked before a tree is drafted; the authors' code throws
away one that it has built. A round is common to the rows of a batch, so all of them have to look (ours).

B rows, n tokens, H hidden size, F numbers that a draft reads, D head size.
"""

from collections.abc import Sequence

import torch

from vispec.model.cache import TreeCache
from vispec.model.prompt import Prompt
from vispec.model.rows import Rows
from vispec.model.target import Target


class Gaze:
    """The gate of one target.

    Args:
        layers: those whose inputs the draft reads; none: what the output head reads.
        threshold: r from which it fires.

    Raises:
        ValueError: the target does not decode by the lean pass, which computes the queries.
    """

    def __init__(self, target: Target, layers: Sequence[int], threshold: float):
        self._target, self._layers, self._threshold = target, layers, threshold
        self._refuse_stock()
        self.watched = tuple(dict.fromkeys([*layers, len(target.layer_devices) - 1]))
        """Layers whose inputs `Target.forward` is to give."""
        self.states = len(self.watched) + (not layers)
        """How many of H numbers `kept` gives."""

    def _refuse_stock(self) -> None:
        if not self._target.lean:
            raise ValueError("skip_visual takes its queries from the lean pass, and this target does not decode by it")

    def kept(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(B, n, states · H) of what `Target.forward` gives: what the draft reads, at last the last layer's input."""
        return features if self._layers else torch.cat([hidden, features], dim=-1)

    def read(self, row: Rows, prompt: Prompt, width: int) -> bool:
        """Note where the images of a prompt are; whether its last token looks at them.

        Args:
            row: has read the prompt.
            width: F; the prompt's features become these, as if nobody had asked for more.
        """
        self._refuse_stock()
        prompt.features = prompt.features[..., :width] if self._layers else prompt.hidden
        row.shown.zero_()
        for start, end in prompt.images[0]:
            row.shown[:, start:end] = True
        return bool(self.look(row, prompt.input_ids.shape[1]))

    def look(self, rows: Rows, slots: int) -> torch.Tensor:
        """(B, 1) 1 where the target looks at images at the last token that it has read, else 0.

        Args:
            slots: an upper bound of the cache's lengths.
        """
        kept = rows.kept
        newest = kept.features[torch.arange(len(rows.root), device=rows.root.device), kept.counts - 1]
        state = newest[:, -self._target.text_config.hidden_size :]
        positions = rows.positions(torch.full_like(rows.offset, -1))
        return (image_mass(self._target, rows.cache, state, positions, rows.shown, slots) >= self._threshold).long()


def image_mass(
    target: Target, cache: TreeCache, state: torch.Tensor, positions: torch.Tensor, shown: torch.Tensor, slots: int
) -> torch.Tensor:
    """(B, 1) r of the last committed token of each row, from 0 to 1; 0 without an image.

    Args:
        state: (B, H) what went into the last layer there.
        positions: (B, 1) where it stands.
        shown: (B, capacity) bool, which slots are of images.
    """
    queries = target.last_queries(state, positions)
    keys = cache.keys(len(target.layer_devices) - 1, slots)
    batch, heads, _, size = keys.shape
    scores = queries.view(batch, heads, -1, size) @ keys.transpose(2, 3)
    behind = torch.arange(slots, device=scores.device) >= cache.lengths[:, None]
    weights = scores.float().masked_fill(behind[:, None, None], float("-inf")).softmax(-1)
    return (weights * shown[:, None, None, :slots]).sum(-1).mean((1, 2))[:, None]
