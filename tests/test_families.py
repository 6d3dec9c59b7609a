"""Where the images of a prompt are, touching ones too, as each family's processor and model count them."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_models import GOLDEN, LLAVA_NEXT_TOKENS, image_prompt, random_target
from transformers import AutoProcessor

from vispec.model.families import image_spans


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


def test_a_family_that_is_not_listed_must_keep_images_apart():
    model = SimpleNamespace(config=SimpleNamespace(model_type="unheard_of", image_token_id=9))
    apart, touching = torch.tensor([[9, 9, 1, 9]]), torch.tensor([[9, 9, 9, 1]])
    inputs = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    assert image_spans(model, apart, inputs) == [[(0, 2), (3, 4)]]
    with pytest.raises(ValueError, match="unheard_of: 2 images fill 1 stretch.* put text between the images"):
        image_spans(model, touching, inputs)
    with pytest.raises(ValueError, match="2 images fill 1 stretch"):
        image_spans(model, touching, {"pixel_values": torch.zeros(2, 5, 3, 4, 4)})


def test_an_image_of_a_pixtral_tower_has_as_many_tokens_as_its_size_asks_for():
    config = SimpleNamespace(model_type="llava", image_token_id=9, vision_config=SimpleNamespace(model_type="pixtral"))
    ids = torch.tensor([[9, 9, 7, 9, 9, 7, 1]])
    spans = image_spans(SimpleNamespace(config=config), ids, {"pixel_values": torch.zeros(1, 3, 8, 8)})
    assert spans == [[(0, 2), (3, 5)]]


@pytest.mark.parametrize(
    ("tower", "strategy", "tokens"),
    [("clip_vision_model", "full", 17), ("clip_vision_model", "default", 16), ("siglip_vision_model", "full", 16)],
)
def test_the_class_token_counts_where_there_is_one(tower, strategy, tokens):
    vision = SimpleNamespace(image_size=28, patch_size=7, model_type=tower)
    config = SimpleNamespace(
        model_type="llava", image_token_id=9, vision_config=vision, vision_feature_select_strategy=strategy
    )
    ids = torch.tensor([[1, *[9] * tokens, 1]])
    inputs = {"pixel_values": torch.zeros(1, 3, 28, 28)}
    assert image_spans(SimpleNamespace(config=config), ids, inputs) == [[(1, 1 + tokens)]]
