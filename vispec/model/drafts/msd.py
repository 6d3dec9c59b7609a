"""MSD's draft head (Lin et al., arXiv 2505.14260): EAGLE-2's, in which image rows bypass fc.

Where token i+1 is a row of an image, the layer reads its embedding as it is and the feature of token i is left out;
everywhere else it reads fc([embedding of token i+1; feature of token i]). So all rows of an image stay, each one place
before its own, and the pair of an image's last feature is one of text. The rest is EAGLE-2; in heads for Qwen2-VL the
layer has an input norm and biases.

What is published: code and weights for LLaVA-1.5 and Qwen2-VL (Lyn-Lucy/MSD@fd76a5ee, whose recordings this repeats).
Their files have EAGLE-2's names, so without an input norm only the method that is asked for, or the key `method` that
our training writes (ours), tells them apart. Their code reads one image of a prompt; here all of them are read, and the
frames of videos (ours). It runs Qwen2-VL with plain positions in target and head: the target here has its own M-RoPE,
and the head keeps its plain ones.
"""

from dataclasses import replace

import torch

from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.eagle2 import DraftHead
from vispec.model.pairs import PairLayout, Span, plan_pairs


class MSDHead(DraftHead):
    """MSD's head. Parameter names are those of the published checkpoints.

    Args:
        input_norm: of the layer; None: where there are biases of q, k and v, as in heads for Qwen2-VL.
    """

    method = "msd"
    reads_image_features = False

    def __init__(self, config: DraftConfig, input_norm: bool | None = None):
        # configs for Qwen2-VL ask for M-RoPE, but of three equal rows of positions, which is the plain embedding
        super().__init__(replace(config, rope_scaling=None), config.qkv_bias if input_norm is None else input_norm)
        self.config = self.new_config(config)

    @classmethod
    def new_config(cls, config: DraftConfig) -> DraftConfig:
        """One that says whose head it is, which its tensors do not tell."""
        return replace(config, extra={**config.extra, "method": cls.method})

    def plan(self, lengths: list[int], images: list[list[Span]]) -> PairLayout:
        return plan_pairs(lengths, images, compressed=None)

    def join(self, layout, hidden, embeds, next_embeds):
        text, none = super().join(layout, hidden, embeds, next_embeds)
        return torch.where((layout.compressed >= 0)[..., None], next_embeds, text), none
