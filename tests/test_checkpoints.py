"""Draft heads as files: published names and shapes, local folders and hub ids, and what is wrong said by name."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import GOLDEN, recorded_case

from vispec import SpecModel
from vispec.model.drafts import build_head, load_draft
from vispec.model.drafts.checkpoints import read_config, save_draft

CONFIGS = Path(__file__).parents[1] / "vispec" / "train"
PUBLISHED = {
    "llava_1.6_7B_config.json": "llava-v1.6-vicuna-7b-hf",
    "llava_1.5_7B_config.json": "llava-v1.6-vicuna-7b-hf",
    "llava_1.6_13B_config.json": "llava-v1.6-vicuna-13b-hf",
    "qwen2.5_vl_3B_config.json": "Qwen2.5-VL-3B-Instruct",
    "qwen2.5_vl_7B_config.json": "Qwen2.5-VL-7B-Instruct",
}
TARGET, DRAFT = GOLDEN / "llava_next" / "target", GOLDEN / "llava_next" / "draft_vispec"
EMBEDDING = "embed_tokens.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a recorded draft head."""
    return Path(shutil.copytree(DRAFT, tmp_path / "draft"))


@pytest.fixture
def embedding() -> torch.Tensor:
    """The embedding table of that head's target."""
    weights = load_file(TARGET / "model.safetensors")
    return next(tensor for name, tensor in weights.items() if name.endswith(EMBEDDING))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add, or (None) take away tensors; "__" in a name stands for a dot."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors")


def change_config(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        values.pop(name) if value is None else values.update({name: value})
    (folder / "config.json").write_text(json.dumps(values))


def to_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def message(path, *args, **kwargs) -> str:
    """The one line that loading fails with."""
    with pytest.raises(ValueError) as caught:
        load_draft(str(path), *args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- published sizes ---


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_configs_build_the_published_heads(file):
    shapes = json.loads((GOLDEN / "published_draft_shapes.json").read_text())[PUBLISHED[file]]
    config = read_config(CONFIGS / file)
    vispec = build_head(config, "vispec", num_q=2)
    assert {name: list(tensor.shape) for name, tensor in vispec.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in vispec.state_dict().values())
    eagle = build_head(config, "eagle2")
    ours = {name: shape for name, shape in shapes.items() if not name.startswith(("imadpt.", "img_fc."))}
    assert {name: list(tensor.shape) for name, tensor in eagle.state_dict().items()} == ours


def test_published_configs_carry_what_no_shape_shows():
    found = {file: read_config(CONFIGS / file) for file in PUBLISHED}
    qwen = {"qwen2.5_vl_3B_config.json", "qwen2.5_vl_7B_config.json"}
    for file, config in found.items():
        assert config.rope_theta == (1e6 if file in qwen else 1e4)
        assert config.rms_norm_eps == (1e-6 if file in qwen else 1e-5)
        assert config.max_position_embeddings == (8192 if file in qwen else 4096)


# --- local folders ---


def test_loads_a_folder(folder, embedding):
    head = load_draft(str(folder), "vispec", 2, torch.float32, embedding)
    assert (head.method, head.num_q) == ("vispec", 2)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(head.state_dict()[name], tensor)
    assert head.embed_tokens.weight.data_ptr() == embedding.data_ptr(), "no second table in memory"
    assert not head.embed_tokens.weight.requires_grad and head.fc.weight.requires_grad


def test_bin_and_safetensors_are_alike(folder):
    expected = load_draft(str(folder)).state_dict()
    to_bin(folder)
    found = load_draft(str(folder)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_takes_the_targets_dtype(folder, embedding):
    head = load_draft(str(folder), dtype=torch.bfloat16, embedding=embedding.bfloat16())
    assert {tensor.dtype for tensor in head.state_dict().values()} == {torch.bfloat16}


def test_an_absent_table_is_the_targets(folder, embedding):
    change_weights(folder, embed_tokens__weight=None)
    assert torch.equal(load_draft(str(folder), embedding=embedding).embed_tokens.weight, embedding)
    text = message(folder)
    assert "model.safetensors" in text and EMBEDDING in text


def test_another_table_gives_one_warning(folder, embedding, caplog):
    change_weights(folder, embed_tokens__weight=embedding + 0.05)
    with caplog.at_level(logging.WARNING, "vispec"):
        load_draft(str(folder), embedding=embedding)
    (record,) = caplog.records
    assert "another or a fine-tuned target" in record.getMessage() and "model.safetensors" in record.getMessage()


def test_rounding_is_no_difference(folder, embedding, caplog):
    change_weights(folder, embed_tokens__weight=embedding.bfloat16())
    with caplog.at_level(logging.WARNING, "vispec"):
        load_draft(str(folder), dtype=torch.float32, embedding=embedding)
    assert not caplog.records


def test_a_table_of_another_size(folder, embedding):
    change_weights(folder, embed_tokens__weight=torch.zeros(50, 64))
    text = message(folder, embedding=embedding)
    assert all(part in text for part in (EMBEDDING, "(50, 64)", "(38, 64)", "model.safetensors"))


def test_a_head_for_another_target_is_refused(folder):
    with pytest.raises(ValueError, match="made for another target"):
        SpecModel.from_pretrained(str(GOLDEN / "qwen2_5_vl" / "target"), str(folder))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"img_fc__bias": None}, ["missing tensor(s) img_fc.bias"]),
        ({"img_fc__bias": None, "fc__weight": None}, ["missing tensor(s) fc.weight, img_fc.bias"]),
        ({"norm__weight": torch.ones(64)}, ["unexpected tensor(s) norm.weight"]),
        ({"fc__bias": torch.ones(65)}, ["fc.bias has shape (65,)", "(64,)"]),
        ({"imadpt__q": torch.ones(2, 4, 8)}, ["imadpt.q has shape (2, 4, 8)", "(2, 4, 16)"]),
    ],
)
def test_wrong_tensors_are_named(folder, changes, parts):
    change_weights(folder, **changes)
    text = message(folder)
    assert str(folder / "model.safetensors") in text
    assert all(part in text for part in parts)


