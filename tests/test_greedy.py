"""Greedy decoding gives, token for token, what the target's own generate() gives in float32."""

from functools import lru_cache

import pytest
import torch
from tiny_models import (
    FAMILIES,
    RECORDED,
    generate,
    image_prompt,
    random_head,
    random_pair,
    random_target,
    recorded_case,
    recorded_model,
    same_target,
    text_prompt,
)
from transformers import PreTrainedModel

from vispec import SpecModel
from vispec.model import decoding
from vispec.model.drafts import PromptLookup

TREES = ((2, 1, 1), (12, 3, 4), (30, 3, 8), (60, 6, 10))
NEW_TOKENS = 20
LAYOUTS = (".", ".a.", "a.bb.")
"""No image, one, and three of which two touch, the first one at the very start."""


@lru_cache
def target_with_answers(family: str, seed: int):
    """A random target, prompts, and its own answers to them. Seed 2 has a vocabulary below the largest top_k."""
    target = random_target(family, seed, vocabulary=9 if seed == 2 else None)
    prompts = [image_prompt(target, seed, layout) for layout in LAYOUTS]
    return target, [(prompt, generate(target, prompt, max_new_tokens=NEW_TOKENS)) for prompt in prompts]


@lru_cache
def recorded_answers(family: str, method: str):
    """Prompts, and answers of a recorded target to them."""
    target = recorded_model(family, method).target.model
    prompts = [image_prompt(target, seed, layout) for seed, layout in enumerate(LAYOUTS)]
    return [(prompt, generate(target, prompt, max_new_tokens=40)) for prompt in prompts]


class Int8Linear(torch.nn.Module):
    """As quantised layers are: not torch's class, the weight in integers."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("numbers", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.numbers.to(x.dtype) * self.scale)


def test_targets_with_quantised_layers():
    target = random_target("llava_next", seed=4)
    for layer in target.get_decoder().layers:
        for part in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, part, Int8Linear(getattr(layer.mlp, part)))
    inputs = image_prompt(target, 0, "a.b")
    model = SpecModel(target, random_head(target, "vispec", seed=5), total_token=12, depth=2, top_k=4)
    check(model, inputs, generate(target, inputs, max_new_tokens=24), max_new_tokens=24)


def check(model: SpecModel, inputs: dict, expected: torch.Tensor, **options) -> list[int]:
    """Both arms answer as expected; returns the acceptance lengths."""
    answer, lengths = model.specgenerate(**inputs, **options, return_acceptance_len=True)
    assert answer.tolist() == expected.tolist()
    assert model.baseline_generate(**inputs, **options).tolist() == expected.tolist()
    return lengths


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_models(family, seed, tree):
    target, answers = target_with_answers(family, seed)
    head = random_head(target, ("vispec", "eagle2")[seed % 2], seed=seed + 10, num_q=1 + seed)
    model = SpecModel(target, head, *tree)
    lengths = []
    for inputs, expected in answers:
        lengths += check(model, inputs, expected, max_new_tokens=NEW_TOKENS)
    if tree[0] >= 30 and seed == 2:
        assert max(lengths) >= 1, "nothing was accepted, so nothing was tested"


def model_without_attention(target: PreTrainedModel, method: str, tree=(30, 3, 8), seed: int = 0) -> SpecModel:
    """With the drafts that have no decoder layer of their own: Medusa's heads, and prompt lookup."""
    draft = PromptLookup() if method == "lookup" else random_head(target, "medusa", seed=seed + 3)
    return SpecModel(target, draft, *tree)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["medusa", "lookup"])
def test_random_models_with_drafts_without_attention(method, family, seed, tree):
    target, answers = target_with_answers(family, seed)
    model = model_without_attention(target, method, tree, seed)
    lengths = []
    for inputs, expected in answers:
        answer, accepted = model.specgenerate(**inputs, max_new_tokens=NEW_TOKENS, return_acceptance_len=True)
        assert answer.tolist() == expected.tolist()
        length = inputs["input_ids"].shape[1]
        for limit in (1, 2):
            short, rounds = model.specgenerate(**inputs, max_new_tokens=limit, return_acceptance_len=True)
            assert short.tolist() == expected[:, : length + limit].tolist() and len(rounds) == limit - 1
        lengths += accepted
    if tree[0] >= 30 and seed == 2:
        assert max(lengths) >= 1, "nothing was accepted, so nothing was tested"


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("family", "method"), RECORDED)
def test_trained_heads(family, method, tree):
    recorded = recorded_model(family, method)
    model = SpecModel(recorded.target.model, recorded.draft, *tree)
    lengths = []
    for inputs, expected in recorded_answers(family, method):
        lengths += check(model, inputs, expected, max_new_tokens=40)
    if tree[0] >= 12:
        assert max(lengths) >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_one_token(family):
    model = random_pair(family, seed=3, vocabulary=12)
    for seed in range(3):
        inputs = text_prompt(model.target.model, 1, seed)
        check(model, inputs, generate(model.target.model, inputs, max_new_tokens=16), max_new_tokens=16)
        bare = {"input_ids": inputs["input_ids"]}
        check(model, bare, generate(model.target.model, inputs, max_new_tokens=16), max_new_tokens=16)


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
@pytest.mark.parametrize(("family", "method"), RECORDED)
def test_never_more_than_max_new_tokens(family, method, limit):
    model, recording = recorded_model(family, method), recorded_case(family, method, 0)
    length = recording.inputs["input_ids"].shape[1]
    expected = recording.tensors["hf_generate_ids"][:, : length + limit]
    lengths = check(model, recording.inputs, expected, max_new_tokens=limit)
    assert bool(lengths) == (limit > 1)
    check(model, recording.inputs, expected, max_length=length + limit)
    check(model, recording.inputs, expected, max_new_tokens=40, max_length=length + limit)


