"""Families whose images are patches in a list, with a grid (frames, height, width) for each image."""

from collections.abc import Callable, Mapping

import torch

from vispec.evaluation.families.family import END, IMAGE, START, TEXT, VIDEO, VISION, Family, Inputs, Layout, Shown
from vispec.evaluation.families.squares import QWEN2

GRIDS = ((1, 4, 6), (1, 2, 2))
CLIPS = ((2, 4, 4), (3, 2, 4))
"""Of videos, after two frames have become one."""


def grids(patch: tuple[int, ...], around: bool = True, lined: bool = False, **more) -> Layout:
    """Images of patches of this shape, 2 x 2 to a token.

    Args:
        around: tokens start and end an image.
        lined: HunYuan's: a token ends every row, and one stands at either end, all of them image tokens.
        more: further inputs, by size.
    """

    def layout(sizes: list[int]) -> Shown:
        table = torch.tensor([GRIDS[size] for size in sizes]).reshape(-1, 3)
        ids = []
        for _, height, width in table.tolist():
            tokens = height // 2 * (width // 2 + 1) + 2 if lined else height * width // 4
            ids.append([START, *[IMAGE] * tokens, END] if around else [IMAGE] * tokens)

        return Shown(ids, _patched("pixel_values", "image_grid_thw", table, patch, _further(more, sizes)))

    return layout


