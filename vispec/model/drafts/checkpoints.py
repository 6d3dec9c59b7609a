"""Read and write draft heads, strictly: what is missing, surplus or misshapen is an error that names it."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from vispec.files import read_json, write_atomic, write_json_atomic
from vispec.model.arguments import of_kind
from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.formats import as_specforge, as_vispec, flat_config, is_eagle3, is_nemo
from vispec.model.drafts.hub import CARD
from vispec.model.hub_files import CONFIG, PICKLED, SAFETENSORS, find_file
from vispec.model.refusals import refuse_not_finite

logger = logging.getLogger("vispec")

EMBEDDING, INPUT_NORM = "embed_tokens.weight", "layers.0.input_layernorm.weight"
LEAST_ALIKE = 0.5
"""Mean cosine of the embeddings of a head and its target: near 1 after fine-tuning, near 0 between strangers."""


def save_draft(head: nn.Module, folder: str | Path, dtype: torch.dtype | None = None, embedding: bool = True) -> None:
    """Write config.json, model.safetensors and, where the head has them, draft vocabulary and model card into `folder`.

    Each file appears whole or not at all.

    Args:
        dtype: of the floating tensors in the file; the head's when None.
        embedding: False leaves the embedding table out: the head then loads with its target, which has it.
    """
    tensors = _converted(head.state_dict() if embedding else own_tensors(head), dtype)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(Path(folder) / SAFETENSORS, lambda file: file.write(save(tensors, metadata={"format": "pt"})))
    write_json_atomic(Path(folder) / CONFIG, head.config.to_dict())
    if head.draft_vocab is not None:
        head.draft_vocab.write(folder)
    if head.card is not None:
        write_atomic(Path(folder) / CARD, lambda file: file.write(head.card.encode()))


def own_tensors(head: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a head without the embedding table, which is its target's."""
    return {name: tensor for name, tensor in head.state_dict().items() if name != EMBEDDING}


