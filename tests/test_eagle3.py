"""EAGLE-3's draft head: it repeats its authors' recordings, sees images, and is lossless."""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_golden import TOLERANCE, RecordedLevels, assert_recorded, run
from tiny_models import (
    FAMILIES,
    Recording,
    bare_head,
    generate,
    greedy_lengths,
    image_prompt,
    proposed_tokens,
    random_head,
    random_target,
    read_prompt,
)
from transformers import AutoModelForCausalLM

from vispec import SpecModel
from vispec.model.drafts import Eagle3Head, load_draft
from vispec.model.drafts.base import Kept
from vispec.model.drafts.eagle3 import aux_layers
from vispec.model.drafts.formats import AUX_LAYERS
from vispec.model.drafts.pair_head import Expansions
from vispec.model.target import Target
from vispec.model.tree import expand_levels

GOLDEN = Path(__file__).parent / "golden" / "eagle3"
DRAFT = GOLDEN / "draft"
CASES = range(3)


# --- what its authors' code did ---


@lru_cache
@torch.inference_mode(False)
def recorded_target() -> Target:
    """A model of text alone, which nobody loads as a target."""
    return Target(AutoModelForCausalLM.from_pretrained(GOLDEN / "target"))


@lru_cache
@torch.inference_mode(False)
def recorded_pair(case: int, fast: bool) -> SpecModel:
    trace = json.loads((GOLDEN / "trace.json").read_text())["cases"][case]
    target = recorded_target().model
    head = load_draft(str(DRAFT), embedding=target.get_input_embeddings().weight)
    return SpecModel(target, head, *(trace[name] for name in ("total_token", "depth", "top_k")), fast=fast)


def recorded_case(case: int) -> Recording:
    trace, prefix = json.loads((GOLDEN / "trace.json").read_text())["cases"][case], f"case{case}."
    tensors = load_file(GOLDEN / "trace.safetensors")
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return Recording({"input_ids": tensors["input_ids"]}, tensors, trace["acceptance_lengths"])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_recorded_trees_acceptance_and_answer(case, fast):
    model, recording = recorded_pair(case, fast), recorded_case(case)
    assert model.target.lean == fast
    rounds, trees = run(model, recording)
    assert len(trees) == len(rounds) and 0 <= recording.rounds - len(rounds) <= 2  # the reference stops late
    assert [r.accepted for r in rounds] == recording.acceptance_lengths[: len(rounds)]
    for number, tree in enumerate(trees):
        assert_recorded(tree, recording.tensors, number)
    expected = recording.tensors["hf_generate_ids"]
    assert torch.equal(model.specgenerate(**recording.inputs, max_new_tokens=48), expected)
    assert torch.equal(model.baseline_generate(**recording.inputs, max_new_tokens=48), expected)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_recorded_passes_of_the_head(case):
    """Features, the passes over what was kept, and the first two levels of a tree, of the first rounds."""
    model, recorded = recorded_pair(case, True), recorded_case(case).tensors
    target, draft = model.target, model.draft
    layers = draft.aux_layers(target)
    assert layers == (2, 4, 5)
    ids = recorded["input_ids"]
    prompt = target.prefill(target.new_cache(1, ids.shape[1]), ids, {}, layers)
    torch.testing.assert_close(prompt.features, recorded["target_aux_hidden"], **TOLERANCE)
    torch.testing.assert_close(prompt.hidden, recorded["target_hidden"], **TOLERANCE)
    if case:
        return
    assert draft.lean
    every = recorded["target_all_hidden"]
    torch.testing.assert_close(prompt.features, torch.cat([every[n] for n in layers], -1), **TOLERANCE)
    draft.refresh()
    output, shape = draft.output(target), model.shape
    memory = draft.memory(1, 200, target)
    for number in range(3):
        given = {name: recorded[f"round{number}.extend.{name}"] for name in ("hidden3", "input_ids", "out_hidden")}
        pairs = given["input_ids"].shape[1]
        assert int(memory.position) == int(recorded[f"round{number}.extend.position_ids"][0])
        draft.extend(memory, Kept(given["hidden3"], given["input_ids"], torch.tensor([pairs])))
        torch.testing.assert_close(memory.estimate, given["out_hidden"][:, -1], **TOLERANCE)
        if number == 2:
            break
        logits = output.logits(memory.estimate)
        torch.testing.assert_close(logits, recorded[f"round{number}.extend.last_logits"], **TOLERANCE)
        best = logits.topk(shape.top_k).indices
        assert torch.equal(output.token_ids[best], recorded[f"round{number}.extend.top_tokens"])
        expand = RecordedLevels(Expansions(draft, memory, shape), recorded, number, output)
        candidates = expand_levels(memory.estimate[:, None], expand, shape, output)
        assert expand.passes == shape.depth
        chosen = candidates.scores[0].sort(descending=True).indices[: shape.total_token - 1].sort().values
        assert torch.equal(chosen, recorded[f"round{number}.selected_index"])


