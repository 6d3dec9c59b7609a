"""Where the images of a prompt are, touching ones too, as each family's processor and model count them."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_models import GOLDEN, LLAVA_NEXT_TOKENS, image_prompt, random_target
from transformers import AutoProcessor

from vispec.model.batches import single_prompts
from vispec.model.families import image_spans, what_is_shown


def spans_of(target, inputs: dict) -> list:
    return image_spans(target, inputs["input_ids"], inputs)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llava_next", [*LLAVA_NEXT_TOKENS, (10, 10), (100, 30), (33, 47)]), ("llava_1.5", [(28, 28), (60, 40)])],
)
def test_lengths_are_the_processors(family, sizes):
    processor = AutoProcessor.from_pretrained(GOLDEN / family / "target")
    target = random_target(family, 0)
    images = [Image.new("RGB", (width, height)) for height, width in sizes]
    counted = []
    for image in images:
        ids = processor(text="<image>", images=[image], return_tensors="pt")["input_ids"]
        counted.append(int((ids == target.config.image_token_index).sum()))
    together = processor(text="a" + "<image>" * len(images) + "b", images=images, return_tensors="pt")
    (spans,) = spans_of(target, together)
    assert [end - start for start, end in spans] == counted
    assert all(left[1] == right[0] for left, right in zip(spans, spans[1:], strict=False)), "they touch"
    if family == "llava_next":
        assert counted[:4] == list(LLAVA_NEXT_TOKENS.values())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_qwen_lengths_follow_from_the_grids(family):
    target = random_target(family, 0)
    token = target.config.image_token_id
    ids = torch.tensor([[5, *[token] * 6, 5, *[token] * 7, 5]])
    grids = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 6, 4]])
    assert image_spans(target, ids, {"image_grid_thw": grids}) == [[(1, 7), (8, 9), (9, 15)]]


def test_images_of_several_rows_are_dealt_in_order():
    target = random_target("qwen2_5_vl", 0)
    token = target.config.image_token_id
    ids = torch.tensor([[5, token, token, 5, 5], [5, 5, 5, 5, 5], [token, 5, token, token, 5]])
    grids = torch.tensor([[1, 2, 2], [1, 2, 2], [1, 2, 2], [1, 2, 4]])
    assert image_spans(target, ids, {"image_grid_thw": grids}) == [[(1, 2), (2, 3)], [], [(0, 1), (2, 4)]]


def test_ids_and_images_that_do_not_belong_together():
    target = random_target("llava_next", 0)
    inputs = image_prompt(target, 0, "a.b")
    inputs["input_ids"] = inputs["input_ids"][:, 1:]
    with pytest.raises(ValueError, match="141 image tokens, but its 2 image.s. have 142"):
        spans_of(target, inputs)


@pytest.mark.parametrize(
    ("family", "name"), [("llava_next", "image_sizes"), ("llava_1.5", "pixel_values"), ("qwen2_5_vl", "image_grid_thw")]
)
def test_image_tokens_without_images(family, name):
    target = random_target(family, 0)
    inputs = image_prompt(target, 0, ".a")
    inputs.pop(name)
    with pytest.raises(ValueError, match=f"image tokens, but {name} is not among its inputs"):
        spans_of(target, inputs)


def test_text_only():
    for family in ("llava_next", "llava_1.5", "qwen2_5_vl"):
        assert spans_of(random_target(family, 0), {"input_ids": torch.tensor([[5, 6, 7]])}) == [[]]


class Vlm:
    """A model of a family that nobody knows."""

    def __init__(self, **config):
        self.config = SimpleNamespace(**{"model_type": "unheard_of", "image_token_id": 9, **config})

    def forward(self, input_ids, pixel_values=None, image_sizes=None):
        raise AssertionError("the numbers come before the pixels")


class GridVlm(Vlm):
    def forward(self, input_ids, pixel_values=None, image_grid_thw=None):
        raise AssertionError("the numbers come before the pixels")


def test_images_in_one_tensor_that_nothing_tells_apart_have_the_same_length():
    touching = torch.tensor([[1, 9, 9, 9, 9, 1], [9, 9, 1, 1, 1, 1]])
    for inputs in ({}, {"token_type_ids": touching, "pixel_mask": torch.ones(3, 4, 4)}):
        inputs = {"pixel_values": torch.zeros(3, 3, 4, 4), **inputs}
        assert image_spans(Vlm(), touching, inputs) == [[(1, 3), (3, 5)], [(0, 2)]]
        assert image_spans(Vlm(model_type="internvl"), touching, inputs) == [[(1, 5)], [(0, 2)]], "tiles of one image"
    with pytest.raises(ValueError, match="6 image tokens in 2 stretch.*4 images of one size cannot fill: ids and imag"):
        image_spans(Vlm(), touching, {"pixel_values": torch.zeros(4, 3, 4, 4)})
    with pytest.raises(ValueError, match="5 image tokens in 2 stretch.*, which 1 images of one size cannot fill"):
        image_spans(Vlm(), torch.tensor([[9, 9, 1, 9, 9, 9]]), {"pixel_values": torch.zeros(1, 3, 4, 4)})


def test_images_that_are_all_zero_fill_up_rows():
    pixels = torch.ones(2, 2, 3, 4, 4)
    pixels[1, 1] = 0
    ids = torch.tensor([[9, 9, 1, 9, 9], [9, 9, 1, 1, 1]])
    assert image_spans(Vlm(), ids, {"pixel_values": pixels}) == [[(0, 2), (3, 5)], [(0, 2)]]


def test_images_whose_lengths_are_not_known_must_keep_apart():
    apart, touching = torch.tensor([[9, 9, 1, 9]]), torch.tensor([[9, 9, 9, 1]])
    inputs = {"pixel_values": torch.zeros(2, 3, 4, 4), "image_sizes": torch.tensor([[4, 4], [4, 2]])}
    assert image_spans(Vlm(), apart, inputs) == [[(0, 2), (3, 4)]]
    with pytest.raises(ValueError, match="unheard_of: 2 images fill 1 stretch.* put text between the images"):
        image_spans(Vlm(), touching, inputs)


def test_patches_in_a_list_of_four_dimensions_are_no_images():
    """PaddleOCR-VL's are."""
    model = GridVlm(vision_config=SimpleNamespace(spatial_merge_size=2))
    inputs = {"pixel_values": torch.zeros(24, 3, 2, 2), "image_grid_thw": torch.tensor([[1, 4, 2], [1, 4, 4]])}
    assert image_spans(model, torch.tensor([[1, 9, 9, 9, 9, 9, 9, 1]]), inputs) == [[(1, 3), (3, 7)]]