def _converted(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Floating tensors in a dtype; EAGLE-3 has tables of tokens beside them."""
    return {name: one.to(dtype) if dtype and one.is_floating_point() else one for name, one in tensors.items()}


def read_config(path: str | Path) -> DraftConfig:
    """Read a draft head's config file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file")
    try:
        values = flat_config(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return DraftConfig.from_dict(values, source=str(path))


def find_draft(path: str, **hub) -> tuple[DraftConfig, Path]:
    """Config and weights file of a draft head in a folder or a hub repository; `hub` as for `find_file`.

    Raises:
        ValueError: one of them is missing, or the config is wrong; or a revision of a folder was asked for.
    """
    check_place(path, **hub)
    local = Path(path).is_dir()
    place = "there" if local else "in that hub repository"
    place += "".join(f", {name} {hub[name]}" for name in ("revision", "subfolder") if hub.get(name))
    config = find_file(path, CONFIG, **hub)
    if config is None:
        raise ValueError(f"{path}: no {CONFIG} {place}")
    weights = find_file(path, SAFETENSORS, **hub) or find_file(path, PICKLED, **hub)
    if weights is None:
        raise ValueError(f"{path}: neither {SAFETENSORS} nor {PICKLED} {place}")
    return read_config(config), weights


def check_place(path: str, **hub) -> None:
    """Raises TypeError or ValueError where `find_draft` is asked for no place that a draft can be in."""
    of_kind("spec_model_path", path, str, PathLike)
    of_kind("spec_subfolder", hub.get("subfolder"), str)
    if Path(path).is_dir() and hub.get("revision"):
        raise ValueError(f"{path}: a folder has no revisions, found revision {hub['revision']}")


def read_weights(path: Path, config: DraftConfig) -> tuple[dict[str, torch.Tensor], DraftConfig]:
    """The tensors of a file by the names that heads have here, and a config that says what they show.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # the readers raise half a dozen types for a broken file; all mean the same to the user
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: cannot be read as weights ({reason})") from None
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {name} is no tensor but a {type(value).__name__}")
        if value.dim() == 0:
            raise ValueError(f"{path}: {name} is a single number, expected a tensor of one dimension or more")
    foreign = _foreign(weights)
    if foreign is not None:
        raise ValueError(f"{path}: {foreign}, expected a draft head of ViSpec, EAGLE-2, EAGLE-3 or Medusa")
    weights = as_vispec(weights)
    if not is_eagle3(weights):
        if INPUT_NORM in weights:  # of others, whose configs leave to the model's type whether there are biases
            config = replace(config, qkv_bias="layers.0.self_attn.q_proj.bias" in weights)
        return weights, config
    try:
        return as_specforge(weights, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _foreign(names: Iterable[str]) -> str | None:
    """What tensors of these names are, where they are those of something else; None where they may be a draft head."""
    names = list(names)
    if names and all(name.startswith("module.") for name in names):
        return "its tensors' names begin with `module.`, so a wrapper was saved and not the head in it"
    if names and all(re.fullmatch(r"\d+\.\d+\.(linear\.)?(weight|bias)", name) for name in names):
        return "these are the weights of one of FasterDecoding's Medusa heads"
    if any(re.search(r"(^|\.)layers\.[1-9]\d*\.", name) for name in names):
        return "these are the weights of a whole model, of several layers"
    return None


def identify(
    weights: Mapping[str, torch.Tensor], config: DraftConfig, path: Path, method: str | None, num_q: int | None
) -> dict[str, str | int | bool]:
    """Method and what `build_head` asks of it, as the weights have them, checked against what was asked."""
    queries, input_norm = weights.get("imadpt.q"), INPUT_NORM in weights
    medusa = {name.split(".")[1] for name in weights if name.startswith("medusa_head.")}
    found = "vispec" if queries is not None else "medusa" if medusa else "eagle3" if is_eagle3(weights) else "eagle2"
    if found == "eagle2" and "fc_norm.weight" in weights:
        found = "specvlm"
    elif found == "eagle2" and ("msd" in (method, config.extra.get("method")) or input_norm):
        found = "msd"
    if method is not None and method != found:
        raise ValueError(f"{path}: these are {found} weights, method {method!r} was asked for")
    if queries is None:
        if num_q is not None:
            raise ValueError(f"{path}: these are {found} weights without a vision adaptor, num_q {num_q} was asked for")
        sizes = {"medusa": {"heads": len(medusa)}, "msd": {"input_norm": input_norm}}
        return {"method": found, **sizes.get(found, {})}
    if len(queries) == 0:
        raise ValueError(f"{path}: the vision adaptor's imadpt.q has no queries, its shape is {tuple(queries.shape)}")
    listed = config.extra.get("vispec_num_query_tokens", queries.shape[0])
    if listed != queries.shape[0]:
        raise ValueError(f"{path}: imadpt.q has {queries.shape[0]} queries, vispec_num_query_tokens says {listed!r}")
    if num_q is not None and num_q != queries.shape[0]:
        raise ValueError(f"{path}: the vision adaptor has num_q {queries.shape[0]}, {num_q} was asked for")
    return {"method": found, "num_q": queries.shape[0], "norms": is_nemo(config.extra)}


def fill(
    head: nn.Module,
    weights: Mapping[str, torch.Tensor],
    path: Path,
    dtype: torch.dtype | None = None,
    embedding: torch.Tensor | None = None,
) -> None:
    """Give a head without memory its weights, read from `path`.

    Args:
        dtype: to compute in; that of the weights when None.
        embedding: the target's (V, H) table; a head of another target is refused, or named.

    Raises:
        ValueError: a tensor is missing, surplus, misshapen or not finite, or the embeddings are a stranger's.
    """
    table = weights.get(EMBEDDING, embedding)
    if table is None:
        raise ValueError(f"{path}: no {EMBEDDING}, and no target to take it from")
    if embedding is not None and table is not embedding:
        _compare_embedding(table, embedding, path)
    weights = {**weights, EMBEDDING: table}
    _check_tensors(head, weights, path)
    refuse_not_finite(str(path), weights.items())
    weights = _converted(weights, dtype)
    if embedding is not None and _same(weights[EMBEDDING], embedding):
        weights[EMBEDDING] = embedding.detach()  # the target's own table: no second copy in memory
    head.load_state_dict(weights, assign=True)


def _check_tensors(head: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    expected = head.state_dict()
    missing, surplus = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing:
        raise ValueError(f"{path}: missing tensor(s) {', '.join(missing)}")
    if surplus:
        raise ValueError(f"{path}: unexpected tensor(s) {', '.join(surplus)}")
    for name, tensor in expected.items():
        found, shape = weights[name], tuple(tensor.shape)
        if tuple(found.shape) != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(found.shape)}, the config asks for {shape}")
        if found.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {found.dtype}, a draft head's is {tensor.dtype}")


def _compare_embedding(ours: torch.Tensor, target: torch.Tensor, path: Path) -> None:
    """The head must belong to this target: same table shape, and the same numbers up to rounding."""
    if ours.shape != target.shape:
        raise ValueError(
            f"{path}: made for another target: its {EMBEDDING} is {tuple(ours.shape)}, "
            f"the target's {tuple(target.shape)}"
        )
    # by parts: whole tables in float32 may not fit beside the target
    parts = list(zip(ours.split(4096), target.split(4096), strict=True))
    if not all(_close(a.to(b.device), b) for a, b in parts):
        alike = [torch.cosine_similarity(a.to(b.device).float(), b.float(), dim=1) for a, b in parts]
        if torch.cat(alike).mean() < LEAST_ALIKE:
            raise ValueError(
                f"{path}: its {EMBEDDING} has nothing in common with the target's table: random, or of another target"
            )
        logger.warning(
            "%s: the draft head's embeddings are not the target's; it was made for another or a fine-tuned target. "
            "Outputs stay the target's own, speed may suffer",
            path,
        )


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-5)  # one step of bfloat16


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.to(b.device), b)
