"""Accepted draft tokens as τ counts them, beside the tokens of the answer itself."""

import pytest
from tiny_models import recorded_case, recorded_model

from vispec.acceptance import accepted_within
from vispec.evaluation.measure import Generation, answer_question, drafted_flags


@pytest.mark.parametrize(
    ("accepted", "last_step", "new_tokens", "expected"),
    [
        ([], -1, 1, []),
        ([2, 3], 1, 8, [2, 3]),
        ([2, 3], 1, 7, [2, 3]),  # the target's own token was cut, which is not counted anyway
        ([2, 3], 1, 6, [2, 2]),
        ([2, 3], 1, 5, [2, 1]),
        ([2, 3], 2, 6, [2, 1]),  # a plain step among the rounds
        ([2], 3, 6, [2]),
    ],
)
def test_what_lies_behind_the_end_is_not_counted(accepted, last_step, new_tokens, expected):
    before = list(accepted)
    assert accepted_within(accepted, last_step, new_tokens) == expected and accepted == before


def test_what_is_counted_are_the_drafted_tokens_of_the_answer():
    """Wherever an answer ends: at its longest length, or at an end token within a path that was accepted."""
    model, inputs = recorded_model("llava_next", "vispec"), recorded_case("llava_next", "vispec", 0).inputs
    whole = answer_question(model, inputs, "spec", Generation(0.0, 24))
    ends = [{"max_new_tokens": length} for length in range(1, 25)]
    ends += [{"end": token} for token in dict.fromkeys(whole.output_ids)]
    cut = 0
    before = model.target.eos_token_ids
    for end in ends:
        try:
            model.target.eos_token_ids = [end["end"]] if "end" in end else before
            answer = answer_question(model, inputs, "spec", Generation(0.0, end.get("max_new_tokens", 24)))
        finally:
            model.target.eos_token_ids = before
        assert answer.output_ids == whole.output_ids[: len(answer.output_ids)]
        assert sum(answer.accepted) == sum(drafted_flags(answer)), end
        assert len(answer.accepted) == len(answer.acceptance_lengths)
        cut += sum(answer.accepted) < sum(answer.acceptance_lengths)
    assert cut > 3, "the answers end in the middle of a path"
