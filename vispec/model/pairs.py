"""Which pairs a draft head runs on, and where images go.

A sequence of L tokens has L pairs; pair i joins the feature of token i with the embedding of token i+1, so an image
that spans the tokens [start, end) covers the pairs [start-1, end-1). ViSpec replaces each image by `compressed` vectors
that take the last positions of its run; everything else keeps its own position (paper, section 3.2).
"""

from dataclasses import dataclass, replace

import torch

Span = tuple[int, int]
"""Tokens [start, end) of one image."""


@dataclass
class PairLayout:
    """The shortened draft sequences of a batch, right-padded to R pairs.

    Attributes:
        positions: (B, R) original position of each pair; 0 in the padding.
        valid: (B, R) bool, False in the padding.
        lengths: (B,) pairs of each row.
        compressed: (B, R) index of the compressed vector that is the pair's input, counting over all images of the
            batch; -1 for text pairs. Where nothing is compressed, 0 for the pairs of images' rows.
        image_before: (B, R) index of the last image that ended before token i+1, counting likewise; -1 for none.
        last_image: (B,) index of each row's last image; -1 for none.
        images: (row, span) of all images of the batch, in the order of these indices.
    """

    positions: torch.Tensor
    valid: torch.Tensor
    lengths: torch.Tensor
    compressed: torch.Tensor
    image_before: torch.Tensor
    last_image: torch.Tensor
    images: list[tuple[int, Span]]

    def to(self, device: torch.device) -> "PairLayout":
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)

    def with_images(self, text: torch.Tensor, compressed: torch.Tensor) -> torch.Tensor:
        """Layer inputs (B, R, H): those of text pairs, and compressed vectors (M, H) where these stand for images."""
        vectors = torch.cat([compressed.new_zeros(1, compressed.shape[1]), compressed])
        return torch.where((self.compressed >= 0)[..., None], vectors[self.compressed + 1], text)


def plan_pairs(lengths: list[int], images: list[list[Span]], compressed: int | list[list[int]] | None) -> PairLayout:
    """Lay out the pairs of a batch.

    Args:
        lengths: tokens of each row.
        images: token spans of each row's images, ascending and disjoint; spans may touch.
        compressed: vectors that replace each image, or each image of each row. An image shorter than that puts the
            surplus at its first position. None: all rows of an image stay.
    """
    rows, vectors = [], 0
    all_images: list[tuple[int, Span]] = []
    for row, (length, spans) in enumerate(zip(lengths, images, strict=True)):
        pieces = []
        text_from, before = 0, -1
        for number, (start, end) in enumerate(spans):
            count = compressed[row][number] if isinstance(compressed, list) else compressed or 0
            index = len(all_images)
            all_images.append((row, (start, end)))
            first, stop = max(start - 1, 0), end - 1
            pieces.append(_text(text_from, first, before))
            if stop > first and compressed is None:
                places = torch.arange(first, stop)
                pieces.append(torch.stack([places, torch.zeros_like(places), torch.full_like(places, before)]))
            elif stop > first:
                places = torch.arange(stop - count, stop).clamp(min=first)
                numbers = torch.arange(vectors, vectors + count)
                pieces.append(torch.stack([places, numbers, torch.full_like(places, before)]))
            text_from, before, vectors = stop, index, vectors + count
        pieces.append(_text(text_from, length, before))
        rows.append((torch.cat(pieces, dim=1), before))

    longest = max(piece.shape[1] for piece, _ in rows)
    table = torch.full((3, len(rows), longest), -1)
    for row, (piece, _) in enumerate(rows):
        table[:, row, : piece.shape[1]] = piece
    kept = torch.tensor([piece.shape[1] for piece, _ in rows])
    return PairLayout(
        positions=table[0].clamp(min=0),
        valid=table[0] >= 0,
        lengths=kept,
        compressed=table[1],
        image_before=table[2],
        last_image=torch.tensor([before for _, before in rows]),
        images=all_images,
    )


def _text(start: int, end: int, image_before: int) -> torch.Tensor:
    """Columns (position, no compressed vector, image) of the text pairs [start, end)."""
    positions = torch.arange(start, max(start, end))
    return torch.stack([positions, torch.full_like(positions, -1), torch.full_like(positions, image_before)])