def test_every_image_may_have_its_own_merging():
    """Video-LLaMA3's have."""
    inputs = {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 2]]), "image_merge_sizes": torch.tensor([2, 1])}
    model = GridVlm(vision_config=SimpleNamespace())
    assert image_spans(model, torch.tensor([[9] * 8]), inputs) == [[(0, 4), (4, 8)]]


def test_an_image_of_a_pixtral_tower_goes_on_over_the_breaks_between_its_rows():
    model = Vlm(vision_config=SimpleNamespace(model_type="pixtral", patch_size=4))
    ids = torch.tensor([[9, 9, 7, 9, 9, 8, 1, 9, 8]])
    inputs = {"pixel_values": torch.zeros(2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8], [4, 4]])}
    assert image_spans(model, ids, inputs) == [[(0, 5), (7, 8)]]
    model.config.spatial_merge_size = 2
    assert image_spans(model, torch.tensor([[9, 1]]), {"image_sizes": [[8, 8]]}) == [[(0, 1)]]


@pytest.mark.parametrize("tokens", [16, 17])
def test_the_class_token_counts_where_there_is_one(tokens):
    ids = torch.tensor([[1, *[9] * 2 * tokens, 1]])
    spans = image_spans(Vlm(model_type="llava"), ids, {"pixel_values": torch.zeros(2, 3, 28, 28)})
    assert spans == [[(1, 1 + tokens), (1 + tokens, 1 + 2 * tokens)]]


