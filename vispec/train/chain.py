"""The draft head run on its own outputs: as training sees it, and as drafting does.

Shapes: B rows, L tokens, H hidden size, R pairs after compression, S scored pairs.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from vispec.model.drafts import DraftHead
from vispec.model.pairs import PairLayout, Span

SCORES = 2**24
"""Attention scores held at a time where drafts are followed: a long sample has rows x rows of them for every head."""


def draft_chain(
    head: DraftHead,
    hidden: torch.Tensor,
    embeds: torch.Tensor,
    images: list[list[Span]],
    lengths: list[int],
    steps: int = 0,
    layout: PairLayout | None = None,
) -> list[torch.Tensor]:
    """Outputs of multi-token prediction (paper, section 3.4): step m+1 reads the outputs of step m as features.

    Output i estimates feature i+1, so it takes its place there; feature 0 stays the target's, and so does that of an
    image's last row where no compressed vector comes before it, as it does when drafting begins there. Gradients flow
    through the whole chain. That keeps the head from copying the target's features: it must live with its own.

    Args:
        hidden, embeds: (B, L, H).
        images: token spans of the images of each row.
        lengths: tokens of each row.
        steps: how often the outputs are fed back.
        layout: see `PairHead.forward`.

    Returns:
        steps + 1 outputs (B, L, H); pair i joins feature i with the embedding of token i+1, zeros after the last token.
    """
    next_embeds = shift_left(embeds, lengths)
    outs = [head(hidden, embeds, next_embeds, images, lengths, layout=layout)]
    given = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    given[:, 0] = True
    if head.compressed_per_image == 0:
        for row, spans in enumerate(images):
            given[row, [end - 1 for _, end in spans]] = True
    for _ in range(steps):
        own = F.pad(outs[-1][:, :-1], (0, 0, 1, 0))
        features = torch.where(given[..., None], hidden.to(own.dtype), own)
        outs.append(head(features, embeds, next_embeds, images, lengths, layout=layout))
    return outs


def shift_left(embeds: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """(B, L, H) embeddings of the tokens after each; zeros where there is none."""
    shifted = F.pad(embeds[:, 1:], (0, 0, 0, 1))
    last = torch.tensor(lengths, device=embeds.device) - 1
    return shifted.index_put((torch.arange(len(lengths), device=embeds.device), last), embeds.new_zeros(()))


def drafted_in_a_row(
    head: DraftHead,
    hidden: torch.Tensor,
    embeds: torch.Tensor,
    images: list[list[Span]],
    lengths: list[int],
    depth: int,
    layout: PairLayout | None = None,
) -> Iterator[torch.Tensor]:
    """What the head would draft from every pair at once, along the given tokens.

    A draft of m tokens that ends at pair p reads the target's features up to pair p-m+1 and its own after that. All
    starts share the keys of the first pass, so pass m needs the keys of passes 2 … m at one pair each: the attention is
    one masked matrix and m-1 single columns.

    Yields:
        `depth` outputs (B, L, H): the m-th one at pair p is that of a draft whose m-th token is predicted by pair p.
    """
    if len(head.layers) != 1:
        raise ValueError(f"drafts of a head of {len(head.layers)} layers cannot be followed; expected 1")
    heads = head.heads
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []

    def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
        qkv = qkv.view(len(hidden), -1, heads.all, heads.size).transpose(1, 2)
        q, k, v = qkv.split([heads.queries, heads.keys, heads.keys], dim=1)
        keys.append(k.repeat_interleave(heads.queries // heads.keys, 1))
        values.append(v.repeat_interleave(heads.queries // heads.keys, 1))
        return _attend(q, keys, values, heads.scale).transpose(1, 2).reshape(len(hidden) * q.shape[2], -1)

    next_embeds, features = shift_left(embeds, lengths), hidden
    for _ in range(depth):
        out = head(features, embeds, next_embeds, images, lengths, attend, layout)
        yield out
        features = F.pad(out[:, :-1], (0, 0, 1, 0))


def _attend(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], scale: float) -> torch.Tensor:
    """Attention of the last of m passes, some queries at a time: all (B, heads, R, head_dim), one key a pass.

    A query sees what the first pass has made of the pairs at least m-1 before it, and of each later pass one pair.
    """
    behind = len(keys) - 1
    own = [(_delay(keys[s], behind - s), _delay(values[s], behind - s)) for s in range(1, len(keys))]
    rows = q.shape[2]
    size = max(SCORES // (q.shape[0] * q.shape[1] * rows), 1)
    places = torch.arange(rows, device=q.device)
    mixed = torch.empty_like(q)
    for start in range(0, rows, size):
        end = min(start + size, rows)
        query = q[:, :, start:end]
        unseen = places[start:end, None] - places[:end] < behind
        scores = (query @ keys[0][:, :, :end].transpose(2, 3)).masked_fill(unseen, -torch.inf)
        columns = [(query * key[:, :, start:end]).sum(-1, keepdim=True) for key, _ in own]
        weights = (torch.cat([scores, *columns], dim=-1).float() * scale).softmax(-1)
        weights = weights.nan_to_num().to(q.dtype)
        mixed[:, :, start:end] = weights[..., :end] @ values[0][:, :, :end]
        for column, (_, value) in enumerate(own, end):
            mixed[:, :, start:end] += weights[..., column, None] * value[:, :, start:end]
    return mixed


def _delay(x: torch.Tensor, pairs: int) -> torch.Tensor:
    """(B, heads, R, head_dim) moved `pairs` rows to the right."""
    return F.pad(x[:, :, : x.shape[2] - pairs], (0, 0, pairs, 0)) if pairs else x


def count_in_a_row(right: torch.Tensor, along: torch.Tensor, scored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many drafts have their first m tokens right, m = 1 … depth, and how many drafts there are.

    Args:
        right: (depth, B, L) bool, the m-th token of the draft that pair p ends is the target's choice.
        along: (B, L) bool, the target's choice at pair p is the token that follows in the data: only then does a draft
            go on as the data does.
        scored: (B, L) bool.

    Returns:
        (depth,) right and (depth,) all, int64.
    """
    so_far = valid = torch.ones_like(scored)
    hits, counts = [], []
    for step in right:
        valid = valid & scored
        so_far = so_far & step & valid
        hits.append(so_far.sum())
        counts.append(valid.sum())
        valid = F.pad((valid & along)[:, :-1], (1, 0))
        so_far = F.pad(so_far[:, :-1], (1, 0))
    return torch.stack(hits), torch.stack(counts)
