"""Tiny random models whose processors lay out images in ways of their own, with prompts as they return them.

A layout is as in `image_prompt`: "." is a few tokens of text, every other character one image, by its size.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import TEXT_FROM, randomize
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

VOCABULARY = 24
IMAGE, BREAK, START, END = range(VOCABULARY - 4, VOCABULARY)

_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "sliding_window": None}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SQUARE = {**_VISION, "image_size": 28, "patch_size": 7}


class Images(NamedTuple):
    """The images of one prompt."""

    ids: list[list[int]]
    """The tokens of each, those around and within it too."""
    inputs: Callable[[torch.Generator], dict[str, torch.Tensor]]


class Layout(NamedTuple):
    build: Callable[[], PreTrainedModel]
    images: Callable[[list[int]], Images]
    """From the sizes of the images, 0, 1, …"""
    kinds: tuple[str, ...] = ()
    """Inputs of the shape of input_ids that say where images are."""
    join: Callable[[list[dict]], dict] | None = None
    """The image inputs of a batch from those of its prompts; None concatenates."""


def layout_model(name: str | Layout, seed: int = 1) -> PreTrainedModel:
    """A random model; skips where this transformers does not have the family."""
    model = _known(name).build().eval()
    randomize(model, seed, 0.2)
    with torch.no_grad():  # some of these models would look for the image of an image token that they said themselves
        model.get_output_embeddings().weight[IMAGE:] = 0
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def layout_prompt(name: str | Layout, seed: int, layout: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ["ab".index(piece) for piece in layout if piece != "."]
    images = _known(name).images(sizes)
    queue, ids = iter(images.ids), []
    for piece in layout:
        ids += torch.randint(TEXT_FROM, IMAGE, (4,), generator=generator).tolist() if piece == "." else next(queue)
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    marked = {"mm_token_type_ids": [IMAGE], "moe_mm_token_type_ids": [IMAGE, START, END]}
    for kinds in _known(name).kinds:
        inputs[kinds] = torch.isin(input_ids, torch.tensor(marked[kinds])).long()
    return {**inputs, **(images.inputs(generator) if sizes else {})}


def layout_batch(name: str | Layout, prompts: list[dict], padding: int) -> dict[str, torch.Tensor]:
    """What the processor would return for all of these prompts: padded on the left."""
    layout, longest = _known(name), max(prompt["input_ids"].shape[1] for prompt in prompts)
    tokens = {"input_ids": padding, "attention_mask": 0, **dict.fromkeys(layout.kinds, 0)}
    parts = [{key: value for key, value in prompt.items() if key not in tokens} for prompt in prompts]
    batch = {
        key: torch.cat([F.pad(prompt[key], (longest - prompt[key].shape[1], 0), value=fill) for prompt in prompts])
        for key, fill in tokens.items()
    }
    if layout.join is not None:
        return {**batch, **layout.join(parts)}
    names = {key for part in parts for key in part}
    return {**batch, **{key: torch.cat([part[key] for part in parts if key in part]) for key in names}}


def family(name: str, **config) -> PreTrainedModel:
    """Of transformers' class of this name; skips where this version does not have it."""
    made = getattr(transformers, f"{name}Config", None) or pytest.skip(f"this transformers has no {name}")
    return getattr(transformers, f"{name}ForConditionalGeneration")(made(**config))


# --- images of one size in one tensor ---


def _vipllava() -> PreTrainedModel:
    text, vision = {**_TEXT, "model_type": "llama"}, {**_SQUARE, "model_type": "clip_vision_model"}
    layers = {"vision_feature_layers": [-1, -2]}
    return family("VipLlava", text_config=text, vision_config=vision, image_token_index=IMAGE, **layers)


def squares(tokens: int, name: str = "pixel_values", around: bool = False) -> Callable[[list[int]], Images]:
    one = [IMAGE] * tokens
    ids = [START, *one, END] if around else one
    return lambda sizes: Images(
        [ids for _ in sizes], lambda noise: {name: torch.randn(len(sizes), 3, 28, 28, generator=noise)}
    )


def _video_llava() -> PreTrainedModel:
    text, vision = {**_TEXT, "model_type": "llama"}, {**_SQUARE, "model_type": "clip_vision_model"}
    marks = {"image_token_index": IMAGE, "video_token_index": BREAK}
    return family("VideoLlava", text_config=text, vision_config=vision, **marks)


# --- tiles ---


