"""Answers in batches: those of one prompt at a time, by nothing but the target's own probabilities."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import image_prompt, random_target, reference_inputs
from tiny_rows import TARGETS

from vispec.ge_data.batch_generate import SeededSampling, collate_prompts, generate_answers
from vispec.ge_data.jobs import ImageJob, Settings
from vispec.ge_data.sources import Rows
from vispec.model.target import Target

LAYOUTS = ["a.", "..a.b.", "....a.", ".a..", "a.b.c"]
SIZES = [(40, 60), (90, 50), (56, 56), (28, 84), (70, 70)]


@pytest.fixture(scope="module", params=["llava_next", "qwen2_5_vl"])
def asked(request):
    """A random target whose answers wander, and prompts of different lengths with images of different sizes."""
    target = Target(random_target(request.param, seed=3))
    prompts = [image_prompt(target.model, seed, layout) for seed, layout in enumerate(LAYOUTS)]
    return target, [reference_inputs(target.model, prompt) for prompt in prompts]


def one_at_a_time(target, prompts, limits, *sampling, seeds=()):
    seeds = seeds or [0] * len(prompts)
    return [
        generate_answers(target, [prompt], [limit], *sampling, seeds=[seed])[0].tolist()
        for prompt, limit, seed in zip(prompts, limits, seeds, strict=True)
    ]


def test_a_batch_s_answers_are_those_of_one_at_a_time(asked):
    target, prompts = asked
    limits = [16, 16, 7, 16, 1]
    alone = one_at_a_time(target, prompts, limits)
    assert [answer.tolist() for answer in generate_answers(target, prompts, limits)] == alone
    assert [len(answer) for answer in alone] == limits and len({tuple(answer[:7]) for answer in alone}) > 2


def test_a_sampled_answer_depends_on_its_seed_alone(asked):
    target, prompts = asked
    limits, seeds = [12] * 5, [4, 5, 6, 7, 8]
    alone = one_at_a_time(target, prompts, limits, 1.0, seeds=seeds)
    assert [answer.tolist() for answer in generate_answers(target, prompts, limits, 1.0, seeds)] == alone
    turned = generate_answers(target, prompts[::-1], limits, 1.0, seeds[::-1])
    assert [answer.tolist() for answer in turned[::-1]] == alone
    others = generate_answers(target, prompts, limits, 1.0, [seed + 100 for seed in seeds])
    assert all(answer.tolist() != found for answer, found in zip(others, alone, strict=True))


def test_samples_have_the_softmax_s_probabilities():
    count, temperature = 6000, 0.7
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    sampling = SeededSampling(temperature, range(count), torch.device("cpu"))
    drawn = sampling(torch.zeros(count, 1), logits.expand(count, -1)).argmax(-1)
    expected = count * (logits / temperature).softmax(-1)
    found = drawn.bincount(minlength=len(logits))
    assert ((found - expected) ** 2 / expected).sum() < 20.5  # of 5 degrees of freedom: one in a thousand is larger


def test_the_target_s_sampling_defaults_do_not_reach_the_answers(asked):
    target, prompts = asked
    limits = [12] * len(prompts)
    plain = [answer.tolist() for answer in generate_answers(target, prompts, limits)]
    own, end = target.model.generation_config, target.eos_token_ids
    try:
        target.model.generation_config = type(own)(
            do_sample=True, temperature=5.0, top_p=0.5, top_k=3, typical_p=0.5, repetition_penalty=3.0,
            no_repeat_ngram_size=1, suppress_tokens=sorted({token for answer in plain for token in answer}),
            min_new_tokens=9, pad_token_id=0,
        )  # fmt: skip
        assert [answer.tolist() for answer in generate_answers(target, prompts, limits)] == plain
        target.eos_token_ids = [plain[0][3], plain[1][2]]
        ended = generate_answers(target, prompts, limits)
    finally:
        target.model.generation_config, target.eos_token_ids = own, end
    for answer, whole in zip(ended, plain, strict=True):
        ends = [i for i, token in enumerate(whole) if token in (plain[0][3], plain[1][2])]
        assert answer.tolist() == whole[: min(ends, default=len(whole)) + 1]


def test_a_prompt_close_to_the_limit_cuts_its_own_answer_only(tmp_path):
    from transformers import AutoProcessor

    target = Target(random_target("llava_next", seed=3))
    target.lm_head.weight.data[target.config.image_token_index] = 0  # so that no answer has an image tag
    rows = []
    for i, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "conversations": [{"from": "human", "value": "<image>" + "what?" * i}]})
    rows = Rows(rows, range(len(rows)), tmp_path)
    processor = AutoProcessor.from_pretrained(TARGETS["llava"])

    def made(limit, batch):
        settings = Settings("llava", max_len=limit, max_new_tokens=12, store="tokens")
        job = ImageJob(target, processor, tmp_path, settings)
        groups = [range(len(rows))] if batch else [[i] for i in range(len(rows))]
        found = dict(pair for group in groups for pair in job.samples(rows.at(group), group))
        return {i: str(o) if isinstance(o, Exception) else o.input_ids.tolist() for i, o in found.items()}

    lengths = {i: len(ids) - 12 for i, ids in made(None, batch=True).items()}
    limit = sorted(lengths.values())[-2] + 2
    together = made(limit, batch=True)
    assert together == made(limit, batch=False)
    for i, length in lengths.items():
        if length >= limit:
            assert together[i] == "prompt exceeds the length limit"
        else:
            assert len(together[i]) == min(length + 12, limit)
    # positions are limited without --max-len too
    target.max_positions = limit
    assert made(None, batch=True) == together


def test_images_of_different_tiles_in_one_batch():
    """With the mask of their pixels, as SmolVLM's processor gives it."""
    prompts = [
        {
            "input_ids": torch.ones(1, 5, dtype=torch.long),
            "pixel_values": torch.ones(1, tiles, 3, 4, 4),
            "pixel_attention_mask": torch.ones(1, tiles, 4, 4, dtype=torch.long),
        }
        for tiles in (13, 17)
    ]
    batch = collate_prompts(prompts, 0)
    assert batch["pixel_values"].shape == (2, 17, 3, 4, 4) and batch["pixel_attention_mask"].shape == (2, 17, 4, 4)
    assert batch["pixel_attention_mask"][0, 13:].sum() == batch["pixel_values"][0, 13:].sum() == 0
