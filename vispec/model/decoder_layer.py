"""A decoder layer in some fifteen operations, whatever its weights are held by.

Almost every text decoder in use has layers of one kind: RMSNorm, q, k and v (with or without bias, with or without
norms of q and k), rotary embedding, grouped attention, o, RMSNorm, SwiGLU. `decoder_layer` computes one, for targets,
for draft heads that decode, and for draft heads that are trained.

B rows, n tokens of a pass, R = B n, H hidden size, T = query + key + value heads, D head size, m visible tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vispec.model.cache import TreeCache


class Norm(NamedTuple):
    """An RMSNorm."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class CpuNorm(NamedTuple):
    """The same without gradients, on a CPU, where PyTorch has no single operation for it: in the fewest that do it."""

    scaled: torch.Tensor
    """The weight times the square root of its size, in float32."""
    least: torch.Tensor
    """Square root of eps times size."""

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def of(cls, norm: Norm) -> "CpuNorm":
        size = norm.weight.numel()
        return cls(norm.weight.float() * size**0.5, torch.tensor((norm.eps * size) ** 0.5, device=norm.weight.device))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        normed = x / torch.hypot(length, self.least) * self.scaled
        return normed if x.dtype == torch.float32 else normed.to(x.dtype)


class LayerParts(NamedTuple):
    """What a layer computes with; products take (R, I) to (R, O)."""

    input_norm: Norm | None
    qkv: Callable | tuple
    q_norm: Norm | None
    k_norm: Norm | None
    o: Callable | tuple
    post_norm: Norm
    gate_up: Callable | tuple
    activation: Callable
    down: Callable | tuple
    hidden_norm: Norm | None
    """Of EAGLE-3, whose layer reads an embedding and a feature side by side; the feature alone goes on."""
    norm_before_residual: bool
    """What goes on is the feature after its norm."""


class Heads(NamedTuple):
    """The attention heads of a layer."""

    queries: int
    keys: int
    size: int
    scale: float

    @property
    def all(self) -> int:
        """Those of queries, keys and values."""
        return self.queries + 2 * self.keys


def decoder_layer(
    x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], parts: LayerParts, heads: Heads, attend: Callable
) -> torch.Tensor:
    """One layer over rows x (R, H), or (R, 2 H) where it has a `hidden_norm`: (R, H).

    Args:
        angles: see `widened`.
        attend: (R, T, D) rotated queries and keys, and values -> (R, query heads · D).
    """
    return after_attention(x, attend(before_attention(x, *angles, parts, heads)), parts)


