"""Videos: the target's own answers, frames as runs of the draft head, and batches with images and videos in any row."""

import pytest
import torch
from test_batches import check, model_of
from tiny_families import family_model
from tiny_models import generate

from vispec.evaluation.families.family import IMAGE, VIDEO
from vispec.evaluation.families.prompts import batch_of, prompt_of
from vispec.evaluation.families.registry import FAMILIES

MIXED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video", "gemma4")
"""Of several ways to lay out videos; docs/models.md has all families."""
FRAMES = {"llava_onevision": 3, "llava_next_video": 3, "perception_lm": 3, "video_llava": 8}
"""Of a video of the first size, where these are not two."""


@pytest.mark.parametrize("method", ["vispec", "lookup"])
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("layout", [".A.", "A.aB.", "AB.a."])
def test_answers_are_the_targets(name, layout, method):
    """A video alone, with an image between two of them, and two that touch."""
    target = family_model(name, seed=2)
    model = model_of(target, method)
    inputs = prompt_of(FAMILIES[name], target, layout, 1)
    expected = generate(target, inputs, max_new_tokens=16)
    assert len(set(expected[0, -16:].tolist())) > 2, "an answer that wanders"
    assert torch.equal(model.specgenerate(**inputs, max_new_tokens=16), expected)
    assert torch.equal(model.baseline_generate(**inputs, max_new_tokens=16), expected)


@pytest.mark.parametrize("name", MIXED)
def test_rows_of_a_batch_get_their_own_images_and_videos(name):
    target = family_model(name)
    layouts = ["A.aB.", "..", "a.", ".B.", "A.b."]
    prompts = [prompt_of(FAMILIES[name], target, layout, seed) for seed, layout in enumerate(layouts)]
    check(model_of(target, "vispec"), prompts, "specgenerate", max_new_tokens=12)
    batch = batch_of(prompts)
    expected = generate(target, batch, max_new_tokens=12)
    assert torch.equal(model_of(target, "vispec").specgenerate(**batch, max_new_tokens=12), expected)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.videos and name != "kimi_k25"])
def test_each_frame_is_compressed_and_the_last_one_speaks_for_the_video(name):
    target = family_model(name)
    model = model_of(target, "vispec")
    inputs = prompt_of(FAMILIES[name], target, "..A.", 3)
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    prompt = model.target.prefill(model.target.new_cache(1, 256), inputs["input_ids"], rest)
    ((*runs,),) = prompt.images
    shown = torch.isin(inputs["input_ids"][0], torch.tensor([IMAGE, VIDEO])).nonzero()[:, 0].tolist()
    assert len(runs) == FRAMES.get(name, 2) and [i for start, end in runs for i in range(start, end)] == shown
    layout = model.draft.plan([inputs["input_ids"].shape[1]], prompt.images)
    assert layout.last_image.tolist() == [len(runs) - 1]
