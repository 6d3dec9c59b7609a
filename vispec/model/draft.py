"""The draft heads: EAGLE-2 and ViSpec.

A draft head is one Llama-style decoder layer over pairs. Pair i joins the target's feature of token i with the
embedding of token i+1; the output at pair i estimates the feature of token i+1, and the target's own output head turns
it into the logits of token i+2. ViSpec adds two things (paper, section 3): a small attention, the vision adaptor,
compresses an image to a few vectors; one more, g, the image's global feature, is mixed into each text pair after it.

Shapes: B rows, L tokens, H hidden size, R pairs of one pass, k nodes of one tree level.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from vispec.model.cache import TreeCache
from vispec.model.draft_config import DraftConfig
from vispec.model.draft_layer import DraftLayer, VisionAdaptor, rotary_angles
from vispec.model.draft_vocab import DraftVocabulary
from vispec.model.hub import HubMixin
from vispec.model.pairs import PairLayout, Span, plan_pairs
from vispec.model.passes import decoding_pass
from vispec.model.rows import Rows
from vispec.model.tree import Candidates, Tree, TreeShape, grow_candidates, grow_tree

if TYPE_CHECKING:
    from vispec.model.target import Prompt


@dataclass
class DraftState(Rows):
    """What a draft head remembers between the rounds of one generation."""

    cache: TreeCache
    position: torch.Tensor
    """(B,) position of the next pair, which is the number of committed tokens without the root."""
    hidden: torch.Tensor
    """(B, H) the head's output at the last committed pair: its estimate of the root's feature."""
    global_feature: torch.Tensor | None = None
    """(B, H) g of the last image, zeros without an image; None for EAGLE-2."""

    @property
    def estimates(self) -> torch.Tensor:
        """(B, 1, H) what a tree starts from: one level's estimate, the next ones take a pass of the head each."""
        return self.hidden[:, None]

    @property
    def used(self) -> int:
        """Host-side upper bound of the committed pairs of any row."""
        return self.cache.used

    @used.setter
    def used(self, bound: int) -> None:
        self.cache.used = bound