def _internvl() -> PreTrainedModel:
    vision = {**_SQUARE, "image_size": [28, 28], "patch_size": [7, 7], "model_type": "internvl_vision"}
    text = {**_TEXT, "model_type": "qwen2"}
    return family("InternVL", text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=4)


def _got_ocr2() -> PreTrainedModel:
    sides = {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1]}
    vision = {**_VISION, **sides, "output_channels": 16, "mlp_dim": 48}
    text = {**_TEXT, "model_type": "qwen2"}
    return family("GotOcr2", text_config=text, vision_config=vision, image_token_index=IMAGE, image_token_id=IMAGE)


def _tiles(side: int) -> Callable[[list[int]], Images]:
    """An image of size n has n + 1 tiles of 4 tokens."""

    def images(sizes: list[int]) -> Images:
        ids = [[START, *[IMAGE] * 4 * (size + 1), END] for size in sizes]
        tiles = sum(sizes) + len(sizes)
        return Images(ids, lambda noise: {"pixel_values": torch.randn(tiles, 3, side, side, generator=noise)})

    return images


def _perception() -> PreTrainedModel:
    """Its vision tower comes from another library; a convolution stands for it."""
    if not hasattr(transformers, "PerceptionLMConfig"):
        pytest.skip("this transformers has no PerceptionLM")
    from transformers.models.perception_lm import modeling_perception_lm as module

    class Tower(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 32, 14, 14)

        def forward(self, pixels, **_):
            return BaseModelOutput(last_hidden_state=self.patches(pixels).flatten(2).transpose(1, 2))

    sides = {"model_args": {"embed_dim": 32, "img_size": [28, 28]}, "architecture": "vit_pe_core_large_patch14_336"}
    text = {**_TEXT, "model_type": "llama"}
    with pytest.MonkeyPatch.context() as patch:
        from_config = module.AutoModel.from_config
        choose = lambda config, **_: Tower(config) if "timm" in config.model_type else from_config(config)  # noqa: E731
        patch.setattr(module.AutoModel, "from_config", choose)
        marks = {"image_token_id": IMAGE, "video_token_id": BREAK, "vision_use_cls_token": False}
        return family("PerceptionLM", text_config=text, vision_config=sides, **marks)


def _thumbs_and_tiles(sizes: list[int]) -> Images:
    """Every image has two tiles of 4 tokens, (N, 2, C, H, W)."""
    pixels = len(sizes), 2, 3, 28, 28
    return Images([[IMAGE] * 8 for _ in sizes], lambda noise: {"pixel_values": torch.randn(*pixels, generator=noise)})


