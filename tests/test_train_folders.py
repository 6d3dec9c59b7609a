"""Folders that are trained on together: of one target, and no sample twice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_rows import CONFIGS, TARGETS, generate, write_rows

from vispec.ge_data.sample_file import read_sample
from vispec.train import main
from vispec.train.folders import check_folders
from vispec.train.samples import find_samples
from vispec.weights_digest import folder_digest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """Two shards of one run, and the first one in bfloat16."""
    out = tmp_path_factory.mktemp("made")
    for name, more in (("a", ["--end", "2"]), ("b", ["--start", "3"]), ("half", ["--end", "2", "--dtype", "bfloat16"])):
        assert generate("text", "llava", data, out / name, *more) == 0
    return out


def train(folders, cpdir):
    arguments = ["--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"], "--num-epochs", "1"]
    return main.main([*arguments, "--tmpdir", *map(str, folders), "--cpdir", str(cpdir)])


def target_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["target"]


def changed(folder: Path, copy: Path, **target) -> Path:
    """A copy whose manifest says something else of the target; without anything, one that says nothing."""
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["target"] |= target
    if not target:
        del manifest["target"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_a_manifest_names_the_target_for_good(made, data, tmp_path):
    found = target_of(made / "a")
    assert found == {"model": TARGETS["llava"], "revision": folder_digest(Path(TARGETS["llava"])), "dtype": "float32"}
    assert target_of(made / "half") == found | {"dtype": "bfloat16"}
    copy = Path(shutil.copytree(TARGETS["llava"], tmp_path / "target"))
    assert folder_digest(copy) == found["revision"]
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert folder_digest(copy) != found["revision"]
    # an unfinished run goes on with the target that began it
    arguments = ["--model", str(copy), "--end", "1"]
    assert generate("text", "llava", data, tmp_path / "out", *arguments) == 0
    content[-5] ^= 2
    weights.write_bytes(content)
    message = "out was made by another target .revision 'files-sha256:.*' there, 'files-sha256:.*' now"
    with pytest.raises(ValueError, match=message):
        generate("text", "llava", data, tmp_path / "out", *arguments)


def test_features_are_stored_in_the_target_s_dtype(made):
    for path in (made / "half").glob("*.safetensors"):
        half, full = read_sample(path), read_sample(made / "a" / path.name)
        assert half.hidden.dtype == torch.bfloat16 and full.hidden.dtype == torch.float32
        assert half.hidden.shape == full.hidden.shape and half.hidden.isfinite().all()
        assert torch.nn.functional.cosine_similarity(half.hidden.float(), full.hidden).min() > 0.99


def test_folders_of_different_targets_are_refused(made, tmp_path):
    other = changed(made / "b", tmp_path / "other", model="other/model", revision="sha256:00")
    message = r"--tmpdir: \S*/a was made by \S*target \(revision files-sha256:\S+, float32\), \S*/other by other/model "
    with pytest.raises(ValueError, match=message + r"\(revision sha256:00, float32\)"):
        train([made / "a", other], tmp_path / "cp")
    half = changed(made / "b", tmp_path / "half", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"float32\), \S*/half by .*, bfloat16\); choose"):
        train([made / "a", half], tmp_path / "cp")
    check_folders(find_samples([made / "a", half]), stored=False)
    assert train([made / "a", changed(made / "b", tmp_path / "older")], tmp_path / "cp") == 0


def test_unfinished_data_and_those_of_another_target_are_told(made, tmp_path, caplog):
    paths = find_samples([made / "a"])
    check_folders(paths, True, TARGETS["llava"])
    assert not caplog.records
    check_folders(paths, True, TARGETS["qwen"])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"--basepath {TARGETS['qwen']} (revision files-sha256:")
    assert f"the data was made by {TARGETS['llava']} (revision files-sha256:" in record.getMessage()
    caplog.clear()
    copy = shutil.copytree(made / "a", tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    check_folders(find_samples([copy]), True)
    assert [record.getMessage() for record in caplog.records] == [
        f"--tmpdir {copy}: its data generation has not finished"
    ]


def test_a_sample_in_two_folders_is_refused(made, data, tmp_path):
    assert generate("text", "llava", data, tmp_path / "c", "--start", "2") == 0
    with pytest.raises(ValueError, match=r"--tmpdir: \S*/a/00000002.* and \S*/c/00000002.* are the same sample"):
        train([made / "a", tmp_path / "c"], tmp_path / "cp")
    with pytest.raises(ValueError, match=r"/00000000.safetensors are the same sample"):
        train([made / "a", made / "a"], tmp_path / "cp")
    # the same numbers in other data are other samples
    assert generate("image", "llava", data, tmp_path / "images") == 0
    more = write_rows(tmp_path / "more")
    rows = json.loads((more / "text.json").read_text())
    (more / "text.json").write_text(json.dumps([row | {"id": f"other {row['id']}"} for row in rows]))
    assert generate("text", "llava", more, tmp_path / "more_text") == 0
    check_folders(find_samples([made / "a", tmp_path / "images", tmp_path / "more_text"]), stored=True)