class BaseHead(HubMixin, nn.Module):
    """What all draft heads share: their config and the frozen copy of the target's embedding table."""

    method: str
    fixed_depth: int | None = None
    """Expansions of the head's trees where it allows one depth only; None: as many as are asked for."""
    draft_vocab: DraftVocabulary | None = None
    """The tokens that the head may propose; None: all."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.weight.requires_grad_(False)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(tokens)

    # --- what the decoding loop asks of any draft, beside `extend` ---

    def fit(self, shape: TreeShape) -> TreeShape:
        """The largest tree not above this one that the head can fill."""
        vocabulary = self.config.vocab_size if self.draft_vocab is None else len(self.draft_vocab)
        return shape.fitted(vocabulary, self.fixed_depth)

    def reach(self, shape: TreeShape) -> int:
        """Slots that a round needs behind what was read before it: for the kept path and the expansions of a tree."""
        return shape.levels + 1 + shape.depth * shape.top_k

    def held(self, length: int, images: list[Span]) -> int:
        """How many places a prompt of one row takes in what the head remembers; `images` are its token spans."""
        return length

    def start(self, prompt: "Prompt", root: torch.Tensor, capacity: int):
        """What the head remembers of a prompt that the target has read; `root` (B,) is the first new token.

        `capacity` is how many places there must be for the prompt, see `held`, and for what comes after it.
        """
        return self.begin(prompt.hidden, prompt.embeds, root, prompt.images, capacity)

    def grow(
        self, state, root: torch.Tensor, shape: TreeShape, lm_head: Callable, token_ids: torch.Tensor | None = None
    ) -> Tree:
        """The tree under the last committed pair, see `grow_tree`."""
        return grow_tree(self, state, root, shape, lm_head, token_ids)

    def candidates(
        self, state, root: torch.Tensor, shape: TreeShape, lm_head: Callable, token_ids: torch.Tensor | None = None
    ) -> Candidates:
        """What the nodes of that tree are chosen from."""
        return grow_candidates(self, state, root, shape, lm_head, token_ids)


class DraftHead(BaseHead):
    """The EAGLE-2 head, and the base of ViSpec's. Parameter names are those of the published checkpoints."""

    method = "eagle2"
    compressed_per_image: int | None = None
    """Vectors that stand for one image in the draft sequence; None keeps every image row as an ordinary pair."""

    def __init__(self, config: DraftConfig):
        super().__init__(config)
        size = config.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=config.bias)
        self.layers = nn.ModuleList([DraftLayer(config) for _ in range(config.num_hidden_layers)])

    # --- over whole sequences: training and prefill ---

    def plan(self, lengths: list[int], images: list[list[Span]]) -> PairLayout:
        """Which pairs the head runs on; `images` are the token spans of each row's images."""
        return plan_pairs(lengths, [[] for _ in lengths], compressed=0)

    def held(self, length: int, images: list[Span]) -> int:
        return int(self.plan([length], [images]).lengths)

    def forward(
        self,
        hidden: torch.Tensor,
        embeds: torch.Tensor,
        next_embeds: torch.Tensor,
        images: list[list[Span]],
        lengths: list[int] | None = None,
    ) -> torch.Tensor:
        """Outputs for all pairs of a batch of sequences, at their original positions.

        Args:
            hidden: (B, L, H) features, the target's or the head's own.
            embeds: (B, L, H) embeddings of tokens 0 … L-1, image rows from the vision tower.
            next_embeds: (B, L, H) embeddings of tokens 1 … L.
            images: token spans of the images of each row.
            lengths: tokens of each right-padded row; all L when None.

        Returns:
            (B, L, H), zeros at pairs that the head does not run on.
        """
        layout = self.plan(lengths or [hidden.shape[1]] * hidden.shape[0], images).to(hidden.device)
        out, _ = self._run(layout, hidden, embeds, next_embeds, cache=None)
        index = layout.positions[..., None].expand_as(out)
        # surplus columns of short rows must not overwrite pair 0: they are sent to a row that is cut off again
        index = index.masked_fill(~layout.valid[..., None], hidden.shape[1])
        scattered = out.new_zeros(out.shape[0], hidden.shape[1] + 1, out.shape[2]).scatter(1, index, out)
        return scattered[:, :-1]

    def begin(
        self,
        hidden: torch.Tensor,
        embeds: torch.Tensor,
        root: torch.Tensor,
        images: list[list[Span]],
        capacity: int | None = None,
    ) -> DraftState:
        """Read the prompt: `hidden`, `embeds` (B, L, H) of the target's pass over it, `root` (B,) the first new one."""
        batch, length, _ = hidden.shape
        next_embeds = torch.cat([embeds[:, 1:], self.embed(root)[:, None]], dim=1)
        layout = self.plan([length] * batch, images).to(hidden.device)
        kept = layout.positions.shape[1]
        cache = TreeCache([hidden.device] * len(self.layers), batch, capacity or kept + 256)
        cache.reserve(kept)
        out, global_feature = self._run(layout, hidden, embeds, next_embeds, cache)
        cache.commit(layout.lengths)
        last = out.gather(1, (layout.lengths - 1)[:, None, None].expand(-1, 1, out.shape[2]))[:, 0]
        position = torch.full_like(layout.lengths, length)
        return DraftState(cache, position, last, global_feature)

    def _run(self, layout, hidden, embeds, next_embeds, cache):
        """The layer over the pairs of `layout`: outputs (B, R, H) and the last global feature (B, H) or None."""
        index = layout.positions[..., None].expand(-1, -1, hidden.shape[2])
        x, global_feature = self._inputs(layout, hidden.gather(1, index), embeds, next_embeds.gather(1, index))
        # with padding on the right, causality alone keeps real pairs from seeing padded ones
        return self._layers(x, layout.positions, mask=None, cache=cache), global_feature

    def _inputs(self, layout, hidden, embeds, next_embeds):
        return self.fuse(next_embeds, hidden), None

    # --- inside the decoding loop ---

    @decoding_pass()
    def extend(self, state: DraftState, hidden: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Commit the pairs of a verified path, with the target's features.

        Args:
            state: changed in place; afterwards `state.hidden` is the output at the last committed pair.
            hidden: (B, R, H) the target's features of the root and the kept nodes; surplus rows are ignored.
            tokens: (B, R) the token after each of them.
            counts: (B,) how many of the R pairs are real in each row.
        """
        batch, rows = tokens.shape
        state.cache.reserve(rows)
        steps = torch.arange(rows, device=tokens.device)
        mask = state.cache.mask((steps[:, None] >= steps).expand(batch, rows, rows), hidden.dtype)
        x = self.fuse(self.embed(tokens), hidden, state.global_feature)
        out = self._layers(x, state.position[:, None] + steps, mask, state.cache)
        state.hidden.copy_(out.gather(1, (counts - 1)[:, None, None].expand(-1, 1, out.shape[2]))[:, 0])
        state.cache.commit(counts)
        state.position += counts

    @decoding_pass()
    def expand(
        self, state: DraftState, level: int, hidden: torch.Tensor, tokens: torch.Tensor, ancestors: torch.Tensor
    ) -> torch.Tensor:
        """Run the k nodes of one tree level (level 1 is the first); their keys stay provisional.

        Args:
            hidden: (B, k, H) the head's outputs at the nodes' parents.
            tokens: (B, k) the nodes' tokens.
            ancestors: (B, k, level * k) bool, which of the drafted nodes so far each node sees, itself included.

        Returns:
            (B, k, H) outputs: estimates of the nodes' features.
        """
        k = tokens.shape[1]
        state.cache.reserve(k, offset=(level - 1) * k)
        mask = state.cache.mask(ancestors, hidden.dtype)
        positions = (state.position + level - 1)[:, None].expand(-1, k)
        x = self.fuse(self.embed(tokens), hidden, state.global_feature)
        return self._layers(x, positions, mask, state.cache)

    def fuse(
        self, next_embeds: torch.Tensor, hidden: torch.Tensor, global_feature: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Layer input of text pairs, (B, R, H): fc([embedding of token i+1; feature of token i])."""
        return self.fc(torch.cat([next_embeds, hidden], dim=-1))

    def _layers(self, x, positions, mask, cache):
        rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, mask, cache)
        return x


