"""What tells weights from others under the same name."""

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import PretrainedConfig

from vispec import weights_digest
from vispec.remembered import recall
from vispec.weights_digest import file_sha256, folder_digest, target_revision

TARGET = Path(__file__).parent / "golden" / "qwen2_5_vl" / "target"
YEARS_AGO = 1_500_000_000


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_digest, "LARGE", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights_digest._sha256.cache_clear()


def written(path: Path, content: bytes, at: int = YEARS_AGO) -> Path:
    path.write_bytes(content)
    os.utime(path, (at, at))
    return path


def test_one_byte_in_the_middle_of_a_large_file_makes_another_target(tmp_path):
    content = bytearray(5 * 2**20)
    weights = written(tmp_path / "model.safetensors", content)
    before = target_revision(str(tmp_path))
    content[len(content) // 2] = 1
    written(weights, content, YEARS_AGO + 1)
    assert target_revision(str(tmp_path)) != before
    content[len(content) // 2] = 0
    written(weights, content, YEARS_AGO + 2)
    assert target_revision(str(tmp_path)) == before


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", "chat_template.json"])
def test_how_a_prompt_is_read_counts_and_notes_of_the_user_do_not(tmp_path, name):
    copy = Path(shutil.copytree(TARGET, tmp_path / "target"))
    before = folder_digest(copy)
    (copy / "my_notes.json").write_text("{}")
    (copy / "pytorch_model.bin").write_bytes(b"an older form, which is not read")
    assert folder_digest(copy) == before == folder_digest(TARGET)
    (copy / name).write_text((copy / name).read_text() + "\n")
    assert folder_digest(copy) != before


def test_a_file_is_read_once_by_all_processes(tmp_path, monkeypatch):
    path = written(tmp_path / "weights", b"abc")
    found = file_sha256(path)
    weights_digest._sha256.cache_clear()  # another process
    with monkeypatch.context() as patch:
        patch.setattr(weights_digest.hashlib, "sha256", lambda *_: pytest.fail("the file was read again"))
        assert file_sha256(path) == found
    (tmp_path / "cache" / "vispec" / "digests.json").write_text("[")
    weights_digest._sha256.cache_clear()
    assert file_sha256(path) == found, "a cache that cannot be read is made anew"


def test_a_file_that_was_just_written_is_not_remembered(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    file_sha256(path)
    assert recall(weights_digest.REMEMBERED) == {}, "its next change may have the same time"


def test_a_hub_id_is_known_by_the_commit_that_was_read():
    config = PretrainedConfig.from_dict(json.loads((TARGET / "config.json").read_text()))
    config._commit_hash = "0a1b"
    assert target_revision("somebody/model", config) == "0a1b"
    assert target_revision("somebody/model") is None