# --- lossless ---


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("tree", [(2, 1, 1), (30, 3, 8), (60, 6, 10)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_targets(family, tree, fast):
    target = random_target(family, 2, vocabulary=9)
    rope = {"rope_scaling": {"mrope_section": [4, 2, 2]}} if "qwen" in family and tree[0] == 30 else {}
    model = SpecModel(target, random_head(target, "eagle3", seed=4, **rope), *tree, fast=fast)
    lengths = greedy_lengths(model, (".", ".a.", "a.bb."), 20)
    if tree[0] >= 30:
        assert max(lengths) >= 1, "nothing was accepted, so nothing was tested"
    assert not any(layer._forward_pre_hooks for layer in model.target.decoder.layers)


# --- where an image's rows stand ---


@torch.inference_mode()
def test_m_rope_is_the_targets():
    """A head whose config asks for M-RoPE turns the pairs of a prompt as the target turns its tokens."""
    target = Target(random_target("qwen2_5_vl", 1))
    text = target.text_config
    rope = getattr(text, "rope_parameters", None) or {**text.rope_scaling, "rope_theta": text.rope_theta}
    sections = rope["mrope_section"]
    size = text.hidden_size // text.num_attention_heads
    theirs = {"rope_scaling": {"mrope_section": sections}, "rope_theta": rope["rope_theta"]}
    head = random_head(target.model, "eagle3", 2, **theirs)
    assert head.config.head_dim == size == 2 * sum(sections)
    inputs = image_prompt(target.model, 0, ".a.b.")
    ids = inputs.pop("input_ids")
    prompt = target.prefill(target.new_cache(1, ids.shape[1]), ids, inputs, head.aux_layers(target))
    layout = head.plan([ids.shape[1] - 1], prompt.images)
    cos, sin = head.prompt_angles(prompt, layout, torch.float32)
    angles = target.decoder.rotary_emb(prompt.embeds, prompt.positions[..., :-1])
    if angles[0].dim() == 4:  # older transformers choose among the axes where the angles are used
        chunks = [angle.split(sections * 2, dim=-1) for angle in angles]
        angles = [torch.cat([part[i % 3] for i, part in enumerate(chunk)], dim=-1) for chunk in chunks]
    expected = [angle[0] for angle in angles]
    torch.testing.assert_close(cos[:, 0], expected[0])
    torch.testing.assert_close(sin[:, 0].abs(), expected[1].abs())
    memory = read_prompt(head, target, prompt, prompt.logits.argmax(-1))
    assert int(memory.position) == ids.shape[1] + int(prompt.rope_delta)


@torch.inference_mode()
def test_a_head_sees_the_image_and_its_own_table_does_not():
    target = Target(random_target("llava_1.5", 1))
    heads = [random_head(target.model, "eagle3", 2)]
    width = heads[0].config.hidden_size
    small = {**heads[0].config.extra, "target_hidden_size": width}
    heads.append(bare_head(replace_sizes(heads[0].config, hidden_size=32, extra=small), "eagle3", 2))
    inputs = image_prompt(target.model, 0, ".a.")
    ids = inputs.pop("input_ids")
    prompt = target.prefill(target.new_cache(1, ids.shape[1]), ids, inputs, heads[0].aux_layers(target))
    (start, end) = prompt.images[0][0]
    assert torch.equal(heads[0].prompt_embeds(prompt)[:, start:end], prompt.embeds[:, start:end])
    assert torch.equal(heads[1].prompt_embeds(prompt), heads[1].embed_tokens(ids))
    model = SpecModel(target.model, heads[1])
    assert model.specgenerate(ids, **inputs, max_new_tokens=9).tolist() == generate(
        target.model, {"input_ids": ids, **inputs}, max_new_tokens=9
    ).tolist()


def replace_sizes(config, **sizes):
    return type(config)(**{**vars(config), **sizes})


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(7, (2, 3, 4)), (8, (2, 4, 5)), (28, (2, 14, 25)), (32, (2, 16, 29)), (36, (2, 18, 33)), (40, (2, 20, 37))],
)
def test_layers_that_are_read(layers, expected):
    assert aux_layers(layers) == expected