def before_attention(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, parts: LayerParts, heads: Heads
) -> torch.Tensor:
    """(R, T, D) rotated queries and keys, and values."""
    if parts.hidden_norm is not None:
        embed, feature = x.chunk(2, dim=-1)
        normed = torch.cat([parts.input_norm(embed), parts.hidden_norm(feature)], dim=-1)
    else:
        normed = x if parts.input_norm is None else parts.input_norm(x)
    qkv = _times(parts.qkv, normed).view(len(x), heads.all, heads.size)
    if parts.q_norm is not None:
        q, k, v = qkv.split([heads.queries, heads.keys, heads.keys], dim=1)
        qkv = torch.cat([parts.q_norm(q), parts.k_norm(k), v], dim=1)
    return torch.addcmul(qkv * cos, qkv.roll(heads.size // 2, -1), sin)


def after_attention(x: torch.Tensor, attended: torch.Tensor, parts: LayerParts) -> torch.Tensor:
    if parts.hidden_norm is not None:
        x = x.chunk(2, dim=-1)[1]
        x = parts.hidden_norm(x) if parts.norm_before_residual else x
    x = x + _times(parts.o, attended)
    gate, up = _times(parts.gate_up, parts.post_norm(x)).chunk(2, dim=-1)
    return x + _times(parts.down, parts.activation(gate) * up)


def _times(product: Callable | tuple, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, *product) if isinstance(product, tuple) else product(x)


def widened(cos: torch.Tensor, sin: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary angles (R, D) for `before_attention`, which rotates all heads at once: (R, T, D).

    Values turn by nothing. Half of the sines change their sign, so that the two halves of a head need only swap places.
    """
    rows, size = cos.shape
    still = cos.new_zeros(2, rows, heads.keys, size)
    still[0].fill_(1)
    angles = torch.stack([cos, sin])
    angles[1, :, : size // 2].neg_()
    turned = angles[:, :, None].expand(-1, -1, heads.queries + heads.keys, -1)
    return torch.cat([turned, still], dim=2).unbind()


# --- attention ---


def attend_cached(
    cache: TreeCache, heads: Heads, mask: torch.Tensor | None, layer: int, qkv: torch.Tensor
) -> torch.Tensor:
    """Write keys and values to the cache, and read all that the pass sees: (R, T, D) -> (R, query heads · D).

    Query heads that share a key head become further rows of it, so keys and values are read where they lie.

    Args:
        mask: (B, 1, n, m), see `grouped`; None where nothing is hidden.
    """
    batch, groups, size = len(cache.lengths), heads.queries // heads.keys, heads.size
    rows = heads.all * size
    n = qkv.numel() // (batch * rows)
    # by strides, since each further view costs a CPU as much as a small operation
    first = qkv.storage_offset() + heads.queries * size
    kv = qkv.as_strided((2, batch, heads.keys, n, size), (heads.keys * size, n * rows, size, rows, 1), first)
    q = qkv.as_strided((batch, heads.keys, groups, n, size), (n * rows, groups * size, size, rows, 1))
    keys, values = cache.write(layer, kv)
    q = q.reshape(batch, heads.keys, groups * n, size)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=heads.scale)
    if n == 1:
        return out.view(batch, -1)
    return out.view(batch, heads.keys, groups, n, size).permute(0, 3, 1, 2, 4).reshape(batch * n, -1)


def grouped(mask: torch.Tensor | None, heads: Heads) -> torch.Tensor | None:
    """(B, 1, n, m) -> (B, 1, G n, m): the mask of `attend_cached`, whose rows are heads of a group, then tokens."""
    groups = heads.queries // heads.keys
    return mask if mask is None or groups == 1 else mask.repeat(1, 1, groups, 1)


def attend_causally(batch: int, heads: Heads, qkv: torch.Tensor) -> torch.Tensor:
    """Attention among the tokens of the pass alone, each to those before it: (R, T, D) -> (R, query heads · D)."""
    qkv = qkv.view(batch, -1, heads.all, heads.size).transpose(1, 2)
    q, k, v = qkv.split([heads.queries, heads.keys, heads.keys], dim=1)
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=heads.scale, enable_gqa=heads.queries != heads.keys
    )
    return out.transpose(1, 2).reshape(-1, heads.queries * heads.size)


# --- the parts of a layer ---


def module_parts(layer: nn.Module) -> LayerParts:
    """The parts of a layer that computes through its own modules, with gradients."""
    return parts_of(layer, lambda *layers: layers[0] if len(layers) == 1 else partial(_side_by_side, layers))


def _side_by_side(layers: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer(x) for layer in layers], dim=-1)


def parts_of(layer: nn.Module, product: Callable) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    activation = getattr(mlp, "act_fn", None)
    return LayerParts(
        norm_of(getattr(layer, "input_layernorm", None)),
        product(attention.q_proj, attention.k_proj, attention.v_proj),
        norm_of(getattr(attention, "q_norm", None)),
        norm_of(getattr(attention, "k_norm", None)),
        product(attention.o_proj),
        norm_of(layer.post_attention_layernorm),
        product(mlp.gate_proj, mlp.up_proj),
        F.silu if activation is None or "SiLU" in type(activation).__name__ else activation,
        product(mlp.down_proj),
        norm_of(getattr(layer, "hidden_norm", None)),
        getattr(layer, "norm_before_residual", False),
    )


def norm_of(module: nn.Module | None) -> Norm | None:
    if module is None:
        return None
    return Norm(module.weight, getattr(module, "variance_epsilon", None) or getattr(module, "eps", None))


def heads_of(attention: nn.Module) -> Heads:
    """The heads of an attention module, by the sizes of its matrices."""
    size = attention.head_dim
    scale = getattr(attention, "scaling", None) or size**-0.5
    return Heads(attention.q_proj.out_features // size, attention.k_proj.out_features // size, size, scale)