def grid_clips(
    patch: tuple[int, ...], stamped: bool = False, around: bool = True, joined: int = 1, pooled: bool = False, **more
) -> Layout:
    """Videos of patches of this shape, 2 x 2 to a token.

    Args:
        stamped: every frame is marked on its own, with a token for its time.
        around: tokens start and end a video.
        joined: frames of the grid that the model makes one.
        pooled: all of them are.
        more: further inputs, by size.
    """

    def layout(sizes: list[int]) -> Shown:
        table = torch.tensor([CLIPS[size] for size in sizes]) * torch.tensor([joined, 1, 1])
        ids = []
        for frames, height, width in table.tolist():
            frames = 1 if pooled else frames // joined
            frame = [VIDEO] * (height * width // 4)
            if stamped:
                ids.append([token for number in range(frames) for token in (3 + number, START, *frame, END)])
            else:
                ids.append([START, *frame * frames, END] if around else frame * frames)

        return Shown(ids, _patched("pixel_values_videos", "video_grid_thw", table, patch, _further(more, sizes)))

    return layout


def _further(more: Mapping[str, tuple], sizes: list[int]) -> Inputs:
    return {name: torch.tensor([values[size] for size in sizes]) for name, values in more.items()}


def _patched(pixels: str, grids: str, table: torch.Tensor, patch: tuple[int, ...], further: Inputs) -> Callable:
    """Inputs of these names: noise in the patches of all grids of `table`."""

    def inputs(noise: torch.Generator) -> Inputs:
        return {pixels: torch.randn(int(table.prod(dim=1).sum()), *patch, generator=noise), grids: table, **further}

    return inputs


def mrope(*sections: int, **more) -> dict:
    """How a text decoder turns its queries and keys, for both versions of transformers."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}
    return {"rope_parameters": rope, "rope_scaling": rope}


MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_GLM_MARKS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
}
_GLM_MARKS |= {"video_start_token_id": START, "video_end_token_id": END}
_SIDES = {"patch_size": 7, "temporal_patch_size": 2, "spatial_merge_size": 2}
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64, **_SIDES}
QWEN25_TOWER = {**TOWER, "window_size": 28, "fullatt_block_indexes": [1], "tokens_per_second": 2}
QWEN3_TOWER = {**TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
FLAT = 3 * 2 * 7 * 7
"""Values of a patch of two frames."""
_STILL = 3 * 7 * 7
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
_GLM_MOE = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_GLM_MOE |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_INTERLEAVED = {"head_dim": 16, **mrope(2, 3, 3, mrope_interleaved=True)}
_GLM_ROPE = {"head_dim": 16, **mrope(2, 3, 3, partial_rotary_factor=1.0)}
_GLM_TOWER = {**TOWER, "image_size": 28, "intermediate_size": 48}
_QWEN_ROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}


def _qwen2(vision: dict) -> dict:
    # the text's values stand beside the others in the published file, both versions of transformers read that
    return {**TEXT, "rope_scaling": _QWEN_ROPE, "rope_theta": 10000.0, "vision_config": vision, **MARKS}


FAMILIES = {
    "qwen2_vl": Family(
        "qwen2_vl",
        _qwen2({"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, **_SIDES}),
        grids((FLAT,)),
        grid_clips((FLAT,)),
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        _qwen2(QWEN25_TOWER),
        grids((FLAT,)),
        grid_clips((FLAT,), second_per_grid_ts=(1.0, 0.5)),
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        {"text_config": {**TEXT, **_INTERLEAVED}, "vision_config": QWEN3_TOWER, **MARKS},
        grids((FLAT,)),
        grid_clips((FLAT,), stamped=True),
    ),
    "qwen3_vl_moe": Family(
        "qwen3_vl_moe",
        {"text_config": {**TEXT, **_INTERLEAVED, **EXPERTS}, "vision_config": QWEN3_TOWER, **MARKS},
        grids((FLAT,)),
        grid_clips((FLAT,), stamped=True),
    ),
    "glm4v": Family(
        "glm4v",
        {"text_config": {**TEXT, **_GLM_ROPE}, "vision_config": _GLM_TOWER, **_GLM_MARKS},
        grids((FLAT,)),
        grid_clips((FLAT,), stamped=True),
        video_as_image=True,
    ),
    "glm4v_moe": Family(
        "glm4v_moe",
        {"text_config": {**TEXT, **_GLM_ROPE, **_GLM_MOE}, "vision_config": _GLM_TOWER, **_GLM_MARKS},
        grids((FLAT,)),
        grid_clips((FLAT,), stamped=True),
        video_as_image=True,
    ),
    "glm46v": Family(
        "glm46v",
        {
            "text_config": {**TEXT, **_GLM_ROPE, "model_type": "glm4v_text"},
            "vision_config": {**_GLM_TOWER, "model_type": "glm4v_vision"},
            **_GLM_MARKS,
        },
        grids((FLAT,)),
        grid_clips((FLAT,), stamped=True),
        video_as_image=True,
    ),
    "glm_ocr": Family(
        "glm_ocr",
        {"text_config": {**TEXT, **_GLM_ROPE}, "vision_config": _GLM_TOWER, **_GLM_MARKS},
        grids((FLAT,)),
        grid_clips((FLAT,), stamped=True),
        video_as_image=True,
    ),
    "paddleocr_vl": Family(
        "paddleocr_vl",
        {
            "text_config": {**TEXT, "head_dim": 16, **mrope(2, 3, 3)},
            "vision_config": {**VISION, "image_size": 28, "patch_size": 7, "spatial_merge_size": 2},
            **MARKS,
        },
        grids((3, 7, 7)),
    ),
    "ernie4_5_vl_moe": Family(
        "ernie4_5_vl_moe",
        {
            "text_config": {
                **TEXT,
                **mrope(3, 3, 2),
                "moe_intermediate_size": [32, 32],
                "moe_k": 2,
                "moe_num_experts": 4,
                "moe_num_shared_experts": 1,
                "mlp_layer_types": ["dense", "sparse"],
            },
            "vision_config": {key: TOWER[key] for key in ("depth", "hidden_size", "intermediate_size", "num_heads")}
            | {"patch_size": 7},
            **_GLM_MARKS,
        },
        grids((_STILL,)),
        grid_clips((_STILL,), joined=2),
        kinds={"moe_mm_token_type_ids": (IMAGE, START, END, VIDEO)},
    ),
    "video_llama_3": Family(
        "video_llama_3",
        {"text_config": QWEN2, "vision_config": {**VISION, "patch_size": 7}, **MARKS},
        grids((_STILL,), around=False, image_merge_sizes=(2, 2)),
        grid_clips((_STILL,), around=False, video_merge_sizes=(2, 2)),
    ),
}
