"""Write an EAGLE-2 head as vLLM and SGLang read it: `python -m vispec.model.export HEAD --format vllm|sglang --out F`.

The names of the tensors are ours already; the config says whose layer it is, and what an engine cannot hold is refused.
vLLM's EagleLlama has no bias in fc and, as far as we know, none in q, k and v; it drafts chains only. SGLang's classes
have a bias in fc: a head without one gets zeros, which change nothing. Neither file was run in its engine; `model_type`
of SGLang's classes is ours.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from vispec.cli import Parser, run_cli
from vispec.files import write_json_atomic
from vispec.model.drafts import BaseHead, load_draft
from vispec.model.hub_files import CONFIG, SAFETENSORS

FORMATS = ("vllm", "sglang")
KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "hidden_act")  # fmt: skip
"""Of our config that both read as they are."""


def export_config(head: BaseHead, format: str) -> dict:
    """The config.json of a head in a format; without our key `bias`, which vLLM reads as attention's."""
    qwen = head.config.qkv_bias
    architecture = "LlamaForCausalLM" if format == "vllm" else f"{'Qwen2' if qwen else 'Llama'}ForCausalLMEagle"
    config = {"architectures": [architecture], "model_type": "qwen2" if qwen else "llama"}
    config |= {key: getattr(head.config, key) for key in KEYS}
    if "head_dim" in head.config.extra:
        config["head_dim"] = head.config.head_dim
    return {**config, "tie_word_embeddings": False}


def export_tensors(head: BaseHead, format: str) -> dict[str, torch.Tensor]:
    """The tensors of an EAGLE-2 head by their names in a format.

    Raises:
        ValueError: the format cannot hold this head.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if head.method != "eagle2":
        reason = "its sequence is shorter than the target's" if head.method == "vispec" else "only EAGLE-2 heads are"
        raise ValueError(f"a {head.method} head cannot be written for {format}: {reason}")
    if head.draft_vocab is not None:
        raise ValueError(f"a draft vocabulary is not written for {format}: remove its file from the head's folder")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    if format == "vllm":
        found = [name for name in tensors if name.endswith(".bias")]
        if found:
            raise ValueError(
                f'vLLM\'s EAGLE head has no {", ".join(found)}: train with "bias": false and "qkv_bias": false'
            )
    elif "fc.bias" not in tensors:
        tensors["fc.bias"] = tensors["fc.weight"].new_zeros(len(tensors["fc.weight"]))
    return tensors


def export(head: BaseHead, format: str, folder: str | Path) -> None:
    """Write a head into a folder that is new or empty; it appears whole or not at all.

    Raises:
        ValueError: the format cannot hold this head, or the folder holds something.
    """
    folder = Path(folder)
    tensors = export_tensors(head, format)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: holds something already, expected a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        written = Path(place, "whole")
        written.mkdir()
        save_file(tensors, written / SAFETENSORS, metadata={"format": "pt"})
        write_json_atomic(written / CONFIG, export_config(head, format))
        os.replace(written, folder)


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    export(load_draft(options.head), options.format, options.out)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m vispec.model.export", description="Write an EAGLE-2 head for another engine.")
    parser.add_argument("head", help="a folder or a hub id")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", required=True, help="a new or an empty folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
