"""Every recorded case of the reference, step by step: prompt features, draft prefill, trees, acceptance, answer."""

import pytest
import torch
from tiny_models import RECORDED, Recording, read_prompt, recorded_case, recorded_model

from vispec import SpecModel
from vispec.model.decoding import Decoder
from vispec.model.policies import Always
from vispec.model.rows import Round, Stop
from vispec.model.sampling import Choice
from vispec.model.tree import Tree

NEW_TOKENS = 48
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}

cases = pytest.mark.parametrize(
    ("family", "method", "case"), [(*recorded, case) for recorded in RECORDED for case in range(3)]
)


class WatchedDecoder(Decoder):
    """The product's loop; keeps each tree it grows."""

    def __init__(self, *args):
        super().__init__(*args)
        self.trees: list[Tree] = []

    def _draft(self, *args):
        self.trees.append(super()._draft(*args))
        return self.trees[-1]


def run(model: SpecModel, recording: Recording) -> tuple[list[Round], list[Tree]]:
    decoder = WatchedDecoder(model.target, model.draft)
    inputs = dict(recording.inputs)
    stop = Stop(NEW_TOKENS, frozenset(model.target.eos_token_ids))
    prompts = [(inputs.pop("input_ids"), inputs)]
    first, *rounds = (step[0] for step in decoder.rounds(prompts, [stop], Choice(), Always(model.shape)))
    assert not first.drafted and all(step.drafted for step in rounds)
    return rounds, decoder.trees


@cases
def test_prompt_and_draft_prefill(family, method, case):
    model, recording = recorded_model(family, method), recorded_case(family, method, case)
    target, draft, recorded = model.target, model.draft, recording.tensors
    inputs = dict(recording.inputs)
    input_ids = inputs.pop("input_ids")
    with torch.inference_mode():
        prompt = target.prefill(target.new_cache(1, input_ids.shape[1]), input_ids, inputs)
        root = prompt.logits.argmax(-1)
        next_embeds = torch.cat([prompt.embeds[:, 1:], draft.embed(root)[:, None]], dim=1)
        out = draft(prompt.hidden, prompt.embeds, next_embeds, prompt.images)
        memory = read_prompt(draft, target, prompt, root)

    torch.testing.assert_close(prompt.hidden, recorded["target_hidden"], **TOLERANCE)
    if "inputs_embeds" in recorded:
        torch.testing.assert_close(prompt.embeds, recorded["inputs_embeds"], **TOLERANCE)
    if "image_mask" in recorded:
        mask = torch.zeros(input_ids.shape, dtype=torch.bool)
        for start, end in prompt.images[0]:
            mask[0, start:end] = True
        assert torch.equal(mask, recorded["image_mask"])
    expected = recorded["draft_prefill_hidden"]
    torch.testing.assert_close(out, expected, **TOLERANCE)
    assert torch.equal(out.abs().sum(-1) == 0, expected.abs().sum(-1) == 0)
    torch.testing.assert_close(memory.estimate, expected[:, -1], **TOLERANCE)


@cases
def test_trees_and_acceptance_of_every_round(family, method, case):
    model, recording = recorded_model(family, method), recorded_case(family, method, case)
    rounds, trees = run(model, recording)

    assert len(trees) == len(rounds)
    assert 0 <= recording.rounds - len(rounds) <= 2  # the reference stops late
    assert [r.accepted for r in rounds] == recording.acceptance_lengths[: len(rounds)]
    for number, tree in enumerate(trees):
        recorded = {
            name: recording.tensors[f"round{number}.{name}"]
            for name in ("draft_tokens", "tree_mask", "tree_position_ids", "retrieve_indices")
        }
        assert torch.equal(tree.tokens, recorded["draft_tokens"])
        assert torch.equal(tree.mask, recorded["tree_mask"].bool()[0])
        assert torch.equal(tree.depths[0], recorded["tree_position_ids"])
        assert torch.equal(tree.retrieve_indices(), recorded["retrieve_indices"])


@cases
def test_answer_is_the_targets_own(family, method, case):
    model, recording = recorded_model(family, method), recorded_case(family, method, case)
    expected = recording.tensors["hf_generate_ids"]
    answer, lengths = model.specgenerate(
        **recording.inputs, max_new_tokens=NEW_TOKENS, return_acceptance_len=True
    )
    assert torch.equal(answer, expected)
    assert lengths == recording.acceptance_lengths[: len(lengths)]
    assert torch.equal(model.baseline_generate(**recording.inputs, max_new_tokens=NEW_TOKENS), expected)


def test_the_recordings_hold_every_acceptance_length():
    seen = {length for key in RECORDED for case in range(3) for length in recorded_case(*key, case).acceptance_lengths}
    assert seen == set(range(7))
