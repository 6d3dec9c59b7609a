"""docs/models.md says what decoding does with the families of the installed transformers."""

import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

from vispec import SpecModel
from vispec.evaluation.families import table, trial
from vispec.evaluation.families.__main__ import main
from vispec.evaluation.families.family import tiny_model
from vispec.evaluation.families.prompts import prompt_of
from vispec.evaluation.families.registry import FAMILIES
from vispec.evaluation.families.trial import DIFFERS, FAILED, try_family
from vispec.model.drafts import PromptLookup

SECTION = table.section_of((Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8"))
FEW = ("llava (Pixtral)", "qwen2_5_vl", "gemma3", "idefics2", "aya_vision", "mllama")
FEW += ("instructblip (Vicuna)", "phi4_multimodal")
"""Of layouts and text decoders that differ: what is tried beside the other tests. With transformers 5 it is all."""
OF_5 = int(transformers.__version__.split(".")[0]) >= 5
TRIED = FAMILIES if OF_5 else FEW


@pytest.fixture(autouse=True)
def _log_as_before():
    """The command silences the package's log, for all that runs in its process."""
    logger = logging.getLogger("vispec")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("name", TRIED)
def test_the_table_says_what_decoding_does(name):
    row = try_family(FAMILIES[name])
    if row is None:
        assert f"\n| {name} |" not in SECTION
        return
    assert not {outcome.verdict for outcome in row.values()} & {DIFFERS, FAILED}, row
    missing = [line for line in table.said_of(name, row) if line not in SECTION.splitlines()]
    assert not missing, f"docs/models.md is to be made anew: {table.COMMAND}"


@pytest.mark.parametrize("name", TRIED)
def test_a_prompt_without_a_mask(name):
    """generate() of transformers 5 leaves out masks that hide nothing; some models then see no images."""
    family = FAMILIES[name]
    model = tiny_model(family)
    if model is None or family.images is None:
        pytest.skip("not here, or text alone")
    try:
        spec_model = SpecModel(model, PromptLookup(), tree=trial.TREE)
    except ValueError:
        pytest.skip("refused")
    prompt = prompt_of(family, model, ".a.b.", seed=0)
    expected = trial.own_answer(model, prompt)
    prompt.pop("attention_mask")
    assert torch.equal(spec_model.specgenerate(**prompt, max_new_tokens=trial.NEW_TOKENS), expected)


def test_every_class_has_its_place():
    names = {made.model_type for made in AutoModelForImageTextToText._model_mapping}
    tried = {family.model_type for family in FAMILIES.values()}
    below = SECTION.partition("Refused when they are handed over")[2]
    refused = set(re.findall(r"^- ([\w.-]+): ", below, re.MULTILINE))
    listed = re.findall(r"^(?:Other names of classes that were tried|Not tried): (.*)\.$", below, re.MULTILINE)
    named = {name.split(" ")[0] for line in listed for name in line.split(", ")}
    assert len(listed) == 2 and not names - tried - refused - named


def test_other_tokens_end_the_command(monkeypatch, capsys):
    own_answer = trial.own_answer

    def another(model, prompt):
        answer = own_answer(model, prompt).clone()
        answer[:, -1] += 1
        return answer

    monkeypatch.setattr(trial, "own_answer", another)
    assert main(["--only", "llava"]) == 1
    out, err = capsys.readouterr()
    assert "DIFFERS: plain decoding: row 0 parts from generate() at new token 23" in out
    assert err == "other tokens than generate(): llava\n"


def test_an_answer_that_says_one_token_again_and_again_is_no_trial(monkeypatch, capsys):
    own_answer = trial.own_answer
    monkeypatch.setattr(trial, "own_answer", lambda model, prompt: own_answer(model, prompt) * 0)
    assert main(["--only", "llava"]) == 1
    assert "error: AssertionError: the model's own answer is one token again and again" in capsys.readouterr().out


def test_a_run_writes_its_own_section_and_keeps_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "FAMILIES", {})
    monkeypatch.setattr(table, "by_default_config", lambda tried: ({}, [], ["everything"]))
    text = table.with_section("# Old\n\n## transformers 99.0\n\nkept\n", table.section({}))
    assert text.startswith(table.HEAD) and text.endswith("## transformers 99.0\n\nkept\n")
    assert table.section_of(text).endswith("Not tried: everything.\n\n")
    assert table.with_section(text, table.section({})) == text


def test_flags(tmp_path):
    with pytest.raises(ValueError, match="--only nothing: unknown, expected one of llava"):
        main(["--only", "nothing"])
    with pytest.raises(ValueError, match="--only: expected no --out beside it"):
        main(["--only", "llava", "--out", str(tmp_path / "models.md")])


def test_prompts_are_padded_on_the_left_and_keep_their_images():
    family = FAMILIES["idefics3"]
    model = trial.tiny_model(family)
    prompts = [trial.prompt_of(family, model, layout, 0) for layout in trial.BATCHES["batch"]]
    batch = trial.batch_of(prompts, family.join)
    assert batch["attention_mask"].sum(1).tolist() == [prompt["input_ids"].shape[1] for prompt in prompts]
    assert batch["pixel_values"].shape[:2] == (3, 2)
    assert torch.equal(batch["pixel_values"][0], prompts[0]["pixel_values"][0])
