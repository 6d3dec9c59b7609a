"""EAGLE-2 heads as vLLM and SGLang read them: names, shapes, config, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import GOLDEN

from vispec.model.drafts import BaseHead, DraftHead, load_draft
from vispec.model.export import export, main

LLAVA, QWEN = GOLDEN / "llava_next", GOLDEN / "qwen2_5_vl"


def plain_head() -> BaseHead:
    """One that vLLM can hold: no biases."""
    head = load_draft(str(LLAVA / "draft_eagle2"))
    return DraftHead(replace(head.config, bias=False, qkv_bias=False))


def test_vllm_reads_a_llama_without_biases(tmp_path):
    head = plain_head()
    export(head, "vllm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["num_hidden_layers"] == 1 and config["tie_word_embeddings"] is False and "bias" not in config
    found = load_file(tmp_path / "out" / "model.safetensors")
    size = head.config.hidden_size
    assert found["fc.weight"].shape == (size, 2 * size) and not [name for name in found if name.endswith("bias")]
    assert found.keys() == head.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in head.state_dict().items())


@pytest.mark.parametrize(("pair", "name"), [(LLAVA, "Llama"), (QWEN, "Qwen2")])
def test_sglang_command(tmp_path, pair, name):
    main([str(pair / "draft_eagle2"), "--format", "sglang", "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [f"{name}ForCausalLMEagle"]
    found, head = load_file(tmp_path / "out" / "model.safetensors"), load_draft(str(pair / "draft_eagle2"))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in head.state_dict().items()}


def test_sglang_gets_a_bias_of_zeros(tmp_path):
    export(plain_head(), "sglang", tmp_path / "out")
    assert not load_file(tmp_path / "out" / "model.safetensors")["fc.bias"].any()


@pytest.mark.parametrize(
    ("draft", "format", "reason"),
    [("draft_vispec", "sglang", "its sequence is shorter"), ("draft_eagle2", "vllm", "has no fc.bias")],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, draft, format, reason):
    with pytest.raises(ValueError, match=reason):
        export(load_draft(str(LLAVA / draft)), format, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_stays(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="holds something already"):
        export(plain_head(), "vllm", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