def end_inside_a_path(model: SpecModel, inputs: dict) -> int | None:
    """A token of the answer that would end it in the middle of an accepted path, and nowhere before."""
    before = set()
    for step in model.stream(**inputs, max_new_tokens=48):
        for place, token in enumerate(step.token_ids):
            if token not in before and place + 1 < sum(step.drafted):
                return token
            before.add(token)
    return None


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_end_token_inside_a_path(family, several):
    recorded, inputs = recorded_model(family, "vispec"), recorded_case(family, "vispec", 2).inputs
    end = end_inside_a_path(recorded, inputs)
    assert end is not None, "no accepted path of this answer has a token in its middle that is new"
    target = same_target(recorded.target.model)
    unused = target.get_input_embeddings().weight.shape[0] - 1
    target.generation_config.eos_token_id = [unused, end] if several else end
    model = SpecModel(target, recorded.draft, recorded.shape.total_token, recorded.shape.depth, recorded.shape.top_k)

    lengths = check(model, inputs, generate(target, inputs, max_new_tokens=48), max_new_tokens=48)
    last = list(model.stream(**inputs, max_new_tokens=48))[-1]
    assert last.token_ids[-1] == end
    assert lengths[-1] > len(last.token_ids), "the path went on behind the end token"
    assert last.drafted == [True] * len(last.token_ids)


@pytest.mark.parametrize("method", ["medusa", "lookup"])
def test_end_token_inside_a_path_without_attention(method):
    """Random models, of which few have such a path: the first one is taken."""
    for seed in range(8):
        target = random_target("qwen2_5_vl", seed, vocabulary=9)
        model = model_without_attention(target, method, seed=seed)
        for inputs in (image_prompt(target, number, layout) for number, layout in enumerate((".", ".a.") * 2)):
            end = end_inside_a_path(model, inputs)
            if end is not None:
                target.generation_config.eos_token_id = end
                model = model_without_attention(target, method, seed=seed)
                expected = generate(target, inputs, max_new_tokens=48)
                lengths = check(model, inputs, expected, max_new_tokens=48)
                assert lengths[-1] > len(list(model.stream(**inputs, max_new_tokens=48))[-1].token_ids)
                return
    pytest.fail("no accepted path of these answers has a token in its middle that is new")


def test_end_token_as_first_token():
    recorded, recording = recorded_model("llava_next", "vispec"), recorded_case("llava_next", "vispec", 0)
    length = recording.inputs["input_ids"].shape[1]
    target = same_target(recorded.target.model)
    target.generation_config.eos_token_id = int(recording.tensors["hf_generate_ids"][0, length])
    model = SpecModel(target, recorded.draft)
    expected = recording.tensors["hf_generate_ids"][:, : length + 1]
    assert check(model, recording.inputs, expected) == []


@pytest.mark.parametrize("layout", [".", "a.bb."])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left(family, layout):
    model = random_pair(family, seed=4, vocabulary=12)
    target = model.target.model
    inputs = image_prompt(target, 4, layout)
    plain = generate(target, inputs, max_new_tokens=12)
    for name, fill in (("input_ids", 0), ("attention_mask", 0)):
        inputs[name] = torch.nn.functional.pad(inputs[name], (4, 0), value=fill)
    expected = torch.nn.functional.pad(plain, (4, 0))
    if layout == ".":  # that transformers' own answer is the same needs no proof for every family and image
        assert torch.equal(generate(target, inputs, max_new_tokens=12), expected)
    check(model, inputs, expected, max_new_tokens=12)
    check(model, inputs, expected, max_length=expected.shape[1])


@pytest.mark.parametrize(("tree", "tokens"), [((2, 6, 1), 120), ((12, 3, 4), 300)])
def test_a_long_answer_outgrows_the_caches(tree, tokens, monkeypatch):
    """Buffers grow on the way, and a path wider than a tiny tree never writes behind the last slot."""
    monkeypatch.setattr(decoding, "CAPACITY_AHEAD", 16)
    model = random_pair("llava_1.5", seed=5, vocabulary=12, tree=tree)
    inputs = text_prompt(model.target.model, 4, seed=5)
    expected = generate(model.target.model, inputs, max_new_tokens=tokens)
    check(model, inputs, expected, max_new_tokens=tokens)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_slots_that_hold_nothing(family, attention, aligned):
    """As on a GPU, where the slots that a mask is for are rounded up; the prompt is read without such a mask."""
    target = random_target(family, 6, vocabulary=12, attention=attention)
    inputs = image_prompt(target, 6, "a.bb.")
    expected = generate(target, inputs, max_new_tokens=12)
    check(SpecModel(target, random_head(target, "vispec", 6)), inputs, expected, max_new_tokens=12)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_eager_attention(family):
    target = random_target(family, 6, vocabulary=12, attention="eager")
    inputs = image_prompt(target, 6, "a.bb.")
    expected = generate(target, inputs, max_new_tokens=12)
    model = SpecModel(target, random_head(target, "vispec", 6))
    assert target.config.get_text_config()._attn_implementation == "eager"
    check(model, inputs, expected, max_new_tokens=12)
