"""`SpecModel.generate` answers as the target's own generate(): every option, alone and in random combinations."""

import random

import pytest
import torch
from generations import END, NEW, both, model_of
from test_batches import batch_of, prompts_of
from tiny_models import FAMILIES, image_prompt, reference_inputs, same_target, text_prompt
from transformers import GenerationConfig, LogitsProcessor

from vispec import SpecModel

OPTIONS = {
    "repetition_penalty": 1.3,
    "encoder_repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[5], [8, 9], [11, 3]],
    "sequence_bias": [[[4], 1.5], [[8, 3], 4.0], [[9], -2.0]],
    "min_new_tokens": 9,
    "min_length": 30,
    "forced_eos_token_id": END,
    "forced_bos_token_id": 4,
    "exponential_decay_length_penalty": (5, 1.2),
    "suppress_tokens": [4, 6],
    "begin_suppress_tokens": [3, 8, 9],
    "prefix_allowed_tokens_fn": lambda row, text: [token for token in range(12) if (int(text[-1]) + token + row) % 3],
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "watermarking_config": {"greenlist_ratio": 0.4, "bias": 3.0, "seeding_scheme": "lefthash", "context_width": 1},
    "eos_token_id": [END, 3],
    "max_new_tokens": 13,
}
"""Of greedy decoding."""


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(name):
    """Alone, for one prompt and, in another family, for a batch; each of them changes something."""
    plain, changed = [], []
    # minimal lengths need answers that would end early
    ends = {"eos_token_id": [END, 8, 9]} if name.startswith("min_") else {"eos_token_id": END}
    for family, rows in (("llava_1.5", 1), ("qwen2_5_vl", 4)):
        model = model_of(family)
        inputs = batch_of(prompts_of(model.target.model)[:rows])
        plain += model.generate(**inputs, max_new_tokens=NEW, **ends).tolist()
        changed += both(model, inputs, **ends | {name: OPTIONS[name]})
    if name not in ("remove_invalid_values", "renormalize_logits", "forced_bos_token_id"):
        assert changed != plain, "the option has no say here, so nothing was tested"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_random_combinations(family, seed):
    chance = random.Random(seed)
    model = model_of(family, seed, chance.choice(("vispec", "eagle2", "medusa"))).with_tree(
        chance.choice(("2/0/1", "12/3/4", "30/3/8", "auto"))
    )
    prompts = prompts_of(model.target.model)
    for inputs in (*prompts[:2], batch_of(prompts)):
        names = chance.sample(sorted(OPTIONS), 4)
        both(model, inputs, **{name: OPTIONS[name] for name in names})


def test_the_targets_own_defaults_hold():
    """Those of its generation config, and those of generate(): 20 new tokens."""
    model = model_of("qwen2_5_vl")
    target = same_target(model.target.model)
    own = SpecModel(target, model.draft, tree="12/3/4")
    inputs = image_prompt(target, 1, ".a.")
    length = inputs["input_ids"].shape[1]
    plain = own.generate(**inputs)
    assert plain.shape[1] == length + 20
    for name, value in {"repetition_penalty": 1.4, "suppress_tokens": [4, 6], "eos_token_id": END}.items():
        setattr(target.generation_config, name, value)
        expected = target.generate(**reference_inputs(target, inputs))
        assert torch.equal(own.generate(**inputs), expected)
    assert not torch.equal(expected, plain)
    # a config that is given, and arguments that win over it
    config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.1, pad_token_id=0)
    for options in ({"generation_config": config}, {"generation_config": config, "max_new_tokens": 12}):
        expected = target.generate(**reference_inputs(target, inputs), **options)
        assert torch.equal(own.generate(**inputs, **options), expected)
    assert own.generate(**inputs, max_length=length + 3).shape[1] == length + 3


# --- processors of users ---


class Prefers(LogitsProcessor):
    """Likes tokens that continue an arithmetic progression: reads the last two tokens and the length."""

    def __call__(self, input_ids, scores):
        wanted = (2 * input_ids[:, -1] - input_ids[:, -2] + input_ids.shape[1]) % 12
        return scores.scatter_add(1, wanted[:, None], torch.full_like(scores[:, :1], 4.0))


class Counts(LogitsProcessor):
    """Remembers how often it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.tolist())
        return scores


class ByPlace(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + torch.arange(len(scores))[:, None] * torch.arange(scores.shape[1])


def test_processors_of_users():
    model = model_of("llava_1.5")
    prompts = prompts_of(model.target.model)
    for inputs in (prompts[0], batch_of(prompts)):
        assert both(model, inputs, logits_processor=[Prefers()]) != both(model, inputs)


def test_a_processor_is_called_as_by_generate():
    """Once for each token of the answer, with the text before it; so even one that remembers says the same."""
    model = model_of("llava_1.5")
    inputs = text_prompt(model.target.model, 5, seed=1)
    calls = []
    for generate in (model.generate, model.target.model.generate):
        counts = Counts()
        generate(**inputs, max_new_tokens=NEW, logits_processor=[counts])
        calls.append(counts.calls)
    assert calls[0] == calls[1] and len(calls[0]) == NEW


def test_a_processor_that_looks_at_the_place_of_a_row_is_refused():
    model = model_of("llava_1.5")
    prompts = prompts_of(model.target.model)
    both(model, prompts[0], logits_processor=[ByPlace()])
    with pytest.raises(ValueError, match="ByPlace does not treat a row of a batch as it treats the row alone"):
        model.generate(**batch_of(prompts), logits_processor=[ByPlace()])


@pytest.mark.parametrize("rows", [1, 4])
def test_processors_between_captured_steps(rows, request):
    model = model_of("llava_1.5")
    inputs = batch_of(prompts_of(model.target.model)[:rows])
    options = {"max_new_tokens": NEW, "eos_token_id": END, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    expected = both(model, inputs, **options)
    captures = request.getfixturevalue("captures")
    captured = SpecModel(model.target.model, model.draft, tree="12/3/4")
    for _ in range(2):
        assert captured.generate(**inputs, **options).tolist() == expected
    assert {kind for kind, *_ in captures} == {"draft", "verify", "keep"} and set(captures.values()) == {1}
