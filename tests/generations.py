"""Models and comparisons for the tests of `SpecModel.generate`."""

from functools import lru_cache

import torch
from tiny_models import random_head, random_target, reference_inputs

from vispec import SpecModel

NEW = 24
END = 7
"""An end token that greedy answers of these targets meet now and then."""


@lru_cache
def model_of(family: str, seed: int = 2, method: str = "vispec") -> SpecModel:
    """Shared by all tests, which leave it as it is."""
    target = random_target(family, seed, vocabulary=12)
    return SpecModel(target, random_head(target, method, seed=3), tree="12/3/4")


def both(model: SpecModel, inputs: dict, **options) -> list[list[int]]:
    """What both generate() say with the same options."""
    defaults = {"max_new_tokens": NEW, "eos_token_id": END}
    target = model.target.model
    with torch.inference_mode():
        expected = target.generate(**reference_inputs(target, inputs), **defaults | options)
    assert model.generate(**inputs, **defaults | options).tolist() == expected.tolist()
    return expected.tolist()
