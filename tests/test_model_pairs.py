"""A target and its draft head belong together: sizes, dtype, device; and how both are found on the hub."""

import re
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RevisionNotFoundError
from test_checkpoints import DRAFT, TARGET, cache_repository
from tiny_models import random_head, random_target

from vispec import SpecModel
from vispec.model import spec_model
from vispec.model.drafts import DraftHead, load_draft


def test_sizes():
    target = random_target("llava_1.5", 0, vocabulary=12)
    for head in (
        random_head(random_target("llava_1.5", 0, vocabulary=13), "vispec", 0),
        random_head(random_target("llava_1.5", 0, vocabulary=12, hidden_size=128), "eagle2", 0),
    ):
        with pytest.raises(ValueError, match="^the draft head was made for another target: hidden_size "):
            SpecModel(target, head)


@pytest.mark.parametrize("method", ["vispec", "eagle2", "eagle3", "medusa"])
def test_a_head_in_another_dtype_is_refused(method):
    target = random_target("llava_1.5", 0, vocabulary=12).bfloat16()
    head = random_head(target, method, 0)
    head.embed_tokens.weight.data = head.embed_tokens.weight.data.bfloat16()
    found = "torch.bfloat16 on cpu and torch.float32 on cpu"
    wanted = f"the draft head is in {found}, the target in torch.bfloat16 on cpu: bring the head there by draft.to("
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}"):
        SpecModel(target, head)
    model = SpecModel(target, head.to(torch.bfloat16))
    assert model.specgenerate(torch.tensor([[5, 6]]), max_new_tokens=3).shape == (1, 5)


def test_a_head_on_another_device_is_refused():
    target = random_target("llava_1.5", 0, vocabulary=12)
    with pytest.raises(ValueError, match="^the draft head is in torch.float32 on meta, the target"):
        SpecModel(target, random_head(target, "vispec", 0).to("meta"))


# --- names of arguments ---


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": torch.bfloat16, "dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"torch_dtype": "auto", "dtype": "auto"}, torch.float32),
    ],
)
def test_both_names_of_the_dtype(arguments, expected):
    model = SpecModel.from_pretrained(str(TARGET), str(DRAFT), **arguments)
    assert model.target.dtype == expected and {p.dtype for p in model.draft.parameters()} == {expected}


def test_two_dtypes_are_refused_before_loading(monkeypatch):
    monkeypatch.setattr(spec_model, "load_target", lambda *_, **__: pytest.fail("loaded before the check"))
    with pytest.raises(ValueError, match="two names of one thing, found float16 and torch.bfloat16"):
        SpecModel.from_pretrained(str(TARGET), torch_dtype="float16", dtype=torch.bfloat16)


# --- the hub, offline ---


def test_one_hub_cache_for_both(tmp_path):
    """The user's own cache holds both, and no other place is asked."""
    cache_repository(tmp_path, "someone/target", TARGET)
    cache_repository(tmp_path, "someone/head", DRAFT)
    where = {"cache_dir": str(tmp_path), "local_files_only": True, "token": False}
    model = SpecModel.from_pretrained("someone/target", "someone/head", revision="main", **where)
    assert model.draft.method == "vispec"
    assert DraftHead.from_pretrained("someone/head", **where).method == "vispec"
    with pytest.raises(ValueError, match="^someone/nowhere: no such folder, and it is not in the hub cache$"):
        load_draft("someone/nowhere", **where)
    with pytest.raises(ValueError, match="^someone/head: no such folder"):
        load_draft("someone/head", local_files_only=True)


def test_the_targets_revision_is_not_the_heads(tmp_path):
    files = cache_repository(tmp_path, "someone/target", TARGET)
    (files.parents[1] / "refs" / "later").write_text(files.name)
    cache_repository(tmp_path, "someone/head", DRAFT)
    model = SpecModel.from_pretrained("someone/target", "someone/head", revision="later", cache_dir=str(tmp_path))
    assert model.draft.method == "vispec"
    with pytest.raises(ValueError, match="someone/head"):
        load_draft("someone/head", revision="later", cache_dir=str(tmp_path))


def test_revision_and_subfolder_of_the_head(tmp_path):
    """They are the head's alone: the target has neither, and its own do not reach the head."""
    cache_repository(tmp_path, "someone/target", TARGET)
    shutil.copytree(DRAFT, tmp_path / "heads" / "later")
    files = cache_repository(tmp_path, "someone/heads", tmp_path / "heads")
    (files.parents[1] / "refs" / "v2").write_text(files.name)
    (files.parents[1] / "refs" / "main").write_text("fedcba9876543210fedcba9876543210fedcba98")
    where = {"cache_dir": str(tmp_path), "local_files_only": True}
    head = {"spec_revision": "v2", "spec_subfolder": "later"}
    assert SpecModel.from_pretrained("someone/target", "someone/heads", **head, **where).draft.method == "vispec"
    assert load_draft("someone/heads", revision="v2", subfolder="later", **where).method == "vispec"
    with pytest.raises(ValueError, match=r"^someone/heads: no config.json in that hub repository, revision v2$"):
        SpecModel.from_pretrained("someone/target", "someone/heads", spec_revision="v2", **where)
    with pytest.raises(ValueError, match=r"no config.json in that hub repository, subfolder later$"):
        SpecModel.from_pretrained("someone/target", "someone/heads", spec_subfolder="later", **where)


def test_a_revision_that_the_hub_does_not_have(monkeypatch):
    def refuse(*args, **kwargs):
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)  # its arguments differ between versions

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ValueError, match="^someone/head: that hub repository has no revision v9$"):
        load_draft("someone/head", revision="v9")


def test_subfolders_of_a_local_folder(tmp_path):
    shutil.copytree(DRAFT, tmp_path / "heads" / "one")
    heads = str(tmp_path / "heads")
    model = SpecModel.from_pretrained(str(TARGET), heads, spec_subfolder="one")
    assert model.draft.method == "vispec"
    assert DraftHead.from_pretrained(heads, subfolder="one").method == "vispec"
    with pytest.raises(ValueError, match=r"heads: no config.json there, subfolder two$"):
        SpecModel.from_pretrained(str(TARGET), heads, spec_subfolder="two")
    with pytest.raises(ValueError, match=r"heads: a folder has no revisions, found revision v2$"):
        SpecModel.from_pretrained(str(TARGET), heads, spec_subfolder="one", spec_revision="v2")
    with pytest.raises(ValueError, match="^spec_revision and spec_subfolder say where a draft head is, expected spec_"):
        SpecModel.from_pretrained(str(TARGET), spec_subfolder="one")


def test_unknown_options_of_a_head_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'cachedir'"):
        load_draft(str(DRAFT), cachedir="x")
