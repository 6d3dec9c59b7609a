"""What heads of one decoder layer over pairs share: EAGLE-2's, its relatives, and EAGLE-3's.

Pair i joins the target's feature of token i with the embedding of token i+1; the output at pair i estimates the feature
of token i+1, from which the logits of token i+2 are read. In a tree the estimates stand in for the target's features.

Shapes: B rows, L tokens, F numbers of a feature, H hidden size, R pairs of one pass, k nodes of one tree level.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from vispec.model.cache import TreeCache
from vispec.model.decoder_layer import (
    Heads,
    attend_cached,
    attend_causally,
    decoder_layer,
    grouped,
    heads_of,
    module_parts,
    widened,
)
from vispec.model.drafts.base import BaseHead, Kept
from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.layer import rotary_angles
from vispec.model.drafts.memory import CachedMemory
from vispec.model.pairs import PairLayout, Span, plan_pairs
from vispec.model.prompt import Prompt
from vispec.model.shape import TreeShape
from vispec.model.target import Target
from vispec.model.text_decoder import LeanLayers, UnknownLayer
from vispec.model.tree import Candidates, DraftOutput, Growth, expand_levels


@dataclass
class DraftMemory(CachedMemory):
    """The same of a head of this kind: its next pair's position is how many tokens there are before the root."""

    global_feature: torch.Tensor
    """(B, H) g of the last image, zeros without an image; EAGLE-2 does not read it."""


