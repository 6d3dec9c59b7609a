"""Loading a target with its draft head, for command lines."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vispec.methods import BASELINE, GENERATE, LOOKUP, UNDRAFTED, VLM, method_of
from vispec.model.shape import TUNE, TreeShape

if TYPE_CHECKING:
    from vispec.model.spec_model import SpecModel


@dataclass(frozen=True)
class Models:
    """A target with the drafts of some methods, and how they are loaded."""

    base_model_path: str
    drafts: Mapping[str, str | None] = field(default_factory=dict)
    """Draft heads by method and label; None for what has none: lookup, and transformers' generate()."""
    tree: TreeShape | str = TreeShape()
    """AUTO: chosen while answers are made; TUNE: to be measured, the default one until then."""
    num_q: int | None = None
    """Queries of a vision adaptor, checked against its weights; None takes what they have."""
    dtype: str = "auto"
    """One of `vispec.cli.DTYPES`."""
    device_map: str | None = None
    """transformers' device_map; None takes the first GPU, all of them if `gpus` > 1, or the CPU."""
    gpus: int = 1
    tuned: Mapping[str, TreeShape] = field(default_factory=dict)
    """By method, what stands in place of TUNE because earlier answers have it."""
    skip_visual: float | None = None
    """See `vispec.model.gaze`; None skips no draft."""
    places: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By method, revision and subfolder of its draft head where they were asked for."""
    draft_image_rows: float | None = None
    """Share of image rows that a smaller VLM as the draft keeps; None keeps all."""
    prefix_cache: int = 0
    """Tokens of a conversation's prompts that are kept, so that its next turn is read on from them."""

    @property
    def drafting(self) -> list[str]:
        """The methods that draft trees."""
        return [method for method in self.drafts if method not in UNDRAFTED]

    def tree_of(self, method: str) -> TreeShape | str:
        return self.tuned.get(method, self.tree)

    def place_of(self, method: str) -> Mapping[str, str]:
        """Where in its folder or hub repository a draft head is."""
        return self.places.get(method, {})


def load_model(
    base_model_path: str,
    spec_model_path: str | None,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    gpus: int = 1,
    **options,
):
    """A `SpecModel`; `options` go to its `from_pretrained` (method, tree, skip_visual, draft_image_rows, num_q, …).

    Args:
        dtype: one of `vispec.cli.DTYPES`.
        device_map: transformers' device_map; None takes the first GPUs, as many as `gpus` says, or the CPU.
    """
    import torch

    from vispec import SpecModel

    if device_map is None and torch.cuda.is_available():
        device_map = "auto" if gpus > 1 else "cuda"
        if gpus > 1:
            from accelerate.utils import get_max_memory

            options["max_memory"] = {gpu: free for gpu, free in get_max_memory().items() if gpu in range(gpus)}
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    options = {name: value for name, value in options.items() if value is not None}
    return SpecModel.from_pretrained(
        base_model_path, spec_model_path, torch_dtype=torch_dtype, device_map=device_map, **options
    )


def load_models(models: Models) -> dict[str, "SpecModel"]:
    """The baseline and every method of `models`, over one target."""
    from vispec import SpecModel
    from vispec.model.drafts import PromptLookup
    from vispec.model.drafts.loading import find_any_draft, load_any_draft

    for method, path in models.drafts.items():
        if path is not None:  # what is wrong is said before minutes of loading
            find_any_draft(path, method_of(method), **models.place_of(method))
    plain = load_model(models.base_model_path, None, dtype=models.dtype, device_map=models.device_map, gpus=models.gpus)
    target = plain.target
    loaded = {BASELINE: plain}
    for method, path in models.drafts.items():
        if method == GENERATE:
            loaded[method] = plain
            continue
        if method == LOOKUP:
            draft = PromptLookup()
        else:
            kind = method_of(method)
            image_rows = models.draft_image_rows if kind == VLM else None
            asked = {"num_q": models.num_q, "image_rows": image_rows, **models.place_of(method)}
            draft = load_any_draft(path, target, kind, **asked)
        tree = models.tree_of(method)
        loaded[method] = SpecModel(target, draft, tree=None if tree == TUNE else tree, skip_visual=models.skip_visual)
    return loaded


def keep_prompts(model, tokens: int) -> None:
    """Let the model keep so many tokens of prompts, from which further ones are read on (--prefix-cache); 0: none."""
    if tokens:
        from vispec.model.prefixes import PrefixCache

        model.target.prefixes = PrefixCache(tokens)


def dtype_name(model) -> str:
    """The dtype that a model computes in, as the flag spells it."""
    return str(model.target.dtype).removeprefix("torch.")


def quiet_transformers() -> None:
    """Keep transformers' advice to programmers off the screen of a command line's user."""
    import transformers

    transformers.logging.set_verbosity_error()
