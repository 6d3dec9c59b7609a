"""MSD's draft head: it repeats its authors' recordings, and is lossless like the other methods."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_golden import TOLERANCE, RecordedLevels, assert_recorded
from test_tree import CONFIG
from tiny_models import FAMILIES, as_prompt, bare_head, greedy_lengths, output_of, random_head, random_target

from vispec import SpecModel
from vispec.model.drafts import MSDHead, load_draft
from vispec.model.drafts.base import Kept
from vispec.model.drafts.checkpoints import save_draft
from vispec.model.drafts.pair_head import Expansions
from vispec.model.shape import TreeShape
from vispec.model.tree import choose_nodes, expand_levels

GOLDEN = Path(__file__).parent / "golden" / "msd"
RECORDED = ("llava", "qwen2_vl")


# --- what its authors' code did ---


@lru_cache
@torch.inference_mode(False)
def recorded_head(family: str, lean: bool = False) -> MSDHead:
    head = load_draft(str(GOLDEN / family / "draft"), "msd")
    if lean:
        head.make_lean()
    return head


@lru_cache
def recorded_case(family: str, case: int) -> dict[str, torch.Tensor]:
    tensors, prefix = load_file(GOLDEN / family / "trace.safetensors"), f"case{case}."
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return found | {"head_weight": tensors["head_weight"]}


def spans(mask: torch.Tensor) -> list[tuple[int, int]]:
    rows = mask.nonzero()[:, 0].tolist()
    return [(rows[0], rows[-1] + 1)] if rows else []


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("family", RECORDED)
@torch.inference_mode()
def test_recorded_rounds(family, case, lean):
    """The prompt's pass with an image and without one, two rounds and their trees."""
    head, recorded = recorded_head(family, lean), recorded_case(family, case)
    assert head.lean == lean
    hidden, embeds, first = recorded["target_hidden"], recorded["inputs_embeds"], recorded["first_token"][0]
    images, length = spans(recorded["image_mask"][0]), hidden.shape[1]
    next_embeds = torch.cat([embeds[:, 1:], head.embed(first)[None]], dim=1)
    layout = head.plan([length], [images])
    assert torch.equal(layout.positions[0], recorded["draft_prefill_position_ids"].reshape(-1, length)[0])
    x, _ = head.inputs(layout, hidden, embeds, next_embeds)
    torch.testing.assert_close(x, recorded["draft_prefill_layer_input"], **TOLERANCE)
    out = head(hidden, embeds, next_embeds, [images])
    torch.testing.assert_close(out, recorded["draft_prefill_hidden"], **TOLERANCE)

    trace = json.loads((GOLDEN / family / "trace.json").read_text())
    shape = TreeShape(trace["total_token"], trace["depth"], trace["top_k"])
    output = output_of(lambda estimates: estimates @ recorded["head_weight"].T)
    device = torch.device("cpu")
    memory = head.memory(1, length + 200, type("Place", (), {"device": device, "dtype": torch.float32}))
    memory.used = head.read(memory, as_prompt(hidden, embeds, images))
    head.extend(memory, Kept(hidden[:, -1:], first[None], torch.ones(1, dtype=torch.long)))
    root = first
    for number in range(2):
        if number:
            given = recorded["round1.extend.hidden"], recorded["round1.extend.input_ids"]
            assert int(memory.position) == int(recorded["round1.extend.position_ids"].flatten()[0])
            head.extend(memory, Kept(*given, torch.tensor([given[1].shape[1]])))
            torch.testing.assert_close(memory.estimate, recorded["round1.extend.out_hidden"][:, -1], **TOLERANCE)
            root = recorded["round0.next_token"][0]
        logits = output.logits(memory.estimate)
        torch.testing.assert_close(logits, recorded[f"round{number}.extend.last_logits"], **TOLERANCE)
        expand = RecordedLevels(Expansions(head, memory, shape), recorded, number, output)
        tree = choose_nodes(root, expand_levels(memory.estimate[:, None], expand, shape, output), shape)
        assert expand.passes == shape.depth
        assert_recorded(tree, recorded, number)


# --- lossless ---


@pytest.mark.parametrize("tree", [(2, 1, 1), (30, 3, 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_targets(family, tree):
    target = random_target(family, 2, vocabulary=9)
    model = SpecModel(target, random_head(target, "msd", seed=6), *tree)
    lengths = greedy_lengths(model, (".", ".a.", "a.bb."), 20)
    if tree[0] == 30:
        assert max(lengths) >= 1, "nothing was accepted, so nothing was tested"


def test_rows_of_all_images_bypass_fc():
    """Several images, one at the very beginning, two that touch; the first token has no pair before it."""
    head = bare_head(CONFIG, "msd", seed=1)
    length, size = 12, CONFIG.hidden_size
    hidden, embeds = torch.randn(2, length, size), torch.randn(2, length, size)
    images = [[(0, 2), (4, 6), (6, 9)], []]
    layout = head.plan([length - 1, length - 1], images)
    x, _ = head.inputs(layout, hidden, embeds, embeds[:, 1:])
    fused = head.fc(torch.cat([embeds[:, 1:], hidden[:, :-1]], dim=-1))
    bypassing = {token - 1 for start, end in images[0] for token in range(start, end)} - {-1}
    for pair in range(length - 1):
        torch.testing.assert_close(x[0, pair], embeds[0, pair + 1] if pair in bypassing else fused[0, pair])
        torch.testing.assert_close(x[1, pair], fused[1, pair])


# --- files ---


@pytest.mark.parametrize("family", RECORDED)
def test_a_head_that_was_saved_says_what_it_is(tmp_path, family):
    head = recorded_head(family)
    save_draft(head, tmp_path / "head")
    written = json.loads((tmp_path / "head" / "config.json").read_text())
    published = json.loads((GOLDEN / family / "draft" / "config.json").read_text())
    assert {**published, **written} == written | {"rope_scaling": published.get("rope_scaling")}
    again = load_draft(str(tmp_path / "head"))
    assert again.method == "msd" and again.config == head.config
    assert all(torch.equal(tensor, head.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_the_method_of_published_files():
    """LLaVA's have EAGLE-2's names and nothing else, Qwen2-VL's an input norm more."""
    assert load_draft(str(GOLDEN / "llava" / "draft")).method == "eagle2"
    assert load_draft(str(GOLDEN / "qwen2_vl" / "draft")).method == "msd"
    with pytest.raises(ValueError, match="these are msd weights, method 'eagle2' was asked for"):
        load_draft(str(GOLDEN / "qwen2_vl" / "draft"), "eagle2")


def test_a_head_that_says_that_it_is_msds_is_no_eagle2_head(tmp_path):
    save_draft(MSDHead(replace(CONFIG, bias=False)), tmp_path)
    assert load_draft(str(tmp_path)).fc.bias is None
    with pytest.raises(ValueError, match="these are msd weights, method 'eagle2' was asked for"):
        load_draft(str(tmp_path), "eagle2")