def test_what_was_asked_is_checked(folder):
    assert message(folder, num_q=3).endswith("the vision adaptor has num_q 2, 3 was asked for")
    assert message(folder, "eagle2").endswith("these are vispec weights, method 'eagle2' was asked for")
    eagle = GOLDEN / "llava_next" / "draft_eagle2"
    assert message(eagle, "vispec").endswith("these are eagle2 weights, method 'vispec' was asked for")
    assert message(eagle, num_q=3).endswith("eagle2 weights without a vision adaptor, num_q 3 was asked for")


def test_num_q_is_read_from_the_weights():
    assert load_draft(str(GOLDEN / "qwen2_5_vl" / "draft_vispec")).num_q == 3


def test_missing_files_are_named(folder):
    (folder / "config.json").rename(folder / "away")
    assert message(folder) == f"{folder}: no config.json there"
    (folder / "away").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert message(folder) == f"{folder}: neither model.safetensors nor pytorch_model.bin there"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 2"),
        ({"num_attention_heads": 5}, "num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ],
)
def test_wrong_configs_are_named(folder, changes, part):
    change_config(folder, **changes)
    text = message(folder)
    assert str(folder / "config.json") in text and part in text


def test_broken_files_are_named(folder):
    (folder / "config.json").write_text("{")
    assert "config.json: not valid JSON" in message(folder)
    shutil.copy(DRAFT / "config.json", folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert "model.safetensors: cannot be read as weights" in message(folder)


class _Code:
    """A pickle that would make a folder when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_bin_with_code_in_it_is_refused(folder, tmp_path):
    to_bin(folder)
    torch.save({"fc.weight": _Code(tmp_path / "made")}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: cannot be read as weights" in message(folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("content", "part"), [({"epoch": 3}, "epoch is no tensor"), ([1, 2], "cannot be read")])
def test_a_bin_of_something_else_is_refused(folder, content, part):
    to_bin(folder)
    torch.save(content, folder / "pytorch_model.bin")
    text = message(folder)
    assert "pytorch_model.bin" in text and part in text


def test_saving_and_loading_keeps_everything(folder, tmp_path):
    change_config(folder, model_type="llava_next", our_own={"a": [1, 2]})
    head = load_draft(str(folder))
    save_draft(head, tmp_path / "again")
    again = load_draft(str(tmp_path / "again"))
    assert again.config == head.config
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    assert values["our_own"] == {"a": [1, 2]} and values["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert values.items() >= json.loads((folder / "config.json").read_text()).items()
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors"]


# --- the hub, offline ---


def cache_repository(cache: Path, repo_id: str, source: Path) -> Path:
    """Lay out a repository as huggingface_hub caches it; returns the folder of its files."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    files = repository / "snapshots" / revision
    shutil.copytree(source, files)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return files


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty hub cache; there is no network."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_ids_of_draft_heads(hub):
    expected = load_draft(str(DRAFT)).state_dict()
    cache_repository(hub, "someone/head", DRAFT)
    to_bin(cache_repository(hub, "someone/head-bin", DRAFT))
    for repo_id in ("someone/head", "someone/head-bin"):
        found = load_draft(repo_id).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_a_hub_repository_lacks_is_named(hub):
    assert message("someone/nowhere") == "someone/nowhere: no such folder, and the hub cannot be reached for it"
    assert message("not/a/hub/id") == "not/a/hub/id: neither a folder nor a hub id"
    files = cache_repository(hub, "someone/head", DRAFT)
    (files / "model.safetensors").unlink()
    assert message("someone/head").startswith("someone/head: neither model.safetensors nor pytorch_model.bin")
    (files / "config.json").unlink()
    assert message("someone/head") == "someone/head: no config.json in that hub repository"


LOAD_FROM_HUB = """
import torch
from vispec import SpecModel
from safetensors.torch import load_file
for draft in ("someone/head", "someone/head-bin"):
    model = SpecModel.from_pretrained("someone/target", draft, method="vispec", num_q=2)
    print(model.specgenerate(torch.tensor([{ids}]), max_new_tokens=4).tolist()[0])
for target in ("someone/nowhere", "{nowhere}"):
    try:
        SpecModel.from_pretrained(target)
    except (ValueError, OSError) as error:
        print(error)
"""


def test_hub_ids_of_both_through_the_users_environment(tmp_path):
    """HF_HOME is read when huggingface_hub is imported, so this needs a process of its own."""
    cache_repository(tmp_path / "hub", "someone/target", TARGET)
    cache_repository(tmp_path / "hub", "someone/head", DRAFT)
    to_bin(cache_repository(tmp_path / "hub", "someone/head-bin", DRAFT))
    case = recorded_case("llava_next", "vispec", 1)
    ids = case.inputs["input_ids"][0].tolist()
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_FROM_HUB.format(ids=ids, nowhere=tmp_path / "nowhere")],
        env={**environment, "HF_HOME": str(tmp_path)},
        cwd=CONFIGS.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = case.tensors["hf_generate_ids"][0, : len(ids) + 4].tolist()
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout
    assert lines[:2] == [str(expected)] * 2
    assert lines[2].startswith("someone/nowhere: ") and lines[3].startswith(f"{tmp_path / 'nowhere'}: ")


