"""Images in the layouts of many processors: the target's own answers, runs that are images, rows that get their own."""

import pytest
import torch
from layout_models import IMAGE, LAYOUTS, layout_batch, layout_model, layout_prompt
from test_batches import PADDING, alone, model_of
from tiny_models import generate

PROMPTS = ("a.b.", "..", ".a", "bb.")


@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_are_the_targets(name):
    target = layout_model(name)
    model = model_of(target, "vispec")
    for seed, layout in enumerate([".a.b", "ab.", "bbba."]):
        inputs = layout_prompt(name, seed, layout)
        expected = generate(target, inputs, max_new_tokens=12)
        assert torch.equal(model.specgenerate(**inputs, max_new_tokens=12), expected), layout


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"fuyu"}))  # Fuyu's inputs do not tell where an image ends
def test_every_image_is_one_run(name):
    target = layout_model(name)
    model = model_of(target, "vispec")
    inputs = layout_prompt(name, 0, "ab.a")
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    (runs,) = model.target.prefill(model.target.new_cache(1, 256), inputs["input_ids"], rest).images
    assert len(runs) == 3
    ids = inputs["input_ids"][0]
    assert all(ids[start] == ids[end - 1] == IMAGE for start, end in runs)
    within = torch.cat([ids[start:end] for start, end in runs])
    assert (within == IMAGE).sum() == (ids == IMAGE).sum() and (within >= IMAGE).all(), "no text, but breaks"


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_a_batch_get_their_own_images(name):
    target = layout_model(name)
    model = model_of(target, "vispec")
    prompts = [layout_prompt(name, seed, layout) for seed, layout in enumerate(PROMPTS)]
    batch = layout_batch(name, prompts, PADDING)
    out = model.specgenerate(**batch, max_new_tokens=12)
    assert torch.equal(out, generate(target, batch, max_new_tokens=12))
    for row, prompt in zip(out.tolist(), prompts, strict=True):
        assert row[-12:] == alone(model, prompt, "specgenerate", max_new_tokens=12)[0]
