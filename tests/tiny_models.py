"""Tiny models and prompts for the decoder's tests: the recorded ones, and random ones from a seed."""

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, Qwen2VLConfig

from vispec import SpecModel
from vispec.model.drafts import BaseHead, Draft
from vispec.model.drafts.base import Kept, Memory
from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.formats import AUX_LAYERS
from vispec.model.families import image_token_id
from vispec.model.pairs import Span
from vispec.model.parts import find_decoder
from vispec.model.prompt import Prompt
from vispec.model.target import Target
from vispec.model.tree import DraftOutput

GOLDEN = Path(__file__).parent / "golden"
RECORDED = [(family, method) for family in ("llava_next", "qwen2_5_vl") for method in ("vispec", "eagle2")]
FAMILIES = ("llava_next", "llava_1.5", "qwen2_5_vl", "qwen2_vl")

TEXT_FROM = 3
"""First id of ordinary text: 0 is padding, 1 begins, 2 ends a text."""

LLAVA_NEXT_TOKENS = {(40, 60): 70, (60, 40): 72, (56, 56): 88, (20, 70): 34}
"""Tokens of an image by its (height, width), as LLaVA-NeXT's processor counts them for the recorded config."""
QWEN_GRIDS = ((1, 4, 6), (1, 2, 2), (1, 6, 4))
"""Grids of videos: (pairs of frames, height, width) in patches."""


ON_CPU = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
"""Stands in for a target where a draft makes a memory."""

# --- what was recorded ---


@dataclass
class Recording:
    """One case of one trace: the processor's outputs, and what the reference made of them."""

    inputs: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    acceptance_lengths: list[int]

    @property
    def rounds(self) -> int:
        return len(self.acceptance_lengths)


@lru_cache
def recorded_model(family: str, method: str) -> SpecModel:
    """The recorded pair with the recorded tree; shared by all tests, which must leave it as it is."""
    trace = _trace(family, method)
    return SpecModel.from_pretrained(
        str(GOLDEN / family / "target"),
        str(GOLDEN / family / f"draft_{method}"),
        method=method,
        **{name: trace[name] for name in ("total_token", "depth", "top_k")},
    )


@lru_cache
def recorded_case(family: str, method: str, case: int) -> Recording:
    trace = _trace(family, method)
    prefix = f"case{case}."
    tensors = {k.removeprefix(prefix): v for k, v in _trace_tensors(family, method).items() if k.startswith(prefix)}
    inputs = {k.removeprefix("inputs."): v for k, v in tensors.items() if k.startswith("inputs.")}
    return Recording(inputs, tensors, trace["cases"][case]["acceptance_lengths"])


@lru_cache
def _trace(family: str, method: str) -> dict:
    return json.loads((GOLDEN / family / f"trace_{method}.json").read_text())


@lru_cache
def _trace_tensors(family: str, method: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / family / f"trace_{method}.safetensors")


# --- random models ---


