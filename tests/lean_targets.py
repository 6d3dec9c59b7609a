"""Tiny random targets of every family that the lean pass takes, and ways to compare the two text decoders."""

import pytest
import torch
import transformers
from tiny_models import generate, random_head, random_target, randomize, text_prompt
from torch import nn
from transformers import AutoModelForImageTextToText, LlavaConfig, PreTrainedModel

from vispec import SpecModel
from vispec.model.target import Target

TEXT = {
    "vocab_size": 38, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 7, "projection_dim": 32,
}  # fmt: skip


def llava(model_type: str = "llama", seed: int = 0, attention: str = "sdpa", **text) -> PreTrainedModel:
    """LLaVA-1.5 around any text model; `text` changes its config."""
    tied = text.get("tie_word_embeddings", False)
    text = {**TEXT, "model_type": model_type} | text
    config = LlavaConfig(vision_config=CLIP, text_config=text, image_token_index=37, tie_word_embeddings=tied)
    return finished(config, seed, attention)


def finished(config, seed: int, attention: str = "sdpa") -> PreTrainedModel:
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    randomize(model, seed, 0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a name of BUILDERS; norms have weights of their own, so that none is taken for another."""
    model = BUILDERS[name](seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.weight.uniform_(0.5, 1.5, generator=generator)
    return model.to(dtype)


def _of_transformers(name: str):
    """A config class, which the installed transformers may not have."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def qwen3_vl(seed: int = 0) -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 7}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    config = _of_transformers("Qwen3VLConfig")(
        text_config={**TEXT, "rope_scaling": rope}, vision_config={**vision, "spatial_merge_size": 2},
        image_token_id=37, video_token_id=36, vision_start_token_id=35, vision_end_token_id=34,
    )  # fmt: skip
    return finished(config, seed)


def smolvlm(seed: int = 0) -> PreTrainedModel:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = _of_transformers("SmolVLMConfig")(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**vision, "image_size": 28, "patch_size": 7},
        scale_factor=2, image_token_id=37, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return finished(config, seed)


def internvl(model_type: str, seed: int = 0) -> PreTrainedModel:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = _of_transformers("InternVLConfig")(
        text_config={**TEXT, "model_type": model_type}, image_token_id=37,
        vision_config={**vision, "image_size": [28, 28], "patch_size": [7, 7]},
    )  # fmt: skip
    return finished(config, seed)


BUILDERS = {
    "llava_1.5-llama": lambda seed=0: llava(seed=seed),
    "llava_1.5-llama-biases": lambda seed=0: llava(seed=seed, attention_bias=True, mlp_bias=True),
    "llava_1.5-mistral": lambda seed=0: llava("mistral", seed, sliding_window=None),
    "llava_next": lambda seed=0: random_target("llava_next", seed),
    "qwen2_vl": lambda seed=0: random_target("qwen2_vl", seed),
    "qwen2_5_vl": lambda seed=0: random_target("qwen2_5_vl", seed),
    "qwen3_vl": qwen3_vl,
    "smolvlm": smolvlm,
    "internvl-qwen2": lambda seed=0: internvl("qwen2", seed),
    "internvl-llama": lambda seed=0: internvl("llama", seed),
}


def decoder_of(model: PreTrainedModel) -> nn.Module:
    return Target(model, fast=False).decoder


REASON = "transformers' own layers"
"""In the line that says why the lean pass does not decode."""


def spec(model: PreTrainedModel | Target, **options) -> SpecModel:
    """With a random head and small trees."""
    vlm = model.model if isinstance(model, Target) else model
    head = random_head(vlm, "eagle2", seed=7).to(vlm.dtype)
    return SpecModel(model, head, total_token=8, depth=2, top_k=3, **options)


def assert_exact(model: SpecModel, prompt: dict | None = None, tokens: int = 12) -> None:
    """Both arms say what the target's own generate() says now."""
    vlm = model.target.model
    prompt = text_prompt(vlm, 9, seed=4) if prompt is None else prompt
    expected = generate(vlm, prompt, max_new_tokens=tokens)
    assert expected.shape[1] == prompt["input_ids"].shape[1] + tokens
    assert torch.equal(model.baseline_generate(**prompt, max_new_tokens=tokens), expected)
    if model.draft is not None:
        assert torch.equal(model.specgenerate(**prompt, max_new_tokens=tokens), expected)


def reasons(caplog) -> list[str]:
    """The lines that say why the lean pass does not decode."""
    lines = [record.getMessage() for record in caplog.records]
    assert all("\n" not in line for line in lines)
    return [line for line in lines if REASON in line]


@torch.inference_mode()
def features(target: Target) -> list[torch.Tensor]:
    """What a text decoder makes of passes of decoding: (rows, tokens, H) of each, and the logits of the last.

    Three rows of different lengths; causal, tree and single-token passes; then one row without a mask.
    """
    generator = torch.Generator().manual_seed(1)
    vocabulary = len(target.embed_tokens.weight) - 4
    found = []

    def run(cache, rows: int, n: int, mask: torch.Tensor | None, depths: torch.Tensor, counts: torch.Tensor):
        tokens = torch.randint(vocabulary, (rows, n), generator=generator)
        found.append(target.forward(cache, tokens, cache.lengths[:, None] + depths, mask).hidden)
        cache.commit(counts)

    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    parents = (None, 0, 0, 1, 1, 2, 4)
    tree = torch.eye(7, dtype=torch.bool)
    for node, parent in enumerate(parents[1:], start=1):
        tree[node] |= tree[parent]
    for rows, lengths in ((3, (8, 5, 3)), (1, (8,))):
        cache = target.new_cache(rows, 32)
        run(cache, rows, 8, causal.expand(rows, 8, 8), torch.arange(8), torch.tensor(lengths))
        run(cache, rows, 7, tree.expand(rows, 7, 7), tree.sum(1) - 1, torch.ones(rows, dtype=torch.long))
        run(
            cache, rows, 1, torch.ones(rows, 1, 1, dtype=torch.bool), torch.zeros(1), torch.ones(rows, dtype=torch.long)
        )
    cache.used = int(cache.lengths)
    run(cache, 1, 1, None, torch.zeros(1), torch.ones(1, dtype=torch.long))
    return [*found, target.logits(found[1])]


# --- weights ---


def storages(module: nn.Module) -> dict[int, int]:
    """Bytes of each storage that parameters lie in."""
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class LowRank(nn.Module):
    """As adapters are put around a linear layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))
