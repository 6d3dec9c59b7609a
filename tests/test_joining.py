"""Answers that join and leave a batch are those of prompts alone."""

import pytest
import torch
from tiny_models import generate, image_prompt, random_pair, text_prompt
from transformers import RepetitionPenaltyLogitsProcessor

from vispec.model.joining import OpenBatch, TooLong
from vispec.model.sampling import Sampling

NEW = 24


@pytest.fixture(scope="module")
def model():
    return random_pair("llava_next", 3)


def run(batch: OpenBatch, joinings: list, every: int = 2) -> list[list[int]]:
    """Tokens of each answer, where one more prompt joins every few rounds."""
    answers, places, waiting, rounds = [[] for _ in joinings], {}, list(enumerate(joinings)), 0
    while waiting or len(batch):
        if waiting and not batch.full and rounds % every == 0:
            place, joining = waiting.pop(0)
            number, first = batch.join(joining)
            answers[place] += first.tokens
            places[number] = place
        rounds += 1
        if len(batch):
            for number, one in batch.round().items():
                answers[places[number]] += one.tokens
    return answers


@pytest.mark.parametrize(("tree", "speculate"), [("30/3/8", True), ("30/3/8", False), ("auto", True), ("talon", True)])
def test_greedy_answers_are_those_of_generate(model, tree, speculate):
    target = model.target.model
    prompts = [text_prompt(target, 5, 1), image_prompt(target, 2), text_prompt(target, 30, 3), image_prompt(target, 4)]
    batch = model.with_tree(tree).open_batch(2, 200, speculate)
    found = run(batch, [batch.prepare(**prompt, max_new_tokens=NEW) for prompt in prompts])
    for prompt, tokens in zip(prompts, found, strict=True):
        expected = generate(target, prompt, max_new_tokens=NEW)[0, prompt["input_ids"].shape[1] :]
        assert tokens == expected.tolist()


def test_rows_are_chosen_in_ways_of_their_own(model):
    target = model.target.model
    prompts = [text_prompt(target, length, length) for length in (6, 9, 12, 7)]
    ways = [
        {},
        {"sampling": Sampling(0.8, 0.9), "seed": 5},
        {"processors": [RepetitionPenaltyLogitsProcessor(1.5)]},
        {"sampling": Sampling(1.3), "seed": 6, "keeps_logits": True},
    ]

    def answers(rows: int, speculate: bool) -> list[list[int]]:
        batch = model.open_batch(rows, 100, speculate)
        joinings = [
            batch.prepare(**prompt, max_new_tokens=NEW, **way) for prompt, way in zip(prompts, ways, strict=True)
        ]
        return run(batch, joinings, every=1)

    together = answers(4, True)
    assert together == answers(1, True) == answers(1, False)
    seeded = model.generate(
        **prompts[1], do_sample=True, temperature=0.8, top_p=0.9, top_k=0, seed=[5], max_new_tokens=NEW
    )
    penalised = model.generate(**prompts[2], repetition_penalty=1.5, max_new_tokens=NEW)
    assert together[1] == seeded[0, 9:].tolist()
    assert together[2] == penalised[0, 12:].tolist()


def test_logits_are_the_targets_own(model):
    target = model.target.model
    prompt = text_prompt(target, 6, 1)
    batch = model.open_batch(2, 100)
    joining = batch.prepare(**prompt, max_new_tokens=NEW, sampling=Sampling(2.0), seed=1, keeps_logits=True)
    number, one = batch.join(joining)
    tokens, logits = list(one.tokens), joining.take_logits(1)
    while len(batch):
        one = batch.round()[number]
        tokens += one.tokens
        logits += joining.take_logits(len(one.tokens))
    text = torch.cat([prompt["input_ids"], torch.tensor([tokens])], dim=1)
    with torch.no_grad():
        expected = target(input_ids=text).logits[0, 5:-1]
    assert len(tokens) == NEW
    torch.testing.assert_close(torch.stack(logits), expected, atol=1e-4, rtol=1e-4)


def test_an_answer_that_leaves_takes_none_with_it(model):
    target = model.target.model
    prompts = [text_prompt(target, length, length) for length in (6, 9, 12)]
    batch = model.open_batch(3, 100)
    numbers, answers = [], {}
    for prompt in prompts:
        number, first = batch.join(batch.prepare(**prompt, max_new_tokens=NEW))
        numbers.append(number)
        answers[number] = list(first.tokens)
    batch.leave(numbers[0])
    while len(batch):
        for number, one in batch.round().items():
            answers[number] += one.tokens
    for prompt, number in list(zip(prompts, numbers, strict=True))[1:]:
        assert (
            answers[number] == generate(target, prompt, max_new_tokens=NEW)[0, prompt["input_ids"].shape[1] :].tolist()
        )
    assert len(answers[numbers[0]]) == 1


def test_what_is_too_long_is_named(model):
    batch = model.open_batch(1, 20)
    with pytest.raises(TooLong, match="room for 20 tokens, found 25: 15 in the prompt, 10 in the answer"):
        batch.prepare(**text_prompt(model.target.model, 15, 1), max_new_tokens=10)