def test_rows_get_the_crops_of_their_own_images():
    """DeepSeek-OCR 2's inputs say how many each image has."""
    ids = torch.tensor([[9, 9, 1, 9], [1, 9, 9, 9], [1, 1, 1, 1]])
    inputs = {"pixel_values": torch.arange(3.0).reshape(3, 1, 1, 1), "num_local_patches": [2, 0, 1]}
    inputs["pixel_values_local"] = torch.arange(3.0).reshape(3, 1, 1, 1)
    rows = [rest for _, rest in single_prompts(Vlm(), ids, inputs)]
    flat = [{k: v if isinstance(v, list) else v.flatten().tolist() for k, v in row.items()} for row in rows]
    assert flat[0] == {"pixel_values": [0, 1], "num_local_patches": [2, 0], "pixel_values_local": [0, 1]}
    assert flat[1] == {"pixel_values": [2], "num_local_patches": [1], "pixel_values_local": [2]} and flat[2] == {}


# --- videos ---


def video_model(forward=GridVlm, **vision) -> Vlm:
    return forward(video_token_id=8, vision_config=SimpleNamespace(**vision))


def test_a_frame_of_a_video_is_a_run():
    model = video_model(spatial_merge_size=2)
    inputs = {"pixel_values_videos": torch.zeros(40, 8), "video_grid_thw": torch.tensor([[2, 4, 4], [1, 2, 4]])}
    together = torch.tensor([[8, 8, 8, 8, 8, 8, 8, 8, 8, 8]])
    assert image_spans(model, together, inputs) == [[(0, 4), (4, 8), (8, 10)]]
    stamped = torch.tensor([[1, 8, 8, 8, 8, 2, 8, 8, 8, 8, 1, 8, 8]])  # Qwen3-VL says when each frame was
    assert image_spans(model, stamped, inputs) == [[(1, 5), (6, 10), (11, 13)]]


def test_images_and_videos_in_the_order_of_the_prompt():
    model = video_model(spatial_merge_size=2)
    inputs = {"pixel_values": torch.zeros(12, 8), "image_grid_thw": torch.tensor([[1, 2, 4], [1, 2, 2]])}
    inputs |= {"pixel_values_videos": torch.zeros(8, 8), "video_grid_thw": torch.tensor([[2, 2, 2]])}
    ids = torch.tensor([[9, 9, 8, 8, 1], [1, 1, 1, 1, 9]])
    assert image_spans(model, ids, inputs) == [[(0, 2), (2, 3), (3, 4)], [(4, 5)]]


def test_videos_of_one_tensor_have_frames_of_one_length():
    model = video_model(Vlm)
    ids = torch.tensor([[8] * 14])
    assert image_spans(model, ids, {"pixel_values_videos": torch.ones(2, 3, 3, 4, 4)}) == [
        [(0, 2), (2, 4), (4, 7), (7, 9), (9, 11), (11, 14)]
    ], "the last frame has the newline of LLaVA-OneVision"
    with pytest.raises(ValueError, match=r"14 video tokens, which 3 video\(s\) of 3 frames cannot fill"):
        image_spans(model, ids, {"pixel_values_videos": torch.ones(3, 3, 3, 4, 4)})


def test_frames_of_which_a_part_is_kept():
    """Video-LLaMA3 drops what stands still."""
    kept = torch.tensor([1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0]).bool()
    inputs = {"pixel_values_videos": torch.zeros(48, 8), "video_grid_thw": torch.tensor([[3, 4, 4]])}
    inputs |= {"video_merge_sizes": torch.tensor([2]), "video_compression_mask": kept}
    assert image_spans(video_model(), torch.tensor([[8, 8, 8, 8, 1, 8, 8, 1]]), inputs) == [[(0, 4), (5, 7)]]


