"""A target's folder with a broken file, or one that does not belong to the others: one line that names it."""

import json
import shutil

import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file, save_file
from test_checkpoints import TARGET, cache_repository, hub  # noqa: F401 - a fixture
from tiny_models import GOLDEN, random_target

from vispec import SpecModel
from vispec.ge_data.target_identity import identify_target
from vispec.model.loading import load_target
from vispec.train.target_weights import read_tables

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD = version.parse(transformers.__version__).major < 5


@pytest.fixture(params=["llava_next", "qwen2_5_vl"])
def folder(request, tmp_path):
    return shutil.copytree(GOLDEN / request.param / "target", tmp_path / "target")


def refused(folder, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SpecModel.from_pretrained(str(folder), **options)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def edit(folder, **values) -> None:
    """Change the config, that of the text decoder where there is one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.get("text_config", config).update(values)
    config["transformers_version"] = "5.23.0" if "rope_parameters" in values else transformers.__version__
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", f"{WEIGHTS}: a git-lfs pointer.*git lfs pull"),
        (b"", f"{WEIGHTS}: empty: download it again"),
        (slice(-1000), rf"{WEIGHTS}: cut off or damaged \(.*\): download it again"),
        (slice(100), rf"{WEIGHTS}: cut off or damaged \(.*\): download it again"),
    ],
)
def test_broken_weights(folder, content, message):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[content] if isinstance(content, slice) else content)
    refused(folder, message)
    with pytest.raises(ValueError, match=message):  # training reads two tables of it
        read_tables(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ("[", "not valid JSON"),
        ('{"weight_map": {"a": "part.safetensors"}}', "part.safetensors: no such file"),
        ('{"weight_map": {"a": "../part.safetensors"}}', "../part.safetensors is no file beside it"),
    ],
)
def test_broken_index(folder, content, message):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)
    refused(folder, message)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, expected JSON"),
        (b"[]", "expected an object, found a list"),
        (b"[" * 100_000, r"not valid JSON \(nested too deep\)"),
        (b'{"a": "\xe9"}', "not UTF-8"),
    ],
)
def test_broken_json(folder, name, content, message):
    (folder / name).write_bytes(content)
    refused(folder, f"{name}: {message}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 999}, r"asks for other shapes than those of its weights \(.*lm_head.weight"),
        ({"hidden_act": "nope"}, f"hidden_act 'nope' is not known to transformers {transformers.__version__}"),
        ({"rope_scaling": {"rope_type": "nope"}}, "rope_type 'nope' is not known to transformers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"max_position_embeddings": "4096"}, "max_position_embeddings"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
    ],
)
def test_what_this_version_does_not_know(folder, values, message):
    edit(folder, **values)
    refused(folder, message)


@pytest.mark.skipif(not OLD, reason="transformers 5 reads them")
@pytest.mark.parametrize("theta", [500.0, None])
def test_positions_that_are_not_read(folder, theta):
    """Also where transformers 5 has written what an older one takes for granted."""
    config = json.loads((folder / "config.json").read_text())
    known = config.get("text_config", config).get("rope_theta", 10000.0)
    edit(folder, rope_parameters={"rope_type": "default", "rope_theta": theta or known})
    if theta is None:
        load_target(str(folder))
    else:
        refused(folder, rf"saved by transformers 5.23.0, and {transformers.__version__}, .*\(rope_theta 500.0\)")


def test_a_tied_head_with_weights_of_its_own(folder):
    """Decoding must be by the tensor that training reads."""
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True
    if "text_config" in config:
        config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    if OLD:
        refused(folder, "ties the output head to the embedding.* have another lm_head.weight")
    else:
        tensors = load_file(folder / WEIGHTS)
        own = next(tensor for name, tensor in tensors.items() if name.endswith("lm_head.weight"))
        assert torch.equal(load_target(str(folder)).get_output_embeddings().weight, own)


@pytest.mark.parametrize("part", [None, "vision", []])
def test_parts_of_a_config_that_are_none(folder, part):
    """Transformers would build such a part at its full default size."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": part}))
    refused(folder, "vision_config is .*, expected an object")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "nope"}, "quantization_config.quant_method 'nope' is not known to transformers"),
        ("int4", "quantization_config is 'int4', expected an object"),
        ({"bits": 4}, "quant_method"),
    ],
)
def test_a_quantization_that_is_not_known(folder, quantization, message):
    """Transformers would go on as if there was none."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    refused(folder, message)


@pytest.mark.parametrize("name", ["float16", "float99"])
def test_the_dtype_by_its_newer_name(folder, name):
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype")
    (folder / "config.json").write_text(json.dumps(config | {"dtype": name}))
    if name == "float99":
        refused(folder, "float99")
    else:
        assert load_target(str(folder)).dtype == torch.float16
        assert identify_target(str(folder), "auto")["dtype"] == "float16"


@pytest.mark.parametrize("zipped", [True, False])
def test_tables_of_a_target_as_bin(folder, zipped):
    expected = read_tables(str(folder))
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    assert all(map(torch.equal, read_tables(str(folder)), expected))
    file.rename(folder / "part.bin")
    (folder / f"{file.name}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "part.bin")}))
    assert all(map(torch.equal, read_tables(str(folder)), expected))
    for content, message in ((b"", "empty"), (b"version https://git-lfs", "git-lfs pointer"), (b"x", "cannot be read")):
        (folder / "part.bin").write_bytes(content)
        with pytest.raises(ValueError, match=f"part.bin: .*{message}"):
            read_tables(str(folder))


def test_tables_of_a_target_on_the_hub(hub):  # noqa: F811
    """Without the network, from a repository that has no index of several files."""
    cache_repository(hub, "someone/target", TARGET)
    assert all(map(torch.equal, read_tables("someone/target"), read_tables(str(TARGET))))
    with pytest.raises(ValueError, match="someone/other: no such folder, and the hub cannot be reached for it"):
        read_tables("someone/other")


def test_devices_that_are_not_there(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device_map cuda:0: torch sees no GPU here"):
        load_target(str(folder), device_map="cuda:0")


def test_numbers_that_are_not_finite(folder):
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="mlp.up_proj.weight has numbers that are not finite"):
        SpecModel.from_pretrained(str(folder))
    target = random_target("llava_1.5", 0)
    target.get_output_embeddings().weight.data[3, 3] = torch.inf
    with pytest.raises(ValueError, match="weight has numbers that are not finite"):
        SpecModel(target)
