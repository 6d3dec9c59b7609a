"""Images in the layouts of many processors: the target's own answers, runs that are images, rows that get their own."""

import pytest
import torch
from test_batches import alone, model_of
from tiny_families import OF_5, family_model
from tiny_models import generate

from vispec.evaluation.families.family import BREAK, IMAGE
from vispec.evaluation.families.prompts import batch_of, prompt_of
from vispec.evaluation.families.registry import FAMILIES

LAYOUTS = ["vipllava", "video_llava", "internvl", "got_ocr2", "perception_lm", "idefics2", "idefics3", "smolvlm"]
LAYOUTS += ["llava (Pixtral)", "mistral3", "paddleocr_vl", "ernie4_5_vl_moe", "video_llama_3", "molmo2"]
LAYOUTS += ["llava_onevision"]
if OF_5:
    LAYOUTS += ["fuyu"]
PROMPTS = ("a.b.", "..", ".a", "bb.")


def layout_prompt(name: str, model, seed: int, layout: str) -> dict[str, torch.Tensor]:
    return prompt_of(FAMILIES[name], model, layout, seed)


@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_are_the_targets(name):
    target = family_model(name)
    model = model_of(target, "vispec")
    for seed, layout in enumerate([".a.b", "ab.", "bbba."]):
        inputs = layout_prompt(name, target, seed, layout)
        expected = generate(target, inputs, max_new_tokens=12)
        assert torch.equal(model.specgenerate(**inputs, max_new_tokens=12), expected), layout


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "fuyu"])  # its inputs do not tell where one ends
def test_every_image_is_one_run(name):
    target = family_model(name)
    model = model_of(target, "vispec")
    inputs = layout_prompt(name, target, 0, "ab.a")
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    (runs,) = model.target.prefill(model.target.new_cache(1, 512), inputs["input_ids"], rest).images
    assert len(runs) == 3
    ids = inputs["input_ids"][0]
    assert all(ids[start] == ids[end - 1] == IMAGE for start, end in runs)
    within = torch.cat([ids[start:end] for start, end in runs])
    assert (within == IMAGE).sum() == (ids == IMAGE).sum() and (within >= BREAK).all(), "no text, but breaks"


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_a_batch_get_their_own_images(name):
    target = family_model(name)
    model = model_of(target, "vispec")
    prompts = [layout_prompt(name, target, seed, layout) for seed, layout in enumerate(PROMPTS)]
    batch = batch_of(prompts, FAMILIES[name].join)
    out = model.specgenerate(**batch, max_new_tokens=12)
    assert torch.equal(out, generate(target, batch, max_new_tokens=12))
    for row, prompt in zip(out.tolist(), prompts, strict=True):
        assert row[-12:] == alone(model, prompt, "specgenerate", max_new_tokens=12)[0]
