"""Tiny random models that take videos, and prompts with images and videos as their processors return them."""

import pytest
import torch
import transformers
from tiny_models import LLAVA_NEXT_TOKENS, QWEN_GRIDS, QWEN_VIDEOS, TEXT_FROM, image_prompt, random_target, randomize
from transformers import PreTrainedModel

VIDEO_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video")
VOCABULARY = 24
IMAGE, VIDEO, START, END = range(VOCABULARY - 4, VOCABULARY)
FRAMES = 3
"""Of all videos of a prompt where the processor stacks them."""

_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}


def video_target(family: str, seed: int) -> PreTrainedModel:
    """A random model; skips where this transformers does not have the family."""
    if family in ("qwen2_vl", "qwen2_5_vl"):
        return random_target(family, seed, VOCABULARY)
    name = {"qwen3_vl": "Qwen3VL", "llava_onevision": "LlavaOnevision", "llava_next_video": "LlavaNextVideo"}[family]
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    sides = {"hidden_size": 32, "intermediate_size": 48, "image_size": 28, "patch_size": 7}
    llava = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]], "image_token_index": IMAGE}
    if family == "qwen3_vl":
        vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "depth": 2, "num_heads": 4}
        vision |= {"patch_size": 7, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True, "rope_theta": 1e4}
        options = {"text_config": {**_TEXT, "head_dim": 16, "rope_parameters": rope}, "vision_config": vision}
        options |= {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}
    else:
        tower = "clip_vision_model" if family == "llava_next_video" else "siglip_vision_model"
        vision = {**sides, "model_type": tower, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {**_TEXT, "model_type": "llama" if family == "llava_next_video" else "qwen2"}
        options = {"text_config": text, "vision_config": vision, **llava}
    token = "video_token_id" if family == "qwen3_vl" else "video_token_index"
    config = getattr(transformers, f"{name}Config")(**options, **{token: VIDEO})
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    randomize(model, seed, 0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def video_prompt(target: PreTrainedModel, seed: int, layout: str) -> dict[str, torch.Tensor]:
    """As `image_prompt`; a capital letter is a video."""
    family = target.config.model_type
    if family in ("qwen2_vl", "qwen2_5_vl"):
        return image_prompt(target, seed, layout)
    generator = torch.Generator().manual_seed(seed)
    ids, images, videos = [], [], []
    for piece in layout:
        if piece == ".":
            ids += _words(5, generator)
        elif family == "qwen3_vl":
            grids, token = (images, IMAGE) if piece.islower() else (videos, VIDEO)
            grids.append(QWEN_GRIDS["abc".index(piece)] if piece.islower() else QWEN_VIDEOS["AB".index(piece)])
            frames, height, width = grids[-1]
            for _ in range(frames):  # before each frame the processor writes when it was
                stamp = _words(2, generator) if token == VIDEO else []
                ids += [*stamp, START, *[token] * (height * width // 4), END]
        elif piece.islower():
            images.append(list(LLAVA_NEXT_TOKENS)["abc".index(piece)])
            ids += [IMAGE] * LLAVA_NEXT_TOKENS[images[-1]]
        else:
            videos.append(FRAMES)
            ids += [VIDEO] * (FRAMES * 4 + (family == "llava_onevision"))
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    noise = {"generator": generator}
    if family == "qwen3_vl":
        for name, grids in (("image", images), ("video", videos)):
            if grids:
                inputs[f"{name}_grid_thw"] = torch.tensor(grids)
                pixels = torch.randn(int(torch.tensor(grids).prod(1).sum()), 3 * 2 * 7 * 7, **noise)
                inputs["pixel_values" if name == "image" else "pixel_values_videos"] = pixels
        return inputs
    if images:
        inputs["pixel_values"] = torch.randn(len(images), 5, 3, 28, 28, **noise)
        inputs["image_sizes"] = torch.tensor(images)
    if videos:
        inputs["pixel_values_videos"] = torch.randn(len(videos), FRAMES, 3, 28, 28, **noise)
    return inputs


def _words(number: int, generator: torch.Generator) -> list[int]:
    return torch.randint(TEXT_FROM, IMAGE, (number,), generator=generator).tolist()
