"""Loading a target with its drafts for the commands, and what is noted of them."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from vispec.evaluation import answerer
from vispec.evaluation.benchmarks import BENCHMARKS
from vispec.evaluation.flags import asked_place
from vispec.evaluation.loading import Models, load_models
from vispec.evaluation.measure import Generation
from vispec.evaluation.run_one import make_parser
from vispec.evaluation.settings import asked_settings
from vispec.model.drafts import MedusaHead, load_draft
from vispec.model.drafts.checkpoints import read_config, save_draft
from vispec.model.drafts.vocabulary import DraftVocabulary, fingerprint
from vispec.model.shape import TreeShape

FAMILY = Path(__file__).parent / "golden" / "llava_next"
TARGET, EAGLE2 = str(FAMILY / "target"), str(FAMILY / "draft_eagle2")


def test_settings_are_those_of_the_loaded_models(tmp_path):
    """A narrow target fills no tree of 900 tokens, Medusa's depth is its heads', and some heads propose few tokens."""
    head = MedusaHead(read_config(Path(EAGLE2) / "config.json"))
    head.embed_tokens = load_draft(EAGLE2).embed_tokens
    save_draft(head, tmp_path / "medusa")
    shutil.copytree(EAGLE2, tmp_path / "eagle2")
    ids = torch.arange(3, 38)
    tokens = fingerprint(AutoTokenizer.from_pretrained(TARGET), ids)
    DraftVocabulary(ids, head.config.vocab_size, tokens).write(tmp_path / "eagle2")
    drafts = {"medusa": str(tmp_path / "medusa"), "eagle2": str(tmp_path / "eagle2"), "lookup": None}
    found = answerer.Answerer(Models(TARGET, drafts, TreeShape(900, 3, 8), dtype="auto")).loaded_settings()
    assert found.keys() == {"baseline", "medusa", "eagle2", "lookup"}
    assert {settings["dtype"] for settings in found.values()} == {"float32"}
    assert found["medusa"]["tree"][1] == 4 and found["medusa"]["tree"][0] < 900
    assert found["lookup"]["tree"] == [33, 3, 8] and "spec_model_sha256" not in found["lookup"]
    assert found["eagle2"]["draft_vocab"].startswith("35 tokens, sha256 ")
    assert "tree" not in found["baseline"]


def test_a_head_in_a_subfolder():
    """It is noted where the head was, and its weights are those of that subfolder."""
    parser = make_parser(BENCHMARKS["gqa"], "spec")
    found = []
    subfolder = ["--spec-model-path", str(FAMILY), "--spec-subfolder", "draft_eagle2"]
    for where in (subfolder, ["--spec-model-path", EAGLE2]):
        args = parser.parse_args(["--base-model-path", TARGET, *where])
        models = Models(TARGET, {"eagle2": args.spec_model_path}, places={"eagle2": asked_place(args)})
        noted = asked_settings(models, "eagle2", "gqa", "data", {}, Generation(0.0, 8), 1)
        loaded = answerer.Answerer(models).loaded_settings()["eagle2"]
        assert noted["spec_model_sha256"] == loaded["spec_model_sha256"] is not None
        found.append(noted)
    assert found[0]["spec_model_sha256"] == found[1]["spec_model_sha256"]
    assert found[0]["spec_subfolder"] == "draft_eagle2" and "spec_subfolder" not in found[1]
    assert "spec_revision" not in found[0]


def test_where_a_head_is_without_a_head():
    args = make_parser(BENCHMARKS["gqa"], "spec").parse_args(["--base-model-path", TARGET, "--spec-revision", "v2"])
    with pytest.raises(ValueError, match="^--spec-revision without --spec-model-path: there is no draft head to look"):
        asked_place(args)


def test_a_head_that_is_not_there_is_named_before_the_target_is_loaded(monkeypatch):
    monkeypatch.setattr("vispec.evaluation.loading.load_model", lambda *a, **k: pytest.fail("the target was loaded"))
    with pytest.raises(ValueError, match="mistyped"):
        load_models(Models(TARGET, {"vispec": "./mistyped"}))