# --- what is something else ---


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.0.linear.weight", "0.0.linear.bias", "0.1.weight"], "the weights of one of FasterDecoding's Medusa heads"),
        (["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"], "the weights of a whole model"),
        (["module.fc.weight", "module.fc.bias"], "names begin with `module.`"),
    ],
)
def test_weights_of_something_else_are_named(folder, names, message):
    save_file({name: torch.zeros(2, 2) for name in names}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_draft(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"medusa_num_heads": 5}, "one of FasterDecoding's Medusa heads"),
        ({"text_config": {"hidden_size": 64}, "vision_config": {}}, "the config of a whole model"),
    ],
)
def test_a_config_of_something_else_is_named(folder, values, message):
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load_draft(str(folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_key_value_heads", 0), ("vocab_size", -1), ("rope_theta", "x"), ("rms_norm_eps", float("nan")), ("bias", 3)],
)
def test_a_size_that_is_none_is_named(folder, name, value):
    change_config(folder, **{name: value})
    with pytest.raises(ValueError, match=rf"config.json: {name} must be"):
        load_draft(str(folder))


def test_numbers_of_a_head_that_are_not_finite(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    weights[name][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} has numbers that are not finite"):
        load_draft(str(folder))


def test_embeddings_of_a_stranger(folder, embedding):
    change_weights(folder, embed_tokens__weight=torch.randn_like(embedding))
    with pytest.raises(ValueError, match="embed_tokens.weight has nothing in common with the target's table"):
        load_draft(str(folder), embedding=embedding)
