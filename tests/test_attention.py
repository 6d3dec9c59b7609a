"""Attention that reads the cache in place says what transformers' own says, and only in passes of tree decoding."""

import threading

import pytest
import torch
from tiny_models import random_target
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vispec.model.attention import attention, packed_mask
from vispec.model.passes import decoding_pass
from vispec.model.target import Target


class Heads(torch.nn.Module):
    """What an attention function asks of its layer."""

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


@pytest.mark.parametrize("groups", (1, 3))
@pytest.mark.parametrize("rows", (1, 5))
@torch.inference_mode()
def test_a_tree_pass_over_part_of_a_buffer_equals_stock_attention(groups, rows):
    generator = torch.Generator().manual_seed(groups * rows)
    query = torch.randn(2, rows, 2 * groups, 8, generator=generator).transpose(1, 2)
    key, value = (torch.randn(2, 2, 40, 8, generator=generator)[:, :, :23] for _ in range(2))
    hidden = torch.rand(2, 1, rows, 23, generator=generator) < 0.5
    hidden[..., 0] = False
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    layer = Heads(groups)
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, value, mask, scaling=0.3)
    with decoding_pass():
        found, _ = attention(layer, query, key, value, packed_mask(mask, groups), scaling=0.3)
    assert found.shape == expected.shape == (2, rows, 2 * groups, 8)
    torch.testing.assert_close(found, expected)
    if rows == 1:
        expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, value, None, scaling=0.3)
        with decoding_pass():
            found, _ = attention(layer, query, key, value, None, scaling=0.3)
        torch.testing.assert_close(found, expected)


@torch.inference_mode()
def test_other_passes_meet_stock_attention_also_while_another_thread_decodes():
    layer, generator = Heads(2), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, value, None)
    found = {}

    @torch.inference_mode()
    def elsewhere():
        found["thread"], _ = attention(layer, query, key, value, None)

    with decoding_pass():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    found["after"], _ = attention(layer, query, key, value, None)
    assert all(torch.equal(output, expected) for output in found.values())


@pytest.mark.parametrize("family", ("llava_next", "qwen2_5_vl"))
def test_a_model_says_bit_for_bit_the_same_to_others_after_it_became_a_target(family):
    model = random_target(family, seed=3)
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        Target(model)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_others_still_get_attention_weights():
    model = random_target("llava_next", seed=3)
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        before = model(input_ids=ids, output_attentions=True).attentions
        Target(model)
        after = model(input_ids=ids, output_attentions=True).attentions
    assert len(before) == len(after)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_eager_targets_keep_their_attention():
    model = random_target("llava_next", seed=3, attention="eager")
    configs = [layer.self_attn.config for layer in Target(model).decoder.layers]
    assert {config._attn_implementation for config in configs} == {"eager"}
