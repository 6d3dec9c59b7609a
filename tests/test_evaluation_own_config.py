"""`--generation-config`: the commands apply what the target's generation config says, and answer files tell it."""

import json
import shutil
from pathlib import Path

import pytest
import test_evaluation
import torch
from test_evaluation import TARGET, coco, read, run_baseline, run_spec  # noqa: F401

from vispec import SpecModel, generate
from vispec.evaluation import answerer
from vispec.evaluation.measure import Generation, answer_question
from vispec.prompts import build_inputs, load_processor, user_turn


@pytest.fixture
def penalised(tmp_path, monkeypatch) -> Path:
    """The recorded target with a generation config that changes its answers."""
    folder = tmp_path / "target"
    shutil.copytree(TARGET, folder)
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}))
    monkeypatch.setattr(test_evaluation, "TARGET", str(folder))
    monkeypatch.setattr(answerer, "WARM_UPS", 1)
    return folder


def ids(path: Path) -> list:
    return [line["choices"][0]["output_ids"] for line in read(path)]


def meta(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".meta.json").read_text())["settings"]


def test_answers_with_the_targets_own_config(penalised, coco, tmp_path, capsys):  # noqa: F811
    without = run_baseline(coco, tmp_path / "without")
    plain = run_baseline(coco, tmp_path / "with", "--generation-config")
    ours = run_spec(coco, tmp_path / "with", "--generation-config=True")
    assert ids(plain) == ids(ours) and ids(plain) != ids(without)
    assert "5 of 5 questions (100.0 %) with the output ids of" in capsys.readouterr().out
    assert meta(plain)["generation_config"] is meta(ours)["generation_config"] is True
    assert "generation_config" not in meta(without)


def test_a_file_goes_on_with_the_same_flag_alone(penalised, coco, tmp_path, capsys):  # noqa: F811
    path = run_baseline(coco, tmp_path, "--generation-config")
    lines = path.read_text()
    run_baseline(coco, tmp_path, "--generation-config")
    assert path.read_text() == lines
    with pytest.raises(ValueError, match="was made with generation_config True, found None"):
        run_baseline(coco, tmp_path)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_is_that_of_generate(penalised, temperature):
    model = SpecModel.from_pretrained(str(penalised), test_evaluation.VISPEC)
    processor = load_processor(str(penalised))
    inputs = build_inputs(processor, [user_turn("What do you see?")])
    generation = Generation(temperature, 12, own_config=True)
    plain, ours = (answer_question(model, inputs, kind, generation, seed=4) for kind in ("baseline", "spec"))
    assert plain.output_ids == ours.output_ids and plain.last_round == len(plain.output_ids) - 2
    assert len(ours.acceptance_lengths) == ours.last_round + 1 and plain.acceptance_lengths == []
    options = {"temperature": temperature, "max_new_tokens": 12, "own_config": True}
    torch.manual_seed(4)
    streamed = [token for step in model.stream(**inputs, **options) for token in step.token_ids]
    if temperature == 0:
        length = inputs["input_ids"].shape[1]
        own = model.target.model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, length:].tolist()
        assert own == ours.output_ids == streamed == answer_question(model, inputs, "generate", generation).output_ids
    else:
        assert len(streamed) > 0


def test_a_streamed_answer_with_the_targets_own_config(penalised, capsys):
    flags = ["--base-model-path", str(penalised), "--spec-model-path", test_evaluation.VISPEC, "--tree", "30/3/8"]
    printed = []
    for more in ([], ["--generation-config"]):
        assert generate.main([*flags, *more, "--compare", "--max-new-tokens", "12", "What is this?"]) == 0
        printed.append(capsys.readouterr().out)
        assert "outputs identical: yes" in printed[-1]
    answers = [text.splitlines()[0] for text in printed]
    assert answers[0] != answers[1]
