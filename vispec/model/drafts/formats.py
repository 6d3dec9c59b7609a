"""Draft heads as others write them, brought to the one form that is read here.

EAGLE-3 heads are published by SafeAILab and SpecForge, whose names and flat config SGLang reads and we write, and by
speculators: `layers.0` for `midlayer`, the layer's sizes in `transformer_layer_config`, and numbers of the layers that
are read counted as vLLM counts them, by their inputs (SpecForge: by their outputs, so one less).

ViSpec heads of NeMo AutoModel have the target's text config with a few keys of their own, and other names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from vispec.model.drafts.config import DraftConfig

NEMO = "VispecDraftModel"
"""The architecture of ViSpec heads of NeMo AutoModel."""
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
"""In SpecForge's `eagle_config`, and at the top of a config of speculators."""


def flat_config(values: dict) -> dict:
    """A parsed config file with its sizes at the top, EAGLE-3's in SpecForge's form."""
    layer = values.get("transformer_layer_config")
    if isinstance(layer, dict):
        values = {**layer, **{name: value for name, value in values.items() if name != "transformer_layer_config"}}
        listed = values.pop(AUX_LAYERS, None)
        if listed is not None:
            if not isinstance(listed, list) or not all(type(number) is int for number in listed):
                raise ValueError(f"{AUX_LAYERS} is {listed!r:.60}, expected numbers of layers")
            values["eagle_config"] = {AUX_LAYERS: [number - 1 for number in listed]}
        values["architectures"] = ["LlamaForCausalLMEagle3"]
    nemo = is_nemo(values)
    if nemo:
        own = {"num_hidden_layers": "draft_num_hidden_layers", "bias": "fc_bias"}
        values = {**values, **{ours: values[theirs] for ours, theirs in own.items() if theirs in values}}
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):  # of transformers 5
        values = {**values, "rope_theta": rope.get("rope_theta", 10000.0)}
        plain = rope.get("rope_type", "default") == "default" and not rope.get("mrope_section")
        values["rope_scaling"] = None if plain else rope
    scaling = values.get("rope_scaling")
    if nemo and isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) in ("mrope", "default"):
        values = {**values, "rope_scaling": None}  # the target's M-RoPE; the head's positions are plain
    return values


def is_nemo(config: Mapping) -> bool:
    """Whether a config is of a ViSpec head of NeMo AutoModel."""
    named = config.get("architectures")
    return isinstance(named, list) and NEMO in named


def as_vispec(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of NeMo AutoModel's ViSpec heads by the published names; others stay as they are."""
    query, other = ("img_adaptor.query", "imadpt.q"), ("img_adaptor.", "imadpt.")
    return {name.replace(*query).replace(*other): tensor for name, tensor in weights.items()}


def is_eagle3(names: Iterable[str]) -> bool:
    """Whether tensors of these names are an EAGLE-3 head."""
    plain = [name.removeprefix("model.") for name in names]
    return "layers.0.hidden_norm.weight" in plain or any(name.startswith("midlayer.") for name in plain)


def as_specforge(
    weights: Mapping[str, torch.Tensor], config: DraftConfig
) -> tuple[dict[str, torch.Tensor], DraftConfig]:
    """The tensors of an EAGLE-3 head by SpecForge's names, and a config that says what they show.

    Configs leave much of it out, or say what the models that they were copied from had.

    Raises:
        ValueError: the head's table of tokens is none, or leads to some that the target does not have.
    """
    weights = {name.removeprefix("model.").replace("layers.0.", "midlayer."): w for name, w in weights.items()}
    extra = {name: value for name, value in config.extra.items() if name not in ("head_dim", "fc_norm")}
    if "fc_norm.0.weight" in weights:
        extra["fc_norm"] = True
    query, output = weights.get("midlayer.self_attn.q_proj.weight"), weights.get("lm_head.weight")
    if query is not None and query.shape[0] != config.hidden_size:
        extra["head_dim"] = query.shape[0] // config.num_attention_heads
    if output is not None:
        extra["draft_vocab_size"] = size = output.shape[0]
        if "d2t" not in weights and size == config.vocab_size:
            weights["d2t"] = torch.zeros(size, dtype=torch.long)
    if "d2t" in weights:
        if weights["d2t"].dim() != 1:
            raise ValueError(f"d2t has shape {tuple(weights['d2t'].shape)}, expected one number for each token")
        tokens = token_ids(weights["d2t"])
        if tokens.numel() and not (tokens.min() >= 0 and tokens.max() < config.vocab_size):
            raise ValueError(
                f"d2t leads to tokens from {int(tokens.min())} to {int(tokens.max())}, expected 0 to "
                f"{config.vocab_size - 1}"
            )
        if "t2d" not in weights:
            weights["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, tokens, True)
    own = {"bias": "fc.bias" in weights, "qkv_bias": "midlayer.self_attn.q_proj.bias" in weights}
    return weights, replace(config, extra=extra, **own)


def token_ids(d2t: torch.Tensor) -> torch.Tensor:
    """(V_d,) the target's tokens that a head proposes, from how far each is behind its number in the head."""
    return d2t.long() + torch.arange(len(d2t), device=d2t.device)
