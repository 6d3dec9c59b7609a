"""ViSpec's draft head: EAGLE-2's with eyes (paper, sections 3.2 and 3.3).

A small attention, the vision adaptor, compresses an image to a few vectors, which stand for it in the draft sequence;
one more, g, the image's global feature, is mixed into each text pair after it.

Heads trained by NeMo AutoModel have two norms more: the layer's input norm, and a final one. Whether the final norm's
output is fed back is not published: it stands before the target's output head only (ours). So are plain positions.

Shapes: B rows, R pairs of one pass, H hidden size.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.eagle2 import DraftHead
from vispec.model.pairs import PairLayout, Span, plan_pairs
from vispec.model.target import Target
from vispec.model.tree import DraftOutput


class VisionAdaptor(nn.Module):
    """Attention of num_q learned queries over the rows of one image (paper, section 3.2)."""

    def __init__(self, config: DraftConfig, num_q: int):
        super().__init__()
        self.heads = config.num_attention_heads
        self.head_dim = config.head_dim
        size = config.hidden_size
        self.q = nn.Parameter(torch.empty(num_q, self.heads, self.head_dim))
        self.k_proj = nn.Linear(size, self.heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, self.heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, size, bias=False)
        nn.init.normal_(self.q, std=self.head_dim**-0.5)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.q, std=self.head_dim**-0.5)
        for projection in (self.k_proj, self.v_proj, self.o_proj):
            projection.reset_parameters()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image rows (n, H) -> (num_q, H): the compressed image, then its global feature in the last row."""
        k = self.k_proj(image).view(-1, self.heads, self.head_dim).transpose(0, 1)
        v = self.v_proj(image).view(-1, self.heads, self.head_dim).transpose(0, 1)
        out = F.scaled_dot_product_attention(self.q.transpose(0, 1)[None], k[None], v[None])[0]
        return self.o_proj(out.transpose(0, 1).flatten(1))


class ViSpecHead(DraftHead):
    """The EAGLE-2 head with the vision adaptor and the global image feature (paper, sections 3.2 and 3.3).

    Args:
        num_q: queries of the adaptor.
        norms: the two of NeMo AutoModel's heads.
    """

    method = "vispec"
    reads_image_features = False

    def __init__(self, config: DraftConfig, num_q: int = 2, norms: bool = False):
        super().__init__(config, norms)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if norms else None
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

    def beside_layers(self) -> list[nn.Module]:
        return [self.fc, self.img_fc]

    def output(self, target: Target) -> DraftOutput:
        found = super().output(target)
        return found if self.norm is None else found._replace(logits=lambda hidden: found.logits(self.norm(hidden)))

    def plan(self, lengths: list[int], images: list[list[Span]]) -> PairLayout:
        return plan_pairs(lengths, images, compressed=self.compressed_per_image)

    def fuse(self, next_embeds, hidden, global_feature=None):
        """fc([embedding ; img_fc([feature ; g])]); g is (B, H) for all pairs of a row, or (B, R, H)."""
        if global_feature.dim() == 2:
            global_feature = global_feature[:, None].expand_as(hidden)
        return super().fuse(next_embeds, self.linear(self.img_fc, torch.cat([hidden, global_feature], dim=-1)))

    def join(self, layout, hidden, embeds, next_embeds):
        size = hidden.shape[2]
        none = hidden.new_zeros(1, size)  # row 0 stands for "no image"
        adapted = [self.imadpt(embeds[row, start:end]) for row, (start, end) in layout.images]
        if not adapted:
            return self.fuse(next_embeds, hidden, torch.zeros_like(hidden)), hidden.new_zeros(len(hidden), size)
        adapted = torch.stack(adapted)
        features = torch.cat([none, adapted[:, -1]])
        text = self.fuse(next_embeds, hidden, features[layout.image_before + 1])
        compressed = adapted[:, :-1].reshape(-1, size).to(hidden.dtype)  # also where autocast makes them narrower
        return layout.with_images(text, compressed), features[layout.last_image + 1]
