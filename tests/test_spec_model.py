"""`SpecModel` as users call it: side by side, in threads, closed early, with bad input, in half precision."""

import copy
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tiny_models import (
    FAMILIES,
    GOLDEN,
    generate,
    image_prompt,
    random_head,
    random_pair,
    random_target,
    read_prompt,
    recorded_case,
    recorded_model,
    same_target,
    text_prompt,
)

from vispec import SpecModel
from vispec.model.watching import watching_prompt

PROMPT = torch.tensor([[5, 6, 7, 8]])


def hooks(model: SpecModel) -> int:
    """Hooks of ours on any module of the target; transformers 5 leaves some of its own."""
    modules = list(model.target.model.modules())
    left = [hook for m in modules for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return sum(getattr(hook, "__module__", "").startswith("vispec") for hook in left)


def prompts_and_answers(family: str, method: str) -> list[tuple[dict, list[int]]]:
    cases = [recorded_case(family, method, case) for case in range(3)]
    answers = [case.tensors["hf_generate_ids"][0, case.inputs["input_ids"].shape[1] :].tolist() for case in cases]
    return list(zip([case.inputs for case in cases], answers, strict=True))


# --- side by side ---


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_interleaved_generations(family):
    """Qwen's model remembers the last prompt's position offset, so generations could disturb each other there."""
    model = recorded_model(family, "vispec")
    jobs = prompts_and_answers(family, "vispec")
    streams = [model.stream(**inputs, max_new_tokens=48) for inputs, _ in jobs]
    streams += [model.stream(**inputs, max_new_tokens=48, speculate=False) for inputs, _ in jobs]
    texts: list[list[int]] = [[] for _ in streams]
    running = dict(enumerate(streams))
    while running:
        for number, stream in list(running.items()):
            step = next(stream, None)
            if step is None:
                del running[number]
            else:
                texts[number] += step.token_ids
    assert texts == [answer for _, answer in jobs] * 2


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_two_threads(family):
    model = recorded_model(family, "vispec")
    jobs = prompts_and_answers(family, "vispec")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # many more chances to disturb each other
    try:
        start = threading.Barrier(2)

        def work(first: int) -> list[bool]:
            start.wait()
            right = []
            for repetition in range(3):
                inputs, answer = jobs[(first + repetition) % 3]
                out = model.specgenerate(**inputs, max_new_tokens=24)
                right.append(out[0, inputs["input_ids"].shape[1] :].tolist() == answer[:24])
            return right

        with ThreadPoolExecutor(2) as pool:
            assert [*pool.map(work, (0, 2))] == [[True] * 3] * 2
    finally:
        sys.setswitchinterval(before)
    assert hooks(model) == 0


def test_another_thread_may_meet_a_hook_that_is_half_there():
    """Between torch's two tables of a hook a pass of another thread calls it without kwargs."""
    target = recorded_model("llava_next", "vispec").target
    with watching_prompt(target.decoder, target.embed_tokens, target.lm_head) as seen:
        assert hooks(recorded_model("llava_next", "vispec")) == 3
        (hook,) = target.decoder._forward_pre_hooks.values()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(hook, target.decoder, ()).result() is None
    assert not seen


@pytest.mark.parametrize("method", ["specgenerate", "baseline_generate"])
def test_pictures_are_seen_once_and_a_prompt_gets_one_row_of_logits(method):
    model, (inputs, _) = recorded_model("llava_next", "vispec"), prompts_and_answers("llava_next", "vispec")[0]
    (tower,) = [module for name, module in model.target.model.named_modules() if name.endswith("vision_tower")]
    seen, rows = [], []
    watched = [
        tower.register_forward_hook(lambda *call: seen.append(call)),
        model.target.lm_head.register_forward_hook(lambda head, args, logits: rows.append(logits.shape[:-1].numel())),
    ]
    try:
        getattr(model, method)(**inputs, max_new_tokens=24)
    finally:
        for handle in watched:
            handle.remove()
    assert inputs["input_ids"].shape[1] > 60 and len(seen) == 1
    assert rows[0] == 1 and max(rows) <= model.shape.total_token


# --- streaming ---


def test_stream_tells_who_named_each_token():
    model, (inputs, answer) = recorded_model("llava_next", "vispec"), prompts_and_answers("llava_next", "vispec")[0]
    first, *rounds = model.stream(**inputs, max_new_tokens=48)
    assert first.drafted == [False] and first.accepted is None
    assert first.token_ids + [t for r in rounds for t in r.token_ids] == answer
    for step in rounds[:-1]:
        assert len(step.token_ids) == step.accepted + 1
        assert step.drafted == [True] * step.accepted + [False]
    plain = [(step.drafted, step.accepted) for step in model.stream(**inputs, max_new_tokens=8, speculate=False)]
    assert plain == [([False], None)] * 8


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_closing_a_stream_leaves_nothing_behind(family):
    model = recorded_model(family, "vispec")
    jobs = prompts_and_answers(family, "vispec")
    for rounds in (0, 1, 2):
        stream = model.stream(**jobs[0][0], max_new_tokens=48)
        for _ in range(rounds):
            next(stream)
        stream.close()
        assert hooks(model) == 0
        assert next(stream, None) is None
    inputs, answer = jobs[2]
    out = model.specgenerate(**inputs, max_new_tokens=48)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == answer


@pytest.mark.parametrize("speculate", [True, False])
@pytest.mark.parametrize("leave", ["close", "raise"])
def test_leaving_a_stream_ends_its_generation_at_once(leave, speculate, monkeypatch):
    """Also an exception in the user's own loop, and while someone else, a debugger say, still holds the generation."""
    model = copy.copy(recorded_model("llava_next", "vispec"))
    inputs, answer = prompts_and_answers("llava_next", "vispec")[0]
    held, rounds = [], model._rounds
    monkeypatch.setattr(model, "_rounds", lambda *args, **kwargs: held.append(rounds(*args, **kwargs)) or held[-1])
    if leave == "close":
        stream = model.stream(**inputs, speculate=speculate)
        next(stream)
        stream.close()
    else:
        with pytest.raises(ZeroDivisionError):
            for step in model.stream(**inputs, speculate=speculate):
                len(step.token_ids) / 0
    assert held[0].gi_frame is None, "the generation goes on"
    assert hooks(model) == 0 and not model.target._prefill_lock.locked()
    assert model.specgenerate(**inputs, max_new_tokens=6)[0, -6:].tolist() == answer[:6]


def test_a_prompt_that_fails_leaves_nothing_behind():
    model, (inputs, answer) = recorded_model("llava_next", "vispec"), prompts_and_answers("llava_next", "vispec")[0]
    with pytest.raises(Exception, match="shape|size|dimension|channels"):
        model.specgenerate(**{**inputs, "pixel_values": inputs["pixel_values"][:, :, :1]})
    assert hooks(model) == 0
    assert not model.target._prefill_lock.locked()
    assert model.specgenerate(**inputs, max_new_tokens=6)[0, -6:].tolist() == answer[:6]


# --- what is returned ---


@pytest.mark.parametrize("arm", ["specgenerate", "baseline_generate"])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("seconds", [False, True])
def test_return_values(arm, log, lengths, seconds):
    model, (inputs, answer) = recorded_model("llava_next", "vispec"), prompts_and_answers("llava_next", "vispec")[0]
    result = getattr(model, arm)(
        **inputs, max_new_tokens=9, log=log, return_acceptance_len=lengths, return_decode_time=seconds
    )
    if not (log or lengths or seconds):
        result = (result,)
    assert isinstance(result, tuple)
    output_ids, *others = result
    assert output_ids.dtype == inputs["input_ids"].dtype
    assert output_ids.tolist() == [inputs["input_ids"][0].tolist() + answer[:9]]
    rounds = 2 if arm == "specgenerate" else 8  # two paths of four and what the target names after them
    if log:
        new_tokens, last, *others = others
        assert (type(new_tokens), new_tokens, type(last), last) == (int, 9, int, rounds - 1)
    if lengths:
        accepted, *others = others
        assert accepted == ([4, 4] if arm == "specgenerate" else []), "of rounds with a draft alone"
        assert all(type(count) is int for count in accepted)
    if seconds:
        (time,) = others
        assert type(time) is float and time > 0
        others = []
    assert others == []


def test_return_values_when_the_prompts_pass_is_enough():
    model, (inputs, answer) = recorded_model("llava_next", "vispec"), prompts_and_answers("llava_next", "vispec")[0]
    out, new_tokens, last, lengths = model.specgenerate(
        **inputs, max_new_tokens=1, log=True, return_acceptance_len=True
    )
    assert (out[0, -1], new_tokens, last, lengths) == (answer[0], 1, -1, [])


# --- what is refused ---


@pytest.mark.parametrize("arm", ["specgenerate", "baseline_generate", "stream"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": PROMPT[:, :0]}, r"shape \(B, L\) with B, L > 0, found \(1, 0\)"),
        ({"input_ids": PROMPT[0]}, r"shape \(B, L\) with B, L > 0, found \(4,\)"),
        ({"pixel_values_videos": torch.zeros(1)}, "takes no video, found pixel_values_videos"),
        ({"input_ids": torch.full((1, 1025), 5)}, "the prompt has 1025 tokens, the target has 1024 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
        ({"max_length": 4}, "the prompt has 4 tokens, max_length 4 leaves no room"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "only hide padding on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "only hide padding on the left"),
        ({"attention_mask": torch.zeros(1, 4)}, "only hide padding on the left"),
        ({"attention_mask": torch.ones(1, 5)}, r"must have the shape \(1, 4\) of input_ids, found \(1, 5\)"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"top_p": 2.0}, "top_p must be between 0 and 1"),
    ],
)
def test_bad_input_is_refused_at_once(arm, arguments, message, monkeypatch):
    model = recorded_model("llava_next", "vispec")
    monkeypatch.setattr(model.target, "prefill", lambda *_: pytest.fail("work before the check"))
    with pytest.raises(ValueError, match=message):
        getattr(model, arm)(**{"input_ids": PROMPT, **arguments})


def test_an_answer_ends_where_the_positions_do(caplog):
    target = random_target("llava_1.5", 0, vocabulary=12, max_position_embeddings=20)
    model = SpecModel(target, random_head(target, "vispec", 0))
    inputs = text_prompt(target, 15, seed=0)
    # the last of them is never fed back, so it needs no position
    assert model.specgenerate(**inputs).shape == model.baseline_generate(**inputs).shape == (1, 21)
    notice = "the prompt has 15 tokens, the target 20 positions: the answer ends after 6 tokens at the latest"
    assert [record.getMessage() for record in caplog.records] == [notice] * 2
    assert model.specgenerate(**inputs, max_new_tokens=6).shape == (1, 21) and len(caplog.records) == 2


def test_a_model_without_draft_head_has_the_baseline():
    model = SpecModel.from_pretrained(str(GOLDEN / "llava_next" / "target"))
    inputs, answer = prompts_and_answers("llava_next", "vispec")[1]
    assert model.baseline_generate(**inputs, max_new_tokens=5)[0, -5:].tolist() == answer[:5]
    with pytest.raises(ValueError, match="without a draft head"):
        model.specgenerate(**inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_token": 1}, "^total_token must be at least 2, found 1$"),
        ({"method": "eagle1"}, "^method 'eagle1' is not one of vispec, eagle2, .*, medusa, vlm, lookup$"),
        ({"spec_model_path": str(GOLDEN)}, "^.*golden: no config.json there$"),
        ({"spec_model_path": "not/a/hub/id"}, "^not/a/hub/id: neither a folder nor a hub id$"),
    ],
)
def test_what_is_wrong_with_a_draft_is_said_before_loading(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpecModel.from_pretrained("someone/nowhere", **arguments)


# --- notices ---


def test_what_is_not_applied_is_said_once(caplog):
    """Where it is not applied, that is not by generate()."""
    target = same_target(recorded_model("qwen2_5_vl", "vispec").target.model)
    target.generation_config.repetition_penalty = 1.05
    target.generation_config.suppress_tokens = [4]
    inputs, answer = prompts_and_answers("qwen2_5_vl", "vispec")[1]
    with caplog.at_level(logging.WARNING, "vispec"):
        model = SpecModel(target, recorded_model("qwen2_5_vl", "vispec").draft)
        model.generate(**inputs, max_new_tokens=6)
        assert not caplog.records
        for _ in range(2):
            assert model.specgenerate(**inputs, max_new_tokens=6)[0, -6:].tolist() == answer[:6]
    assert [r.getMessage() for r in caplog.records] == [
        "repetition_penalty=1.05, suppress_tokens=[4] of the target's generation config is not applied; generate() does"
    ]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_flash_attention_gives_one_line_and_sdpa(family, caplog):
    path, draft = GOLDEN / family / "target", GOLDEN / family / "draft_vispec"
    with caplog.at_level(logging.WARNING, "vispec"):
        model = SpecModel.from_pretrained(str(path), str(draft), attn_implementation="flash_attention_2")
    assert [r.getMessage() for r in caplog.records] == [
        "attention 'flash_attention_2' cannot take a tree mask, sdpa is used instead"
    ]
    assert model.target.text_config._attn_implementation == "sdpa"
    inputs, answer = prompts_and_answers(family, "vispec")[0]
    assert model.specgenerate(**inputs, max_new_tokens=9)[0, -9:].tolist() == answer[:9]


# --- dtypes and devices ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_half_precision(family, dtype):
    path, draft = GOLDEN / family / "target", GOLDEN / family / "draft_vispec"
    model = SpecModel.from_pretrained(str(path), str(draft), torch_dtype=dtype)
    assert {p.dtype for p in model.draft.parameters()} == {dtype}
    for inputs, answer in prompts_and_answers(family, "vispec"):  # pixel values stay float32, as processors give them
        out, lengths = model.specgenerate(**inputs, max_new_tokens=24, return_acceptance_len=True)
        plain = model.baseline_generate(**inputs, max_new_tokens=24)
        length = inputs["input_ids"].shape[1]
        assert out[:, :length].tolist() == inputs["input_ids"].tolist()
        assert 1 <= out.shape[1] - length <= 24 and 1 <= plain.shape[1] - length <= 24
        # rounding may part the ways later on, but not at the first token of these clear-cut answers
        assert out[0, length] == plain[0, length] == answer[0]
        if len(answer) == 48 and "pixel_values" in inputs:
            assert max(lengths) >= 3


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(device_map):
    pytest.importorskip("accelerate")
    path, draft = GOLDEN / "llava_next" / "target", GOLDEN / "llava_next" / "draft_vispec"
    model = SpecModel.from_pretrained(str(path), str(draft), device_map=device_map)
    inputs, answer = prompts_and_answers("llava_next", "vispec")[0]
    assert model.specgenerate(**inputs, max_new_tokens=9)[0, -9:].tolist() == answer[:9]
    assert model.baseline_generate(**inputs, max_new_tokens=9)[0, -9:].tolist() == answer[:9]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_modules_that_accelerate_has_placed(family):
    """Every part has its own placement hook, as when a target is spread over several GPUs."""
    hooked = pytest.importorskip("accelerate.hooks")
    target = same_target(recorded_model(family, "vispec").target.model)
    hooked.attach_align_device_hook(target, execution_device=torch.device("cpu"), skip_keys="past_key_values")
    model = SpecModel(target, recorded_model(family, "vispec").draft)
    inputs, answer = prompts_and_answers(family, "vispec")[0]
    assert model.specgenerate(**inputs, max_new_tokens=9)[0, -9:].tolist() == answer[:9]


# --- images reach the draft head ---


@pytest.mark.parametrize("family", FAMILIES)
def test_the_draft_head_sees_the_image(family):
    model = random_pair(family, seed=0)
    inputs = image_prompt(model.target.model, 0, ".a.")
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    memories = []
    for variant in (inputs, inputs, other):
        ids = (variant := dict(variant)).pop("input_ids")
        with torch.inference_mode():
            prompt = model.target.prefill(model.target.new_cache(1, ids.shape[1]), ids, variant)
            # the same features and root in all, so that only the image's own way into the head is left
            alike = replace(prompt, features=torch.ones_like(prompt.features))
            memories.append(read_prompt(model.draft, model.target, alike, PROMPT[0, :1]))
    assert torch.equal(memories[0].estimate, memories[1].estimate)
    assert not torch.allclose(memories[0].estimate, memories[2].estimate, atol=1e-3)
    assert not torch.allclose(memories[0].global_feature, memories[2].global_feature, atol=1e-3)


def test_the_targets_own_generate_works_as_before():
    """Decoding shares the model with its owner."""
    for family in ("llava_next", "qwen2_5_vl"):
        model = random_pair(family, seed=1, vocabulary=12)
        target = model.target.model
        inputs, other = image_prompt(target, 1, "a.b"), image_prompt(target, 2, ".a.")
        before = generate(target, inputs, max_new_tokens=8)
        model.specgenerate(**other, max_new_tokens=8)
        assert torch.equal(generate(target, inputs, max_new_tokens=8), before)