def test_videos_made_of_image_tokens():
    """GLM's: the processor tells them apart."""
    model = video_model(spatial_merge_size=1)
    inputs = {"pixel_values_videos": torch.zeros(4, 8), "video_grid_thw": torch.tensor([[2, 1, 2]])}
    inputs |= {"pixel_values": torch.zeros(3, 8), "image_grid_thw": torch.tensor([[1, 1, 3]])}
    ids = torch.tensor([[9, 9, 1, 9, 9, 1, 9, 9, 9]])
    kinds = {"mm_token_type_ids": torch.tensor([[2, 2, 2, 2, 2, 0, 1, 1, 1]])}
    assert image_spans(model, ids, {**inputs, **kinds}) == [[(0, 2), (3, 5), (6, 9)]]
    with pytest.raises(ValueError, match="7 image tokens, but its 1 image.s. have 3: ids and images do not belong"):
        image_spans(model, ids, inputs)


def test_frames_that_stand_apart():
    """Gemma 4's inputs say how many each video has."""
    ids = torch.tensor([[1, 8, 8, 1, 8, 8, 1], [1, 1, 1, 1, 8, 8, 8]])
    inputs = {"pixel_values_videos": torch.arange(3.0).reshape(3, 1, 1), "num_frames_per_video": torch.tensor([2, 1])}
    assert image_spans(video_model(Vlm), ids, inputs) == [[(1, 3), (4, 6)], [(4, 7)]]
    rows = [rest for _, rest in single_prompts(video_model(Vlm), ids, inputs)]
    assert [row["pixel_values_videos"].flatten().tolist() for row in rows] == [[0, 1], [2]]
    assert [row["num_frames_per_video"].tolist() for row in rows] == [[2], [1]]


def test_videos_in_the_place_of_images():
    """Molmo2's; the numbers of patches are a row's own."""
    ids = torch.tensor([[1, 9, 9, 1, 9, 9], [1, 1, 1, 1, 9, 9]])
    inputs = {"pixel_values_videos": torch.zeros(3, 4, 6), "video_grids": torch.tensor([[2, 2, 1], [1, 1, 2]])}
    inputs["video_token_pooling"] = torch.tensor([[0, 1], [2, 3], [4, -1], [6, 7], [8, 9], [-1, 11]])
    assert image_spans(Vlm(), ids, inputs) == [[(1, 3), (4, 6)], [(4, 6)]]
    rows = [rest for _, rest in single_prompts(Vlm(), ids, inputs)]
    assert [len(row["pixel_values_videos"]) for row in rows] == [2, 1]
    pooled = [row["video_token_pooling"].tolist() for row in rows]
    assert pooled == [[[0, 1], [2, 3], [4, -1], [6, 7]], [[0, 1], [-1, 3]]]


def test_crops_that_stand_apart_are_of_one_image():
    """Step 3.7's."""
    ids = torch.tensor([[9, 9, 1, 9, 9, 1], [1, 1, 9, 9, 1, 1]])
    inputs = {"pixel_values": torch.zeros(2, 3, 4, 4), "pixel_values_local": torch.zeros(1, 3, 4, 4)}
    inputs["num_local_patches"] = torch.tensor([1, 0])
    shown = what_is_shown(Vlm(), ids, inputs)
    assert shown.images == [1, 1] and shown.runs == [[(0, 2), (3, 5)], [(2, 4)]]


def test_video_tokens_and_videos_that_do_not_belong_together():
    model = video_model(spatial_merge_size=2)
    ids = torch.tensor([[8, 8, 8]])
    with pytest.raises(ValueError, match="3 video tokens, but pixel_values_videos is not among its inputs"):
        image_spans(model, ids, {})
    inputs = {"pixel_values_videos": torch.zeros(8, 8), "video_grid_thw": torch.tensor([[2, 2, 2]])}
    with pytest.raises(ValueError, match="3 video tokens, but its 1 video.s. have 2: ids and videos do not belong"):
        image_spans(model, ids, inputs)
