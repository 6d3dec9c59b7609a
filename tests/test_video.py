"""Videos: the target's own answers, frames as runs of the draft head, and batches with images and videos in any row."""

import pytest
import torch
from test_batches import batch_of, check, model_of
from tiny_models import generate
from video_models import VIDEO_FAMILIES, video_prompt, video_target

from vispec.model.families import video_token_id


@pytest.mark.parametrize("method", ["vispec", "lookup"])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize("layout", [".A.", "A.aB", "AB.a"])
def test_answers_are_the_targets(family, layout, method):
    """A video alone, with an image between two of them, and two that touch."""
    target = video_target(family, seed=1)
    model = model_of(target, method)
    inputs = video_prompt(target, 2, layout)
    expected = generate(target, inputs, max_new_tokens=16)
    assert len(set(expected[0, -16:].tolist())) > 2, "an answer that wanders"
    assert torch.equal(model.specgenerate(**inputs, max_new_tokens=16), expected)
    assert torch.equal(model.baseline_generate(**inputs, max_new_tokens=16), expected)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_rows_of_a_batch_get_their_own_images_and_videos(family):
    target = video_target(family, seed=1)
    prompts = [video_prompt(target, seed, layout) for seed, layout in enumerate(["A.aB", "..", "a.", ".B", "A.b"])]
    check(model_of(target, "vispec"), prompts, "specgenerate", max_new_tokens=12)
    batch = batch_of(prompts)
    expected = generate(target, batch, max_new_tokens=12)
    assert torch.equal(model_of(target, "vispec").specgenerate(**batch, max_new_tokens=12), expected)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_each_frame_is_compressed_and_the_last_one_speaks_for_the_video(family):
    target = video_target(family, seed=1)
    model = model_of(target, "vispec")
    inputs = video_prompt(target, 3, ".aA")
    prompt = model.target.prefill(model.target.new_cache(1, 256), inputs["input_ids"], {**inputs, "input_ids": None})
    (runs,) = prompt.images
    shown = (inputs["input_ids"][0] == video_token_id(target.config)).nonzero()[:, 0].tolist()
    frames = 2 if family.startswith("qwen") else 3
    assert len(runs) == 1 + frames and [i for start, end in runs[1:] for i in range(start, end)] == shown
    layout = model.draft.plan([inputs["input_ids"].shape[1]], prompt.images)
    assert layout.last_image.tolist() == [frames]