def test_targets_with_too_few_layers_are_refused():
    target = random_target("llava_1.5", 1)
    head = random_head(target, "eagle3", 2)
    listed = bare_head(replace_sizes(head.config, extra={}), "eagle3", 2)
    listed.embed_tokens.weight.data = head.embed_tokens.weight.data
    with pytest.raises(ValueError, match=f"of 7 or more, and the target has 3: list them as eagle_config.{AUX_LAYERS}"):
        SpecModel(target, listed)
    beyond = replace_sizes(head.config, extra={"eagle_config": {AUX_LAYERS: [0, 1, 2]}})
    with pytest.raises(ValueError, match="reads the inputs of layers 1, 2, 3, counted from 0, and the target has 3"):
        SpecModel(target, bare_head(beyond, "eagle3", 2))
    wrong = replace_sizes(head.config, extra={"eagle_config": {AUX_LAYERS: "1,2"}})
    with pytest.raises(ValueError, match=f"eagle_config.{AUX_LAYERS} must be a list of layers, found '1,2'"):
        Eagle3Head(wrong)


def test_only_its_own_tokens_are_drafted():
    target = random_target("llava_1.5", 3)
    model = SpecModel(target, random_head(target, "eagle3", 1), 30, 3, 8)
    _, trees = run(model, Recording(image_prompt(target, 0, "."), {}, []))
    drafted = torch.cat([tree.tokens[0, 1:] for tree in trees])
    assert torch.isin(drafted, proposed_tokens(model.draft.config.vocab_size)).all()


def test_targets_whose_layers_pass_on_something_else_are_refused(monkeypatch):
    """As Gemma 3n's do, which pass on several streams side by side."""
    target = Target(random_target("llava_1.5", 1))
    layer = target.decoder.layers[1]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda hidden, *args, **kwargs: forward(hidden[0], *args, **kwargs))
    # a layer gives a tuple in older versions, and one tensor in newer ones
    before = target.decoder.layers[0].register_forward_hook(
        lambda module, args, out: (out[0][None], *out[1:]) if isinstance(out, tuple) else out[None]
    )
    inputs = image_prompt(target.model, 0, ".")
    ids = inputs.pop("input_ids")
    try:
        target.prefill(target.new_cache(1, ids.shape[1]), ids, inputs)
        with pytest.raises(ValueError, match=r"its layers read \(1, 1, 5, 64\) where features are \(1, 5, 64\)"):
            target.prefill(target.new_cache(1, ids.shape[1]), ids, inputs, (1,))
    finally:
        before.remove()
