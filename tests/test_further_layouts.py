"""Families of transformers, most of them of 5 alone: the target's own answers by every draft, and in batches."""

import pytest
import torch
from further_layouts import FURTHER
from layout_models import VOCABULARY, layout_batch, layout_model, layout_prompt
from oracle import oracle
from test_batches import PADDING, model_of
from tiny_models import generate

from vispec import SpecModel

NEW = 24


@pytest.mark.parametrize("name", FURTHER)
def test_answers_are_the_targets(name, monkeypatch):
    layout = FURTHER[name]
    target = layout_model(layout)
    prompts = [layout_prompt(layout, seed, pieces) for seed, pieces in enumerate(["..", ".a.", ".a.b.", ".ab."])]
    expected = [generate(target, inputs, max_new_tokens=NEW) for inputs in prompts]
    for method in ("vispec", "eagle2", "lookup"):
        model = model_of(target, method)
        for inputs, text in zip(prompts, expected, strict=True):
            assert torch.equal(model.specgenerate(**inputs, max_new_tokens=NEW), text), method
    for inputs, text in zip(prompts, expected, strict=True):
        assert torch.equal(model.baseline_generate(**inputs, max_new_tokens=NEW), text)
        knowing = SpecModel(target, oracle(monkeypatch, list(text), VOCABULARY), tree="12/3/4")
        out, new, last = knowing.specgenerate(**inputs, max_new_tokens=NEW, log=True)
        assert torch.equal(out, text) and last < new / 2, "its tokens are accepted"


@pytest.mark.parametrize("name", FURTHER)
def test_rows_of_a_batch_get_their_own_images(name):
    layout = FURTHER[name]
    target = layout_model(layout)
    prompts = [layout_prompt(layout, seed, pieces) for seed, pieces in enumerate([".a.b.", "..", ".a."])]
    out = model_of(target, "vispec").specgenerate(**layout_batch(layout, prompts, PADDING), max_new_tokens=NEW)
    for row, inputs in zip(out, prompts, strict=True):
        assert torch.equal(row[-NEW:], generate(target, inputs, max_new_tokens=NEW)[0, -NEW:])
