"""Attention of the target's passes over new tokens, without copies of keys and values.

transformers' own sdpa attention makes keys and values contiguous, and repeats them for the query heads that share a
key head, in every layer of every pass. A step of decoding reads few queries and many keys, so these copies cost more
than the attention itself. Here the queries that share a key head become further rows of that head, and the kernel reads
the cache where it lies.

Only passes of decoding are changed, and their mask is None or one of `packed_mask`.
"""

import copy
import sys

import torch
import torch.nn.functional as F
import transformers
from packaging import version
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vispec.model.passes import in_decoding_pass

NAME = "vispec_sdpa"
FALLS_BACK = version.parse(transformers.__version__).major < 5
"""Whether layers with sdpa, which has no attention weights, compute otherwise when they are asked for them."""


def adopt(layers: nn.ModuleList) -> int | None:
    """Let the attention of decoder layers tell passes of decoding from others.

    Returns:
        The number of query heads G that share a key head; None where the layers keep their own attention: they do not
        ask transformers' table of attention functions, or do not use its sdpa.
    """
    attentions = [getattr(layer, "self_attn", None) for layer in layers]
    if not all(map(_asks_the_table, attentions)):
        return None
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    configs = {id(module.config): module.config for module in attentions}
    for key, config in configs.items():
        configs[key] = copy.copy(config)
        configs[key]._attn_implementation = NAME
    for module in attentions:
        module.config = configs[id(module.config)]
    return attentions[0].num_key_value_groups


def packed_mask(mask: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, 1, n, m) -> (B, 1, G n, m), for queries whose rows are heads of a group, then tokens."""
    return mask if groups == 1 else mask.repeat(1, 1, groups, 1)


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What transformers' table asks of an attention function: queries (B, heads, n, D), keys (B, key heads, m, D)."""
    if not in_decoding_pass():
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if kwargs.get("output_attentions") and FALLS_BACK:
            stock = sys.modules[type(module).__module__].eager_attention_forward
        return stock(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, heads, rows, width = query.shape
    packed = query.reshape(batch, key.shape[1], -1, width)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    # tokens first already, so that layers need not copy once more when they put the heads side by side
    out = out.unflatten(2, (-1, rows)).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, rows, heads, width), None


def _asks_the_table(module: nn.Module | None) -> bool:
    own = getattr(getattr(module, "config", None), "_attn_implementation", None)
    asks = hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
    return asks and own in ("sdpa", NAME) and hasattr(module, "num_key_value_groups")
