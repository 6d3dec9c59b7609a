"""A prompt that the target has read."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vispec.model.pairs import Span


@dataclass
class Prompt:
    """What the target's pass over a prompt leaves behind. B rows, L tokens, H hidden size, V vocabulary."""

    input_ids: torch.Tensor
    """(B, L) the prompt itself."""
    inputs: Mapping
    """What else the processor returned: pixels, sizes, grids."""
    hidden: torch.Tensor
    """(B, L, H) features: last hidden states after the final norm."""
    embeds: torch.Tensor
    """(B, L, H) merged input embeddings."""
    logits: torch.Tensor
    """(B, V) of the last position."""
    images: list[list[Span]]
    """Token spans of each row's images, and of the frames of its videos."""
    rope_delta: torch.Tensor | None
    """(B, 1) what is added to positions after the prompt: M-RoPE's delta, 1 where a family counts from 1; None: 0."""
    features: torch.Tensor
    """(B, L, F) what a draft reads: `hidden`, or what goes into the layers that were asked for, side by side."""
    positions: torch.Tensor | None
    """(axes, B, L) of M-RoPE; None where the decoder was given one number for each token, or none."""
    reused: int = 0
    """First tokens that were not read again: their keys had been kept."""
