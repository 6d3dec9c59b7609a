"""Draft heads on the hub: their model cards, and pushing."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from vispec.methods import HEADS
from vispec.model.drafts.vocabulary import with_vocabulary_section

CARD = "README.md"
THIS_HEAD = "<this folder or its hub id>"
"""Stands in a model card for the place of the head, until it is pushed and has one."""
GENERATE = "custom_generate/generate.py"
"""Where transformers looks for a decoding method in a repository."""
DECODING = '''"""Decode with this head: target.generate(**inputs, custom_generate="{head}", trust_remote_code=True)."""

from vispec import SpecModel

HEAD = "{head}"


def generate(model, inputs=None, **options):
    pairs = vars(model).setdefault("_vispec_pairs", {{}})
    if HEAD not in pairs:
        pairs[HEAD] = SpecModel.from_pretrained(model, HEAD)
    if inputs is not None:
        options["input_ids"] = inputs
    return pairs[HEAD].generate(**options)
'''
"""What stands there."""
MEASURES = {
    "loss": "loss",
    "top1": "top-1 accuracy",
    "top3": "top-3 accuracy",
    "tau_of_chain": "tokens right in a row, of drafts of 5 tokens",
}
"""What a model card tells of the held-out measures, and how it calls them."""


def upload_head(
    save: Callable[[str], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload draft head",
    create_pr: bool = False,
) -> str:
    """Upload the files of a head to a model repository, which is made where it is missing.

    A decoding method for transformers' generate() goes with them, see `DECODING`.

    Args:
        save: writes them into a folder.
        repo_id: "owner/name".
        private: of a new repository; None leaves it to the owner's settings.
        token, revision, commit_message, create_pr: see huggingface_hub's `upload_folder`.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        card = Path(folder, CARD)
        card.write_text(card.read_text(encoding="utf-8").replace(THIS_HEAD, repo_id), encoding="utf-8")
        method = Path(folder, GENERATE)
        method.parent.mkdir()
        method.write_text(DECODING.format(head=repo_id), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def model_card(
    head: nn.Module,
    base_model: str | None = None,
    data: Sequence[str] = (),
    settings: Mapping | None = None,
    held_out: Mapping[str, float] | None = None,
) -> str:
    """The text of a model card.

    Args:
        head: its method and sizes are told.
        base_model: the target, a hub id or a local folder, of which only the name is told.
        data: folders of training samples, likewise.
        settings: of the training.
        held_out: losses and accuracies on samples that were held out.
    """
    from huggingface_hub import ModelCardData

    target = _name(base_model) if base_model else "its target"
    on_hub = base_model is not None and not Path(base_model).exists()
    metadata = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="vispec",
        pipeline_tag="image-text-to-text",
        tags=["speculative-decoding", "draft-model", head.method],
    )
    name, config = HEADS[head.method], head.config
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {name} draft head for {target}\n",
        f"A draft head for lossless tree speculative decoding of {target}: {name} with {trained:,} parameters beside "
        f"the target's embedding table, hidden size {config.hidden_size}, vocabulary {config.vocab_size}. The answers "
        "are the target's own; the head only makes them come faster.\n",
        "## Use\n\n```python\nfrom vispec import SpecModel\n\n"
        f'model = SpecModel.from_pretrained("{base_model if on_hub else "<the target>"}", "{THIS_HEAD}")\n'
        "output_ids = model.generate(**inputs, max_new_tokens=512)  # inputs: what the target's processor returns\n"
        "```\n\n"
        "Or, from transformers 4.56 on, by the target itself, wherever ViSpec is installed: "
        f'`target.generate(**inputs, custom_generate="{THIS_HEAD}", trust_remote_code=True)`.\n',
    ]
    if data or settings:
        rows = {"data": ", ".join(map(_name, data))} if data else {}
        parts.append(f"## Training\n\n{_table('setting', rows | dict(settings or {}))}")
    if held_out:
        measures = {MEASURES[key]: f"{value:.4g}" for key, value in held_out.items() if key in MEASURES}
        parts.append(f"## On held-out samples\n\n{_table('measure', measures)}")
    card = "\n".join(parts)
    return card if head.draft_vocab is None else with_vocabulary_section(card, head.draft_vocab)


def _name(path: str) -> str:
    """A hub id as it is; of a local folder the last part, since the rest is nobody's business."""
    return Path(path).resolve().name if Path(path).exists() else path


def _table(head: str, rows: Mapping) -> str:
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join([f"| {head} | |", "|---|---|", *lines]) + "\n"