class PairHead(BaseHead):
    """A decoder layer over pairs, and what decoding needs around it."""

    fc: nn.Linear
    reads_image_features = True
    layers: Sequence[nn.Module]
    """Its decoder layer, in a list as targets have theirs."""

    def __init__(self, config: DraftConfig):
        super().__init__(config)
        self._lean_layers: LeanLayers | None = None

    @cached_property
    def heads(self) -> Heads:
        return heads_of(self.layers[0].self_attn)

    def beside_layers(self) -> list[nn.Module]:
        return [self.fc]

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(…, F) features of the target -> (…, H), as estimates of the head stand in for them; here they are equal."""
        return features

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_lean_layers": None}

    # --- over whole sequences ---

    def plan(self, lengths: list[int], images: list[list[Span]]) -> PairLayout:
        """Which pairs the head runs on; `images` are the token spans of each row's images."""
        return plan_pairs(lengths, [[] for _ in lengths], compressed=0)

    def forward(
        self,
        hidden: torch.Tensor,
        embeds: torch.Tensor,
        next_embeds: torch.Tensor,
        images: list[list[Span]],
        lengths: list[int] | None = None,
        attend: Callable | None = None,
        layout: PairLayout | None = None,
    ) -> torch.Tensor:
        """Outputs for all pairs of a batch of sequences, at their original positions.

        Args:
            hidden: (B, L, H) features of the target, projected, or estimates of the head.
            embeds: (B, L, H) embeddings of tokens 0 … L-1, image rows from the vision tower.
            next_embeds: (B, L, H) embeddings of tokens 1 … L.
            images: token spans of the images of each row.
            lengths: tokens of each right-padded row; all L when None.
            attend: see `LeanLayers`; None: each pair sees those before it.
            layout: of these images and lengths; that of `plan` when None.

        Returns:
            (B, L, H), zeros at pairs that the head does not run on.
        """
        layout = layout or self.plan(lengths or [hidden.shape[1]] * hidden.shape[0], images)
        layout = layout.to(hidden.device)
        x, _ = self.inputs(layout, hidden, embeds, next_embeds)
        # padding on the right is seen by nothing that counts
        attend = attend or (lambda layer, qkv: attend_causally(len(x), self.heads, qkv))
        out = self.layers_over(x, self.angles(layout.positions, x.dtype), attend)
        index = layout.positions[..., None].expand_as(out)
        # surplus columns of short rows must not overwrite pair 0: they are sent to a row that is cut off again
        index = index.masked_fill(~layout.valid[..., None], hidden.shape[1])
        scattered = out.new_zeros(out.shape[0], hidden.shape[1] + 1, out.shape[2]).scatter(1, index, out)
        return scattered[:, :-1]

    def inputs(
        self, layout: PairLayout, hidden: torch.Tensor, embeds: torch.Tensor, next_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer inputs (B, R, H) of the pairs of `layout`, and g (B, H) of each row's last image."""
        index = layout.positions[..., None].expand(-1, -1, hidden.shape[2])
        return self.join(layout, hidden.gather(1, index), embeds, next_embeds.gather(1, index))

    def join(
        self, layout: PairLayout, hidden: torch.Tensor, embeds: torch.Tensor, next_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, of `hidden` and `next_embeds` (B, R, H) that are those of the pairs; `embeds` are of all tokens."""
        return self.fuse(next_embeds, hidden), hidden.new_zeros(hidden.shape[0], hidden.shape[2])

    @abstractmethod
    def fuse(
        self, next_embeds: torch.Tensor, hidden: torch.Tensor, global_feature: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the layer reads of text pairs, (B, R, …), from the embedding of token i+1 and the feature of token i."""

    def layers_over(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], attend: Callable) -> torch.Tensor:
        """Outputs (B, R, H) for what `fuse` gives.

        Args:
            angles: see `angles`.
            attend: see `LeanLayers`.
        """
        rows = x.reshape(-1, x.shape[-1])
        if self.lean:
            rows = self._lean_layers(rows, angles, attend, {})
        else:
            for number, layer in enumerate(self.layers):
                rows = decoder_layer(rows, angles, module_parts(layer), self.heads, partial(attend, number))
        return rows.view(*x.shape[:-1], self.config.hidden_size)

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary angles (B R, T, D) for positions (B, R)."""
        config = self.config
        return widened(*rotary_angles(positions, config.head_dim, config.rope_theta, dtype), self.heads)

    def plan_prompt(self, prompt: Prompt, pairs: int) -> PairLayout:
        """Which of a prompt's first pairs the head runs on."""
        return self.plan([pairs], prompt.images)

    def prompt_angles(
        self, prompt: Prompt, layout: PairLayout, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a prompt's pairs."""
        return self.angles(layout.positions, dtype)

    def prompt_embeds(self, prompt: Prompt) -> torch.Tensor:
        """(1, L, H) embeddings of a prompt's tokens."""
        return prompt.embeds

    # --- decoding ---

    def make_lean(self) -> None:
        was_lean = self._products is not None
        super().make_lean()
        if self._products is not None and not was_lean:
            try:
                self._lean_layers = LeanLayers(self.layers, self._products)
            except UnknownLayer:
                self._products = None

    def _follow(self) -> None:
        try:
            self._lean_layers.refresh()
        except UnknownLayer:
            self._products = None

    def memory(self, rows: int, capacity: int, target: Target) -> DraftMemory:
        place = {"device": target.device}
        zeros = partial(torch.zeros, rows, self.config.hidden_size, dtype=target.dtype, **place)
        cache = TreeCache([target.device] * len(self.layers), rows, capacity)
        return DraftMemory(cache, torch.zeros(rows, dtype=torch.long, **place), zeros(), zeros())

    def read(self, memory: DraftMemory, prompt: Prompt) -> int:
        self.refresh()
        length = prompt.features.shape[1] - 1
        layout = self.plan_prompt(prompt, length).to(prompt.features.device)
        kept = layout.positions.shape[1]
        memory.cache.restart()
        memory.position.fill_(length)
        embeds = self.prompt_embeds(prompt)
        x, global_feature = self.inputs(layout, self.project(prompt.features), embeds, embeds[:, 1:])
        memory.global_feature.copy_(global_feature)
        if kept:
            memory.cache.reserve(kept)

            def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
                kv = qkv[:, heads.queries :].unflatten(1, (2, 1, heads.keys))
                memory.cache.write(layer, kv.permute(1, 2, 3, 0, 4))
                return attend_causally(1, heads, qkv)

            heads = self.heads
            self.layers_over(x, self.prompt_angles(prompt, layout, x.dtype), attend)
            memory.cache.commit(layout.lengths)
        return kept

    def extend(self, memory: DraftMemory, kept: Kept) -> None:
        batch, rows = kept.tokens.shape
        memory.cache.reserve(rows)
        steps = torch.arange(rows, device=kept.tokens.device)
        mask = memory.cache.mask((steps[:, None] >= steps).expand(batch, rows, rows), memory.estimate.dtype)
        attend = partial(attend_cached, memory.cache, self.heads, grouped(mask, self.heads))
        x = self.fuse(self.embed(kept.tokens), self.project(kept.features), memory.global_feature)
        out = self.layers_over(x, self.angles(memory.position[:, None] + steps, x.dtype), attend)
        memory.take_last(out, kept.counts)

    def candidates(
        self, memory: DraftMemory, shape: TreeShape, output: DraftOutput, growth: Growth | None = None
    ) -> Candidates:
        return expand_levels(memory.estimate[:, None], Expansions(self, memory, shape), shape, output, growth)


class Expansions:
    """Runs a head on one level of a tree after the other; the keys of the nodes stay provisional."""

    def __init__(self, head: PairHead, memory: DraftMemory, shape: TreeShape):
        self._head, self._memory = head, memory
        self._k, self._depth, self._level = shape.top_k, shape.depth, 0
        self.sees: torch.Tensor | None = None
        """(B, k, visible) mask of the level before; None: it has not begun."""

    def _begin(self) -> None:
        head, memory = self._head, self._memory
        batch, dtype = len(memory.position), memory.estimate.dtype
        memory.cache.reserve(self._k * self._depth)
        self.sees = memory.cache.committed_mask(dtype).expand(-1, self._k, -1)
        # all nodes of a level stand at one position
        positions = memory.position[:, None] + torch.arange(self._depth, device=memory.position.device)
        angles = (a.view(batch, self._depth, 1, *a.shape[1:]) for a in head.angles(positions, dtype))
        self._angles = list(zip(*(angle.unbind(1) for angle in angles), strict=True))

    def resume(self, level: int, sees: torch.Tensor | None) -> None:
        self._level = level
        self._begin()  # what the steps before have set on the host may be of another round
        if sees is not None:
            self.sees = sees

    def __call__(self, hidden: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        if self.sees is None:
            self._begin()
        head, cache, k = self._head, self._memory.cache, self._k
        cache.aim(self._level * k, (self._level + 1) * k)
        if parents is not None:  # a node sees what its parent sees, and itself
            self.sees = self.sees.gather(1, parents[..., None].expand(-1, -1, self.sees.shape[2]))
        self.sees = self.sees.scatter(2, cache.slots[..., None], 0)
        attend = partial(attend_cached, cache, head.heads, grouped(self.sees[:, None], head.heads))
        angles = [angle.expand(-1, k, -1, -1).flatten(0, 1) for angle in self._angles[self._level]]
        self._level += 1
        x = head.fuse(head.embed(tokens), hidden, self._memory.global_feature)
        return head.layers_over(x, angles, attend)