def random_target(
    family: str, seed: int, vocabulary: int | None = None, std: float = 0.2, attention: str = "sdpa", **text
) -> PreTrainedModel:
    """A tiny VLM with random weights, large enough for answers that wander; `text` changes its text config."""
    config = _qwen2_vl_config() if family == "qwen2_vl" else AutoConfig.from_pretrained(GOLDEN / family / "target")
    texts = config.get_text_config()
    if vocabulary is not None:
        texts.vocab_size = config.vocab_size = vocabulary
        if "qwen" in family:
            config.vision_start_token_id, config.vision_end_token_id = vocabulary - 4, vocabulary - 3
            config.image_token_id, config.video_token_id = vocabulary - 2, vocabulary - 1
        else:
            config.image_token_index = config.image_token_id = vocabulary - 1
    for name, value in text.items():
        setattr(texts, name, value)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    randomize(model, seed, std)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def randomize(module: torch.nn.Module, seed: int, std: float) -> None:
    """Normal matrices and biases; the one-dimensional weights are norms, and stay 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std, generator=generator)
            elif not name.endswith("weight"):
                parameter.normal_(0, 0.1, generator=generator)


def random_head(target: PreTrainedModel, method: str, seed: int, num_q: int = 2, **config) -> BaseHead:
    """A draft head with random weights, and the target's embeddings."""
    embedding = target.get_input_embeddings().weight
    sizes = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}
    sizes |= {"hidden_size": embedding.shape[1], "vocab_size": embedding.shape[0]} | config
    if method == "eagle3":  # tiny targets have too few layers for those that it reads by default
        layers = len(find_decoder(target).layers)
        sizes["extra"] = {"eagle_config": {AUX_LAYERS: [number - 1 for number in (0, layers // 2, layers - 1)]}}
    head = bare_head(DraftConfig(**sizes), method, seed, num_q)
    head.embed_tokens.weight.data = embedding.detach()
    return head


def bare_head(config: DraftConfig, method: str, seed: int, num_q: int = 2) -> BaseHead:
    if method == "eagle3":
        config = replace(config, extra={**config.extra, "draft_vocab_size": len(proposed_tokens(config.vocab_size))})
    if method == "specvlm":
        config = BaseHead.kinds[method].new_config(config)
    head = BaseHead.kinds[method](config, **{"num_q": num_q} if method == "vispec" else {})
    randomize(head, seed, 0.2)
    if method == "eagle3":
        tokens = proposed_tokens(config.vocab_size)
        head.d2t.copy_(tokens - torch.arange(len(tokens)))
        head.t2d[tokens] = True
    return head.eval()


def proposed_tokens(vocabulary: int) -> torch.Tensor:
    """Of EAGLE-3 heads: three of four tokens."""
    return torch.tensor([token for token in range(vocabulary) if token % 4])


def random_pair(family: str, seed: int, method: str = "vispec", tree=(30, 3, 8), vocabulary: int | None = None):
    """A `SpecModel` of a random target and a random head; `tree` is (total_token, depth, top_k)."""
    target = random_target(family, seed, vocabulary)
    return SpecModel(target, random_head(target, method, seed + 1), *tree)


def read_prompt(draft: Draft, target: Target, prompt: Prompt, root: torch.Tensor, ahead: int = 64) -> Memory:
    """What a draft remembers of one prompt and the token after it; there is room for so many tokens more."""
    memory = draft.memory(1, prompt.features.shape[1] + ahead, target)
    memory.used = draft.read(memory, prompt)
    draft.extend(memory, Kept(prompt.features[:, -1:], root[:, None], torch.ones_like(root)))
    return memory


def read_rows(
    draft: Draft,
    memory: Memory,
    hidden: torch.Tensor,
    embeds: torch.Tensor,
    root: torch.Tensor,
    images: Sequence[Sequence[Span]],
) -> None:
    """Let a draft read prompts of one length, features and embeddings (B, L, H), and the token (B,) after each."""
    memory.used = max(
        draft.read(memory.part(b, b + 1), as_prompt(hidden[b : b + 1], embeds[b : b + 1], spans))
        for b, spans in enumerate(images)
    )
    draft.extend(memory, Kept(hidden[:, -1:], root[:, None], torch.ones_like(root)))


def as_prompt(
    features: torch.Tensor | None, embeds: torch.Tensor | None, images: Sequence[Span], ids: torch.Tensor | None = None
) -> Prompt:
    """One prompt as drafts meet it, of features (1, L, F) and embeddings (1, L, H)."""
    return Prompt(ids, {}, features, embeds, None, [list(images)], None, features, None)


def output_of(lm_head: torch.nn.Module) -> DraftOutput:
    """The output of a draft that may propose all tokens, without kernels."""
    return DraftOutput(lm_head, lambda rows: None)


def same_target(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose generation config a test may change."""
    return copy.deepcopy(model)


def _qwen2_vl_config() -> Qwen2VLConfig:
    values = json.loads((GOLDEN / "qwen2_5_vl" / "target" / "config.json").read_text())
    for key in ("model_type", "architectures", "vision_config", "transformers_version"):
        values.pop(key)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 7}
    return Qwen2VLConfig(**values, vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2})


# --- prompts ---


def text_prompt(target: PreTrainedModel, length: int, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([_text(target, length, torch.Generator().manual_seed(seed))])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_prompt(target: PreTrainedModel, seed: int, layout: str = "a.b") -> dict[str, torch.Tensor]:
    """What a processor would return for a prompt.

    Args:
        layout: "." is a few tokens of text, every other character one image; equal letters are equal image sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    config = target.config
    names = sorted(set(layout) - {"."})
    ids, sizes = [], []
    for piece in layout:
        if piece == ".":
            ids += _text(target, 5, generator)
            continue
        sizes.append(_size(config, names.index(piece)))
        image = [image_token_id(config)] * _tokens(config, sizes[-1])
        ids += [config.vision_start_token_id, *image, config.vision_end_token_id] if _is_qwen(config) else image
    input_ids = torch.tensor([ids])
    pixels = _pixels(config, sizes, generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pixels}


def reference_inputs(target: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same inputs for the target's own generate(): Qwen wants to be told under transformers 5 where images are."""
    if _is_qwen(target.config) and "mm_token_type_ids" in inspect.signature(target.forward).parameters:
        ids, config = inputs["input_ids"], target.config
        kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
        return {**inputs, "mm_token_type_ids": kinds}
    return inputs


def generate(target: PreTrainedModel, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    """The target's own greedy answer."""
    with torch.inference_mode():
        return target.generate(**reference_inputs(target, inputs), do_sample=False, repetition_penalty=1.0, **options)


def greedy_lengths(model: SpecModel, layouts: Sequence[str], new_tokens: int) -> list[int]:
    """What rounds accept of prompts of some layouts, whose greedy answers are held to be the target's own."""
    target, lengths = model.target.model, []
    for seed, layout in enumerate(layouts):
        inputs = image_prompt(target, seed, layout)
        answer, accepted = model.specgenerate(**inputs, max_new_tokens=new_tokens, return_acceptance_len=True)
        assert answer.tolist() == generate(target, inputs, max_new_tokens=new_tokens).tolist()
        lengths += accepted
    return lengths


def _is_qwen(config) -> bool:
    return config.model_type.startswith("qwen")


def _text(target: PreTrainedModel, length: int, generator: torch.Generator) -> list[int]:
    special = 4 if _is_qwen(target.config) else 1  # the last ids of the vocabulary mark images
    stop = target.get_input_embeddings().weight.shape[0] - special
    return torch.randint(TEXT_FROM, stop, (length,), generator=generator).tolist()


def _size(config, index: int) -> tuple[int, ...]:
    if _is_qwen(config):
        return QWEN_GRIDS[index]
    return list(LLAVA_NEXT_TOKENS)[index] if config.model_type == "llava_next" else (28, 28)


def _tokens(config, size: tuple[int, ...]) -> int:
    if _is_qwen(config):
        return size[0] * size[1] * size[2] // 4
    return LLAVA_NEXT_TOKENS[size] if config.model_type == "llava_next" else 16


def _pixels(config, sizes: list[tuple[int, ...]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    if not sizes:
        return {}
    if _is_qwen(config):
        grids = torch.tensor(sizes)
        patches = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 7 * 7, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": grids}
    if config.model_type == "llava":
        return {"pixel_values": torch.randn(len(sizes), 3, 28, 28, generator=generator)}
    # a base tile and up to 2 x 2 more; the model cuts off the tiles that an image does not have
    return {
        "pixel_values": torch.randn(len(sizes), 5, 3, 28, 28, generator=generator),
        "image_sizes": torch.tensor(sizes),
    }