def _fuyu() -> PreTrainedModel:
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("Fuyu needs a later transformers")
    text = {**_TEXT, "model_type": "persimmon"}
    sizes = {name: text[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 1024, "patch_size": 7, "image_token_id": IMAGE}
    return transformers.FuyuForCausalLM(transformers.FuyuConfig(**sizes))


def _patches(sizes: list[int]) -> Images:
    """Two rows of n + 1 patches, which end with a token of their own."""
    ids = [([IMAGE] * (size + 1) + [BREAK]) * 2 for size in sizes]
    number = 2 * sum(size + 1 for size in sizes)
    return Images(ids, lambda noise: {"pixel_values": torch.randn(number, 7 * 7 * 3, generator=noise)})


# --- rows of images, filled up with zeros ---


def _idefics3() -> PreTrainedModel:
    text = {**_TEXT, "model_type": "llama"}
    return family("Idefics3", text_config=text, vision_config=_SQUARE, image_token_id=IMAGE, scale_factor=2)


def _smolvlm() -> PreTrainedModel:
    text = {**_TEXT, "model_type": "llama"}
    return family("SmolVLM", text_config=text, vision_config=_SQUARE, image_token_id=IMAGE, scale_factor=2)


def _idefics2() -> PreTrainedModel:
    perceiver = {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    perceiver |= {"resampler_head_dim": 16, "num_key_value_heads": 1}
    text = {**_TEXT, "model_type": "mistral"}
    parts = {"text_config": text, "vision_config": _SQUARE, "perceiver_config": perceiver}
    return family("Idefics2", **parts, image_token_id=IMAGE)


def _rows(sizes: list[int]) -> Images:
    def inputs(noise):
        pixels = torch.randn(1, len(sizes), 3, 28, 28, generator=noise)
        seen = torch.ones(1, len(sizes), 28, 28, dtype=torch.bool)
        for place, size in enumerate(sizes):  # the picture does not fill its square
            seen[0, place, 28 - 7 * size :] = False
        return {"pixel_values": pixels, "pixel_attention_mask": seen}

    return Images([[START, *[IMAGE] * 4, END] for _ in sizes], inputs)


def _fill_rows(parts: list[dict]) -> dict:
    most = max(part["pixel_values"].shape[1] for part in parts if part)
    joined = {}
    for name in ("pixel_values", "pixel_attention_mask"):
        empty = torch.zeros_like(next(part[name] for part in parts if part)[:, :0])
        rows = [part.get(name, empty) for part in parts]
        fill = (0, 0) * (empty.dim() - 2)
        joined[name] = torch.cat([F.pad(row, (*fill, 0, most - row.shape[1])) for row in rows])
    return joined


# --- sizes of their own, and breaks between rows of patches ---

_SIZES = ((28, 42), (14, 28))


def _pixtral() -> PreTrainedModel:
    vision = {**_VISION, "image_size": 56, "patch_size": 7, "model_type": "pixtral"}
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_index": IMAGE}
    return family("Llava", text_config={**_TEXT, "model_type": "mistral"}, vision_config=vision, **options)


def _mistral3() -> PreTrainedModel:
    vision = {**_VISION, "image_size": 56, "patch_size": 7, "model_type": "pixtral"}
    text = {**_TEXT, "model_type": "mistral", "head_dim": 16}
    options = {"spatial_merge_size": 2, "vision_feature_layer": -1, "image_token_index": IMAGE}
    return family("Mistral3", text_config=text, vision_config=vision, **options)


def broken(side: int) -> Callable[[list[int]], Images]:
    def images(sizes: list[int]) -> Images:
        ids = []
        for height, width in (_SIZES[size] for size in sizes):
            rows = ([IMAGE] * (width // side) + [BREAK]) * (height // side)
            ids.append([*rows[:-1], END])

        def inputs(noise):
            pixels = torch.zeros(len(sizes), 3, 28, 42)
            for place, (height, width) in enumerate(_SIZES[size] for size in sizes):
                pixels[place, :, :height, :width] = torch.randn(3, height, width, generator=noise)
            return {"pixel_values": pixels, "image_sizes": torch.tensor([_SIZES[size] for size in sizes])}

        return Images(ids, inputs)

    return images


# --- grids of patches ---

_GRIDS = ((1, 4, 6), (1, 2, 2))


def _paddleocr() -> PreTrainedModel:
    text = {**_TEXT, "head_dim": 16, "rope_parameters": _mrope(2, 3, 3)}
    vision = {**_SQUARE, "spatial_merge_size": 2}
    marks = {"vision_start_token_id": START, "vision_end_token_id": END, "image_token_id": IMAGE}
    return family("PaddleOCRVL", text_config=text, vision_config=vision, video_token_id=BREAK, **marks)


def _ernie() -> PreTrainedModel:
    text = {**_TEXT, "moe_intermediate_size": [32, 32], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
    text |= {"mlp_layer_types": ["dense", "sparse"], "rope_parameters": _mrope(3, 3, 2)}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 7}
    marks = {"image_start_token_id": START, "image_end_token_id": END, "image_token_id": IMAGE}
    return family("Ernie4_5_VLMoe", text_config=text, vision_config=vision, video_token_id=BREAK, **marks)


def _video_llama3() -> PreTrainedModel:
    vision = {**_VISION, "patch_size": 7}
    text = {**_TEXT, "model_type": "qwen2"}
    return family("VideoLlama3", text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=BREAK)


def _mrope(*sections: int) -> dict:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


def patch_grids(patch: tuple[int, ...], around: bool = True, **more) -> Callable[[list[int]], Images]:
    """A patch has this shape; `more` is given to every image alike."""

    def images(sizes: list[int]) -> Images:
        grids = torch.tensor([_GRIDS[size] for size in sizes]).reshape(-1, 3)
        ids = [[IMAGE] * (count // 4) for count in grids.prod(dim=1).tolist()]

        def inputs(noise):
            pixels = torch.randn(int(grids.prod(dim=1).sum()), *patch, generator=noise)
            every = {name: torch.tensor([value] * len(sizes)) for name, value in more.items()}
            return {"pixel_values": pixels, "image_grid_thw": grids, **every}

        return Images([[START, *own, END] for own in ids] if around else ids, inputs)

    return images


# --- crops whose patches are pooled by their numbers ---


def _molmo2() -> PreTrainedModel:
    attention = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    vision = {**attention, "intermediate_size": 48, "num_hidden_layers": 2, "patch_size": 7, "image_size": [14, 14]}
    vision["num_position_embeddings"] = 4
    adapter = {**attention, "intermediate_size": 48, "text_hidden_size": 64, "vision_feature_layer": [-1, -2]}
    text = {**_TEXT, "vocab_size": VOCABULARY - 4, "additional_vocab_size": 4, "head_dim": 16}
    parts = {"text_config": text, "vision_config": vision, "adapter_config": adapter}
    marks = {"image_start_token_id": START, "low_res_image_start_token_id": START, "image_end_token_id": END}
    return family("Molmo2", **parts, **marks, image_patch_id=IMAGE)


def _crops(sizes: list[int]) -> Images:
    """An image of size n has a small picture and n + 1 crops of 2 x 2 patches; two patches make a token."""
    grids = [[2, 1, size + 1, 2] for size in sizes]
    ids = [[START, IMAGE, IMAGE, END, START, *[IMAGE, IMAGE, BREAK] * (size + 1), END] for size in sizes]
    crops = [size + 2 for size in sizes]

    def inputs(noise):
        pooling = torch.arange(sum(crops) * 4).reshape(-1, 2)
        pooling[0, 1] = -1  # a token at the edge has fewer patches
        pixels = torch.randn(sum(crops), 4, 7 * 7 * 3, generator=noise)
        numbers = {"image_grids": torch.tensor(grids), "image_num_crops": torch.tensor(crops)}
        return {"pixel_values": pixels, "image_token_pooling": pooling, **numbers}

    return Images(ids, inputs)


def _rebase(parts: list[dict]) -> dict:
    parts, crops = [dict(part) for part in parts if part], 0
    for part in parts:
        pooling = part["image_token_pooling"]
        part["image_token_pooling"] = torch.where(pooling < 0, pooling, pooling + crops * 4)
        crops += len(part["pixel_values"])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# --- tiles or not, by how many images a prompt has ---


def _onevision() -> PreTrainedModel:
    text, vision = {**_TEXT, "model_type": "qwen2"}, {**_SQUARE, "model_type": "siglip_vision_model"}
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    marks = {"image_token_index": IMAGE, "video_token_index": BREAK, "image_grid_pinpoints": pinpoints}
    model = family("LlavaOnevision", text_config=text, vision_config=vision, **marks)
    if "batch_num_images" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers gives all images tiles")
    return model


def _one_or_more(sizes: list[int]) -> Images:
    """An image alone has tiles; several have none, only a token that ends each."""
    pixels = [(40, 60), (20, 70)]
    lengths = [70, 34] if len(sizes) == 1 else [17, 17]

    def inputs(noise):
        sides = torch.tensor([pixels[size] for size in sizes])
        tiles = torch.randn(len(sizes), 5, 3, 28, 28, generator=noise)
        return {"pixel_values": tiles, "image_sizes": sides, "batch_num_images": torch.tensor([len(sizes)])}

    return Images([[IMAGE] * lengths[size] for size in sizes], inputs)


def _known(name: str | Layout) -> Layout:
    return LAYOUTS[name] if isinstance(name, str) else name


LAYOUTS = {
    "vipllava": Layout(_vipllava, squares(16)),
    "video_llava": Layout(_video_llava, squares(16, "pixel_values_images")),
    "internvl": Layout(_internvl, _tiles(28)),
    "got_ocr2": Layout(_got_ocr2, _tiles(64)),
    "perception_lm": Layout(_perception, _thumbs_and_tiles),
    "fuyu": Layout(_fuyu, _patches),
    "idefics2": Layout(_idefics2, _rows, join=_fill_rows),
    "idefics3": Layout(_idefics3, _rows, join=_fill_rows),
    "smolvlm": Layout(_smolvlm, _rows, join=_fill_rows),
    "pixtral": Layout(_pixtral, broken(7)),
    "mistral3": Layout(_mistral3, broken(14)),
    "paddleocr_vl": Layout(_paddleocr, patch_grids((3, 7, 7)), ("mm_token_type_ids",)),
    "ernie4_5_vl_moe": Layout(_ernie, patch_grids((3 * 7 * 7,)), ("mm_token_type_ids", "moe_mm_token_type_ids")),
    "video_llama_3": Layout(_video_llama3, patch_grids((3 * 7 * 7,), around=False, image_merge_sizes=2)),
    "molmo2": Layout(_molmo2, _crops, join=_rebase),
    "llava_onevision": Layout(_onevision, _one_or_more),
}
