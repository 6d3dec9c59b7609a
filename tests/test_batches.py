"""Prompts of a batch are answered as each of them alone, and sampled independently of each other."""

import pytest
import torch
from test_sampling import REJECT_BELOW, WARM, V, enumerate_target, p_value
from tiny_models import FAMILIES, image_prompt, random_head, random_target, same_target, text_prompt

from vispec import SpecModel
from vispec.evaluation.families.prompts import batch_of
from vispec.model import decoding
from vispec.model.decoding import Decoder
from vispec.model.drafts import PromptLookup
from vispec.model.families import image_token_id

LAYOUTS = ("a.bb.", ".", ".a.", "..")
"""Three images of which two touch, none, one, and none: prompts of four lengths."""
PADDING = 0


def prompts_of(target) -> list[dict]:
    return [image_prompt(target, seed, layout) for seed, layout in enumerate(LAYOUTS)]


def alone(model: SpecModel, prompt: dict, arm: str, **options) -> tuple[list[int], list]:
    """The answer's tokens, and what else is returned."""
    out, *others = getattr(model, arm)(**prompt, **options, log=True, return_acceptance_len=True)
    return out[0, prompt["input_ids"].shape[1] :].tolist(), others


def check(model: SpecModel, prompts: list[dict], arm: str, **options) -> list[tuple[list[int], list]]:
    """The batch gives every row what it gets alone, tokens and counts; returns that."""
    single = [alone(model, prompt, arm, **options) for prompt in prompts]
    batch = batch_of(prompts)
    out, *others = getattr(model, arm)(**batch, **options, log=True, return_acceptance_len=True)
    length, longest = batch["input_ids"].shape[1], max(len(tokens) for tokens, _ in single)
    assert torch.equal(out[:, :length], batch["input_ids"])
    assert out[:, length:].tolist() == [tokens + [PADDING] * (longest - len(tokens)) for tokens, _ in single]
    assert others == [list(values) for values in zip(*(values for _, values in single), strict=True)]
    return single


def model_of(target, method: str, tree=(12, 3, 4)) -> SpecModel:
    draft = PromptLookup() if method == "lookup" else random_head(target, method, seed=3)
    return SpecModel(target, draft, *tree)