class ViSpecHead(DraftHead):
    """The EAGLE-2 head with the vision adaptor and the global image feature (paper, sections 3.2 and 3.3)."""

    method = "vispec"

    def __init__(self, config: DraftConfig, num_q: int = 2):
        super().__init__(config)
        self.num_q = num_q
        self.compressed_per_image = num_q - 1
        self.imadpt = VisionAdaptor(config, num_q)
        self.img_fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.bias)

    def reset_image_parameters(self) -> None:
        """Start values of training: the adaptor's are random, img_fc is [I | 0], so that at first g is ignored."""
        size = self.config.hidden_size
        self.imadpt.reset_parameters()
        with torch.no_grad():
            self.img_fc.weight.zero_()
            self.img_fc.weight[:, :size] = torch.eye(size, dtype=self.img_fc.weight.dtype)
            if self.img_fc.bias is not None:
                self.img_fc.bias.zero_()

    def blind(self) -> None:
        """Hold the adaptor's output at zero, also in training: the head never sees an image. For comparisons."""
        with torch.no_grad():
            self.imadpt.o_proj.weight.zero_()
        self.imadpt.o_proj.weight.requires_grad_(False)

    def plan(self, lengths: list[int], images: list[list[Span]]) -> PairLayout:
        return plan_pairs(lengths, images, compressed=self.compressed_per_image)

    def fuse(self, next_embeds, hidden, global_feature=None):
        """fc([embedding ; img_fc([feature ; g])]); g is (B, H) for all pairs of a row, or (B, R, H)."""
        if global_feature.dim() == 2:
            global_feature = global_feature[:, None].expand_as(hidden)
        return super().fuse(next_embeds, self.img_fc(torch.cat([hidden, global_feature], dim=-1)))

    def _inputs(self, layout, hidden, embeds, next_embeds):
        size = hidden.shape[2]
        none = hidden.new_zeros(1, size)  # row 0 stands for "no image"
        adapted = [self.imadpt(embeds[row, start:end]) for row, (start, end) in layout.images]
        if not adapted:
            return self.fuse(next_embeds, hidden, torch.zeros_like(hidden)), hidden.new_zeros(len(hidden), size)
        adapted = torch.stack(adapted)
        compressed = torch.cat([none, adapted[:, :-1].reshape(-1, size)])
        features = torch.cat([none, adapted[:, -1]])
        text = self.fuse(next_embeds, hidden, features[layout.image_before + 1])
        x = torch.where((layout.compressed >= 0)[..., None], compressed[layout.compressed + 1], text)
        return x, features[layout.last_image + 1]
