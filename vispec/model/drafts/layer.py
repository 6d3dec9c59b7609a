"""What draft heads are made of: the weights of their decoder layer, and their rotary embedding.

Shapes: B rows, R pairs of one pass, H hidden size.
"""

from functools import lru_cache

import torch
from torch import nn

from vispec.model.drafts.config import DraftConfig


class DraftLayer(nn.Module):
    """The weights of a Llama decoder layer; `vispec.model.decoder_layer` computes it.

    Args:
        input_norm: the first layer of most heads has none.
        width: numbers that attention reads of a pair; None: H.
    """

    def __init__(self, config: DraftConfig, input_norm: bool = False, width: int | None = None):
        super().__init__()
        if input_norm:
            self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DraftAttention(config, width or config.hidden_size)
        self.mlp = DraftMLP(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DraftAttention(nn.Module):
    def __init__(self, config: DraftConfig, width: int):
        super().__init__()
        self.head_dim = config.head_dim
        bias = config.qkv_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)


class DraftMLP(nn.Module):
    def __init__(self, config: DraftConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


def rotary_angles(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (B R, head_dim) of the plain 1-D rotary embedding for positions (B, R)."""
    angles = positions.reshape(-1, 1).float() * rotary_frequencies(head_dim, theta, positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache
def rotary_frequencies(head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """(head_dim,) radians that a place of each half turns by from one position to the next."""
    with torch.inference_mode(False):  # training may meet the same tensor
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        return (1.0 / theta**exponents).repeat(2)
