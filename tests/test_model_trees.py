"""Which trees a model drafts, as users name them, and what goes along with another draft."""

import logging

import pytest
import torch
from test_tune import small  # noqa: F401 - a fixture
from tiny_models import GOLDEN, generate, random_head, random_target, recorded_case, recorded_model, text_prompt

from vispec import SpecModel
from vispec.model import spec_model
from vispec.model.decoding import Decoder
from vispec.model.drafts import PromptLookup
from vispec.model.drafts.vocabulary import DraftVocabulary
from vispec.model.shape import TreeShape

TARGET, DRAFT = str(GOLDEN / "llava_next" / "target"), str(GOLDEN / "llava_next" / "draft_vispec")


def recorded_pair(**options) -> SpecModel:
    recorded = recorded_model("llava_next", "vispec")
    return SpecModel(recorded.target.model, recorded.draft, **options)


def lengths_of(model: SpecModel, inputs: dict) -> list[int]:
    return model.specgenerate(**inputs, max_new_tokens=24, return_acceptance_len=True)[1]


# --- names of trees ---


def test_a_text_is_all_three_numbers():
    inputs = recorded_case("llava_next", "vispec", 0).inputs
    expected = lengths_of(recorded_pair(total_token=16, depth=7, top_k=2), inputs)
    loaded = SpecModel.from_pretrained(TARGET, DRAFT, tree="16/7/2")
    changed = recorded_pair()
    changed.set_tree("16/7/2")
    for model in (recorded_pair(tree="16/7/2"), recorded_pair(tree=TreeShape(16, 7, 2)), loaded, changed):
        assert model.shape == TreeShape(16, 7, 2) and lengths_of(model, inputs) == expected
    assert lengths_of(recorded_pair().with_tree("16/7/2"), inputs) == expected
    assert lengths_of(recorded_pair(), inputs) != expected, "with any tree the same, so nothing was tested"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("30/3", "^a tree is total_token/depth/top_k such as 30/3/8, found '30/3'$"),
        ("best", "^a tree is total_token/depth/top_k such as 30/3/8, or one of threshold, .*, found 'best'$"),
        ("AUTO", "found 'AUTO'$"),
        ("", "found ''$"),
        ("1/3/8", "^total_token must be at least 2, found 1$"),
        ("30/3/0", "^top_k must be at least 1, found 0$"),
    ],
)
def test_wrong_texts_are_refused_before_anything_is_loaded(tree, message, monkeypatch):
    monkeypatch.setattr(spec_model, "load_target", lambda *_, **__: pytest.fail("loaded before the check"))
    with pytest.raises(ValueError, match=message):
        SpecModel.from_pretrained("someone/nowhere", tree=tree)
    model = recorded_pair(tree="auto")
    for use in (model.set_tree, model.with_tree, lambda text: recorded_pair(tree=text)):
        with pytest.raises(ValueError, match=message):
            use(tree)
    assert model.tree == "auto", "what was refused changes nothing"


def test_tune_measures_with_the_first_prompt(small, caplog):  # noqa: F811
    caplog.set_level(logging.INFO, logger="vispec")
    model = recorded_pair(tree="tune")
    inputs = [recorded_case("llava_next", "vispec", case).inputs for case in (1, 0)]
    for prompt in inputs:
        answer = model.specgenerate(**prompt, max_new_tokens=12)
        assert answer.tolist() == generate(model.target.model, prompt, max_new_tokens=12).tolist()
        assert model.tree is None and caplog.text.count(f"\nchosen: {model.shape}, ") == 1, "measured once"


def test_the_baseline_of_a_model_that_is_to_tune_measures_nothing(small, caplog):  # noqa: F811
    caplog.set_level(logging.INFO, logger="vispec")
    model = recorded_pair(tree="tune")
    model.baseline_generate(**recorded_case("llava_next", "vispec", 1).inputs, max_new_tokens=4)
    assert "chosen: " not in caplog.text and model.tree == "tune"


def test_a_tree_is_fitted_to_the_draft_whatever_its_name(caplog):
    target = random_target("llava_1.5", 0, vocabulary=9)
    model = SpecModel(target, random_head(target, "medusa", 0), tree="60/1/20")
    assert model.shape == TreeShape(60, 4, 9), "five heads, nine tokens"
    model.set_tree("7/0/3")
    assert model.shape == TreeShape(7, 4, 3)


# --- another draft ---


def test_another_draft_brings_its_vocabulary(caplog):
    target = random_target("llava_1.5", 0, vocabulary=12)
    inputs = text_prompt(target, 5, seed=0)
    first, other = random_head(target, "eagle2", 3), random_head(target, "eagle2", 4)
    said = generate(target, inputs, max_new_tokens=24)[0, 5:].tolist()
    other.draft_vocab = DraftVocabulary(torch.tensor(sorted(set(said))[:3]), 12, "")
    assert len(other.draft_vocab) < 12
    model = SpecModel(target, first, 12, 3, 4)
    before = lengths_of(model, inputs)
    expected = lengths_of(SpecModel(target, other, 12, 3, 4), inputs)
    caplog.clear()
    smaller = model.with_tree("7/2/2", other)
    assert smaller.shape == TreeShape(7, 2, 2) and not caplog.records, "of a tree that was not asked for"
    changed = model.with_tree("12/3/4", other)
    assert lengths_of(changed, inputs) == expected != before
    assert changed.draft is other and model.draft is first
    assert lengths_of(model, inputs) == before
    assert changed.with_tree("60/5/12").shape.top_k == len(other.draft_vocab)
    back = changed.with_tree("12/3/4", first)
    assert lengths_of(back, inputs) == before, "the vocabulary stayed behind"


def test_another_kind_of_draft():
    model, inputs = recorded_pair(), recorded_case("llava_next", "vispec", 0).inputs
    expected = model.baseline_generate(**inputs, max_new_tokens=24)
    lookup = model.with_tree("30/3/8", PromptLookup())
    assert torch.equal(lookup.specgenerate(**inputs, max_new_tokens=24), expected)
    assert lengths_of(lookup, inputs) != lengths_of(model, inputs)
    assert lookup.target is model.target


# --- what the first round pays for ---


@pytest.mark.parametrize("tree", ["12/3/4", "auto"])
def test_the_draft_is_asked_after_the_prompts_own_token(tree, monkeypatch):
    """So that the time after the prompt's pass has every tree in it, and the draft's reading of the prompt."""
    model, inputs = recorded_pair(tree=tree), recorded_case("llava_next", "vispec", 0).inputs
    done, draft, read = [], Decoder._draft, model.draft.read
    monkeypatch.setattr(Decoder, "_draft", lambda *args: done.append("draft") or draft(*args))
    monkeypatch.setattr(model.draft, "read", lambda *args: done.append("read") or read(*args))
    stream = model.stream(**inputs, max_new_tokens=40)
    next(stream)
    assert done == []
    drafted = [step.accepted is not None for step in stream]
    assert done == ["read", *["draft"] * sum(drafted)] and sum(drafted) > 3
