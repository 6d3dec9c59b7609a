"""Every recorded case of the reference, step by step: prompt features, draft prefill, trees, acceptance, answer."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import RECORDED, Recording, read_prompt, recorded_case, recorded_model
from torch.nn.utils.rnn import pad_sequence

from vispec import SpecModel
from vispec.model.decoding import Decoder
from vispec.model.policies import Always
from vispec.model.rows import Round, Stop
from vispec.model.sampling import Choice
from vispec.model.tree import DraftOutput, Tree

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


def assert_recorded(tree: Tree, recorded: dict[str, torch.Tensor], number: int) -> None:
    """The tree of a round is that of the reference."""
    assert torch.equal(tree.tokens, recorded[f"round{number}.draft_tokens"])
    assert torch.equal(tree.mask, recorded[f"round{number}.tree_mask"].bool()[0])
    assert torch.equal(tree.depths[0], recorded[f"round{number}.tree_position_ids"])
    leaves = [leaf for leaf in range(len(tree.parents[0])) if leaf not in tree.parents[0]]
    paths = [tree.paths[0, leaf, : tree.depths[0, leaf] + 1] for leaf in leaves]
    padded = pad_sequence(paths, batch_first=True, padding_value=-1)
    assert torch.equal(padded, recorded[f"round{number}.retrieve_indices"])


class RecordedLevels:
    """A head's passes over the levels of a round's tree, each compared with the reference's where that is recorded."""

    def __init__(self, expansions: Callable, recorded: dict[str, torch.Tensor], number: int, output: DraftOutput):
        self._run, self._recorded, self._number, self._output = expansions, recorded, number, output
        self.passes = 0

    def __call__(self, hidden: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        level, recorded = f"round{self._number}.step{self.passes}", self._recorded
        out = self._run(hidden, tokens, parents)
        if f"{level}.out_hidden" in recorded:
            torch.testing.assert_close(hidden, recorded[f"{level}.input_hidden"], **TOLERANCE)
            assert torch.equal(tokens, recorded[f"{level}.input_ids"])
            torch.testing.assert_close(out, recorded[f"{level}.out_hidden"], **TOLERANCE)
            torch.testing.assert_close(self._output.logits(out)[0], recorded[f"{level}.logits"], **TOLERANCE)
        self.passes += 1
        return out


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
        assert_recorded(tree, recording.tensors, number)


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
