"""What draft heads are made of: their decoder layer, the vision adaptor and the rotary embedding.

Shapes: B rows, R pairs of one pass, H hidden size.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from vispec.model.draft_config import DraftConfig
from vispec.model.packing import Joined


class DraftLayer(nn.Module):
    """A Llama decoder layer without the input norm."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.mlp = DraftMLP(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, rotary, mask, cache):
        x = x + self.self_attn(x, rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftAttention(nn.Module):
    def __init__(self, config: DraftConfig):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        size, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, size, bias=False)
        self._joined = Joined()

    def forward(self, x, rotary, mask, cache):
        """(B, R, H) -> (B, R, H); causal over the R pairs when there is no mask."""
        batch, rows, _ = x.shape
        q, k, v = self._joined(x, self.q_proj, self.k_proj, self.v_proj)
        v = v.view(batch, rows, self.kv_heads, self.head_dim).transpose(1, 2)
        qk = torch.cat([q, k], dim=-1).view(batch, rows, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(qk, rotary).split([self.heads, self.kv_heads], dim=1)
        if cache is not None:
            k, v = cache.update(k, v, 0)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, rows, -1))


class DraftMLP(nn.Module):
    def __init__(self, config: DraftConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self._joined = Joined()

    def forward(self, x):
        gate, up = self._joined(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


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


def rotary_angles(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (B, 1, R, head_dim) of the plain 1-D rotary embedding for positions (B, R)."""
    angles = (positions[..., None].float() * rotary_frequencies(head_dim, theta, positions.device))[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache
def rotary_frequencies(head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """(head_dim,) radians that a place of each half turns by from one position to the next."""
    with torch.inference_mode(False):  # training may meet the same tensor
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        return (1.0 / theta**exponents).repeat(2)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the halves of x (B, heads, R, head_dim)."""
    cos, sin = rotary
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, torch.cat([-x[..., half:], x[..., :half]], dim=-1), sin)
