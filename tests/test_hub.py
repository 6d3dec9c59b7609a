"""Draft heads on the hub, with huggingface_hub's API replaced where it would reach the network."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from test_tree import CONFIG
from tiny_models import GOLDEN, bare_head, image_prompt, random_head, random_target

from vispec.model.drafts import BaseHead, DraftHead, MedusaHead, load_draft
from vispec.model.drafts.hub import GENERATE, model_card

FILES = ["README.md", "config.json", "model.safetensors"]


def same_tensors(a: BaseHead, b: BaseHead) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", ["eagle2", "eagle3", "msd", "specvlm", "vispec", "medusa"])
def test_round_trip(method, tmp_path):
    head = bare_head(CONFIG, method, seed=1)
    head.card = model_card(head, "someone/target", held_out={"loss": 1.25})
    head.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    again = type(head).from_pretrained(tmp_path)
    assert same_tensors(head, again) and again.config == head.config and again.card == head.card
    assert same_tensors(head, load_draft(tmp_path))


def test_another_class_is_refused(tmp_path):
    bare_head(CONFIG, "medusa", seed=1).save_pretrained(tmp_path)
    assert MedusaHead.from_pretrained(tmp_path).method == "medusa"
    with pytest.raises(ValueError, match="these are medusa weights, found where a DraftHead is expected"):
        DraftHead.from_pretrained(tmp_path)
    assert DraftHead.from_pretrained(GOLDEN / "llava_next" / "draft_vispec").method == "vispec"


def test_card(tmp_path):
    head = bare_head(CONFIG, "eagle2", seed=1)
    text = model_card(head, "llava-hf/llava", [str(tmp_path)], {"lr": 3e-5}, {"loss": 1.23456, "top1": 0.5, "pairs": 7})
    card = ModelCard(text)
    card_data = card.data.to_dict()
    assert card_data["base_model"] == "llava-hf/llava" and "eagle2" in card_data["tags"]
    assert "# EAGLE-2 draft head for llava-hf/llava" in card.text
    assert "| lr | 3e-05 |" in card.text and "| loss | 1.235 |" in card.text and "pairs" not in card.text
    assert tmp_path.name in card.text and str(tmp_path) not in card.text, "local folders are told by name only"
    local = ModelCard(model_card(head, str(tmp_path)))
    assert "base_model" not in local.data.to_dict() and str(tmp_path) not in local.content


def test_push(tmp_path, monkeypatch):
    calls = {}

    def create_repo(self, repo_id, **options):
        calls["create"] = {"repo_id": repo_id, "token": self.token, **options}
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(self, *, folder_path, **options):
        calls["upload"] = options
        folder = Path(folder_path)
        files = (path for path in folder.rglob("*") if path.is_file())
        calls["files"] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    head = bare_head(CONFIG, "medusa", seed=1)
    head.card = model_card(head, "llava-hf/llava", settings={"lr": 0.5})
    head.save_pretrained(tmp_path / "state")
    loaded = MedusaHead.from_pretrained(tmp_path / "state")
    assert loaded.push_to_hub("head", private=True, token="secret", revision="r") == "https://hub/commit/1"

    assert calls["create"] == {"repo_id": "head", "token": "secret", "private": True, "exist_ok": True}
    assert calls["upload"]["repo_id"] == "someone/head" and calls["upload"]["revision"] == "r"
    assert sorted(calls["files"]) == sorted([*FILES, GENERATE])
    for name in FILES:
        (tmp_path / name).write_bytes(calls["files"][name])
    assert same_tensors(head, load_draft(tmp_path)) and json.loads(calls["files"]["config.json"])["hidden_size"] == 32
    card = ModelCard(calls["files"]["README.md"].decode())
    assert 'SpecModel.from_pretrained("llava-hf/llava", "someone/head")' in card.text and "| lr | 0.5 |" in card.text


def test_push_without_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="someone/head"))

    def upload_folder(self, *, folder_path, **options):
        shutil.copytree(folder_path, tmp_path / "head")
        return SimpleNamespace(commit_url="")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    head = bare_head(CONFIG, "vispec", seed=1)
    head.push_to_hub("head", dtype=torch.bfloat16, embedding=False)
    with pytest.raises(ValueError, match="no embed_tokens.weight, and no target to take it from"):
        BaseHead.from_pretrained(tmp_path / "head")
    table = head.embed_tokens.weight.detach().bfloat16()
    assert same_tensors(BaseHead.from_pretrained(tmp_path / "head", embedding=table), head.bfloat16())


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56), reason="no custom_generate before"
)
def test_a_target_decodes_with_a_head_from_the_hub(tmp_path, monkeypatch):
    """By the file that was pushed with it; a local folder stands in for the repository."""
    repository = tmp_path / "head"
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id=str(repository)))

    def upload_folder(self, *, folder_path, **options):
        shutil.copytree(folder_path, repository)
        return SimpleNamespace(commit_url="")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    target = random_target("llava_1.5", 2, vocabulary=12)
    random_head(target, "vispec", seed=3).push_to_hub("head")
    inputs = image_prompt(target, 1, ".a.")
    options = {"max_new_tokens": 16, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    expected = target.generate(**inputs, **options)
    for _ in range(2):
        found = target.generate(**inputs, **options, custom_generate=str(repository), trust_remote_code=True)
        assert torch.equal(found, expected)
    (pair,) = vars(target)["_vispec_pairs"].values()
    assert pair.draft.method == "vispec" and pair.target.model is target