@pytest.mark.parametrize("method", ["vispec", "eagle2", "eagle3", "msd", "specvlm", "medusa", "lookup"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_each_row_alone(family, method):
    """Answers of very different lengths: a frequent token of one row's answer is the end token."""
    if method != "vispec" and family in ("llava_1.5", "qwen2_vl"):
        pytest.skip("the draft does not differ between these families")
    target = same_target(random_target(family, 2, vocabulary=12))
    model = model_of(target, method)
    prompts = prompts_of(target)
    answers = [alone(model, prompt, "baseline_generate", max_new_tokens=16)[0] for prompt in prompts]
    target.generation_config.eos_token_id = answers[0][4]
    model = model_of(target, method)
    single = check(model, prompts, "specgenerate", max_new_tokens=16)
    assert len({len(tokens) for tokens, _ in single}) > 1, "all rows end together, so nothing was tested"
    if method == "vispec":
        check(model, prompts, "baseline_generate", max_new_tokens=16)


@pytest.mark.parametrize("method", ["vispec", "eagle2", "lookup"])
def test_images_take_no_more_of_the_drafts_memory_than_their_vectors(method, monkeypatch):
    """Of what a pass looks at; beside a row whose answer outgrows it, and in larger caches again afterwards."""
    target = same_target(random_target("llava_next", 2, vocabulary=12))
    prompts = [image_prompt(target, 0, "a.b.a."), text_prompt(target, 6, seed=1)]
    monkeypatch.setattr(decoding, "CAPACITY_AHEAD", 8)
    used, draft = [], Decoder._draft

    def watched(self, rows, *args):
        used.append((rows.cache.used, rows.memory.used))
        return draft(self, rows, *args)

    monkeypatch.setattr(Decoder, "_draft", watched)
    check(model_of(target, method), prompts, "specgenerate", max_new_tokens=40)
    image_tokens = int((prompts[0]["input_ids"] == image_token_id(target.config)).sum())
    assert image_tokens > 200
    saved = {whole - drafted for whole, drafted in used if whole > image_tokens}
    assert min(saved) > image_tokens - 10 if method == "vispec" else max(map(abs, saved)) <= 5


def test_limits_of_each_row():
    target = random_target("llava_1.5", 0, vocabulary=12, max_position_embeddings=40)
    model = model_of(target, "vispec")
    prompts = [text_prompt(target, length, seed=length) for length in (4, 36, 30, 40)]
    single = check(model, prompts, "specgenerate", max_new_tokens=9)
    assert [len(tokens) for tokens, _ in single] == [9, 5, 9, 1], "where the positions end"
    batch = batch_of(prompts)
    out, new, *_ = model.specgenerate(**batch, max_length=43, log=True)
    assert out.shape == (4, 43) and new == [3, 3, 3, 1], "padding counts"


def test_a_batch_outgrows_its_caches(monkeypatch):
    monkeypatch.setattr(decoding, "CAPACITY_AHEAD", 4)
    target = random_target("llava_1.5", 5, vocabulary=12)
    prompts = [text_prompt(target, length, seed=length) for length in (3, 9)]
    for method in ("eagle2", "lookup"):
        check(model_of(target, method), prompts, "specgenerate", max_new_tokens=40)


def test_padding_behind_short_answers_is_an_end_token_where_there_is_no_other():
    target = same_target(random_target("llava_1.5", 0, vocabulary=12))
    target.generation_config.pad_token_id = None
    target.generation_config.eos_token_id = [11, *range(6)]
    model = model_of(target, "vispec")
    prompts = [text_prompt(target, 4, seed) for seed in range(3)]
    answers = [alone(model, prompt, "specgenerate", max_new_tokens=12)[0] for prompt in prompts]
    out = model.specgenerate(**batch_of(prompts), max_new_tokens=12)
    longest = max(map(len, answers))
    assert out[:, 4:].tolist() == [tokens + [11] * (longest - len(tokens)) for tokens in answers]
    assert len(set(map(len, answers))) > 1


@pytest.mark.parametrize("method", ["eagle2", "eagle3", "medusa", "lookup"])
def test_sampled_answers_of_every_row_follow_the_target(method):
    target = random_target("llava_1.5", seed=11, vocabulary=V, std=0.15)
    draft = PromptLookup() if method == "lookup" else random_head(target, method, seed=12)
    model = SpecModel(target, draft, total_token=9, depth=1, top_k=4)
    prompts = [text_prompt(target, length, seed) for length, seed in ((3, 1), (6, 2))]
    settings = WARM
    copies = 4  # more rows a call make the test quicker
    batch = batch_of(prompts * copies)
    torch.manual_seed(5)
    answers, accepted = [], 0
    for _ in range(60):
        out, lengths = model.specgenerate(**batch, **settings, max_new_tokens=3, return_acceptance_len=True)
        answers.append(out[:, -3:].unflatten(0, (copies, 2)))
        accepted += sum(map(sum, lengths))
    answers = torch.cat(answers)
    assert accepted > 60, "drafts were accepted"
    for row, prompt in enumerate(prompts):
        exact = enumerate_target(model, prompt["input_ids"], settings)
        assert p_value(answers[:, row], exact) > REJECT_BELOW
    assert p_value(answers[:, 0], enumerate_target(model, prompts[1]["input_ids"], settings)) < REJECT_BELOW


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])}, "^row 1: attention_mask may only hide"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])}, "^row 0: attention_mask may only hide"),
        ({"input_ids": torch.full((2, 1025), 5)}, "^row 0: the prompt has 1025 tokens, the target has 1024 positions"),
        ({"max_length": 4}, "^the prompt has 4 tokens, max_length 4 leaves no room"),
        ({"image_sizes": torch.zeros(3, 2)}, "^image_sizes: expected one entry for each of the 0 images, found 3"),
        ({"image_sizes": True}, "^image_sizes: expected one entry for each of the 0 images, found bool"),
    ],
)
def test_bad_batches_are_refused(changes, message):
    model = model_of(random_target("llava_next", 0), "vispec")
    for arm in (model.specgenerate, model.baseline_generate):
        with pytest.raises(ValueError, match=message):
            arm(**{"input_ids": torch.full((2, 4), 5), **changes})


def test_images_that_do_not_fit_the_batch_are_refused():
    target = random_target("llava_next", 0)
    batch = batch_of(prompts_of(target))
    with pytest.raises(ValueError, match="ids and images do not belong together"):
        model_of(target, "vispec").specgenerate(**{**batch, "image_sizes": batch["image_sizes"][:-1]})


def test_only_single_prompts_are_streamed():
    model = model_of(random_target("llava_1.5", 0), "vispec")
    with pytest.raises(ValueError, match="one prompt at a time can be streamed, found 2"):
        model.stream(torch.full((2, 4), 5))
