"""A smaller VLM as the draft: any VLM with the target's tokenizer, without training (SAGE, Spec-LLaVA).

It reads the whole prompt itself, images included, by the same `Target` code that verifies, and keeps a cache of its
own. The nodes of a tree's level go through it under the tree's mask: each sees the text, its ancestors and itself, as
in the target's pass. Nodes' keys are dropped after a round: to read the kept tokens again rides in the pass that the
newest token needs anyway, and no node of the last level has keys that could be kept.

What the processor made for the target is what the draft is given, so both must cut images into pixels and tokens alike.
Pixels are not normalised anew; published families of several sizes do that alike too. Which image rows `image_rows`
leaves is ours, SAGE does not say it: evenly spaced ones of every image and every frame. Their keys are dropped after
the prompt's pass, so that all that stay have seen the whole image and stand where they stood; a layer with a window
counts those that are there.

B rows, L tokens of a prompt, P tokens that were kept, k nodes of a tree's level, m nodes so far, H hidden size of the
draft, V its vocabulary.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from vispec.methods import VLM
from vispec.model.arguments import number
from vispec.model.drafts.base import Draft, Kept
from vispec.model.drafts.memory import CachedMemory
from vispec.model.families import image_token_id, video_token_id
from vispec.model.inputs import forward_parameters
from vispec.model.pairs import Span
from vispec.model.prompt import Prompt
from vispec.model.shape import TreeShape
from vispec.model.target import Target
from vispec.model.tree import Candidates, DraftOutput, Growth, expand_levels

logger = logging.getLogger("vispec")

PADDING = 1024
"""Most rows that tables of one tokenizer differ by, whose sizes are rounded up: Qwen2.5-VL 3B has 151936, 7B 152064."""
OF_TOWER = ("patch_size", "spatial_merge_size", "temporal_patch_size", "image_size", "num_channels", "in_channels")
OF_MODEL = ("vision_feature_select_strategy", "image_grid_pinpoints", "mm_tokens_per_image", "downsample_ratio")
"""What configs say about how an image becomes pixels and tokens."""


class VLMDraft(nn.Module, Draft):
    """A VLM that drafts.

    Args:
        model: a loaded VLM of transformers, or the `Target` around one; as a whole on the target's last device.
        image_rows: the share of each image's rows that it keeps, above 0; 1 keeps all.

    Raises:
        ValueError: it is of a kind that cannot follow trees, or `image_rows` is no such share.
    """

    method = VLM

    def __init__(self, model: PreTrainedModel | Target, image_rows: float = 1.0):
        super().__init__()
        if not 0 < number("draft_image_rows", image_rows) <= 1:
            raise ValueError(f"draft_image_rows must be above 0 and at most 1, found {image_rows}")
        self.image_rows = image_rows
        self.vlm = model if isinstance(model, Target) else _reader(model, fast=False)
        self.model = self.vlm.model
        """So that its weights are known as those of the draft."""
        if self.vlm.recurrent:
            raise ValueError(f"{self.name} has layers that keep one state of the whole text: it cannot draft trees")
        self.proposed = len(self.vlm.embed_tokens.weight)
        """How many tokens it may propose: those of its own table that are in the target's too."""

    @property
    def name(self) -> str:
        return f"the draft {type(self.model).__name__}"

    def make_lean(self) -> None:
        """Decode by the lean pass where that is possible."""
        if not self.vlm.fast:
            self.vlm = _reader(self.model, fast=True)

    # --- whether it fits ---

    def check(self, target: Target) -> None:
        """Raises ValueError where a target's tokens or its processor's images are not what the draft reads."""
        if self.vlm.device != target.device:
            raise ValueError(f"{self.name} is on {self.vlm.device}, the target on {target.device}: bring it there")
        rows, own = len(target.embed_tokens.weight), len(self.vlm.embed_tokens.weight)
        if abs(rows - own) > PADDING:
            raise ValueError(f"{self.name} has another tokenizer: {own} tokens, the target has {rows}")
        self.proposed = min(rows, own)
        different = _differences(self.model.config, target.config)
        if different:
            raise ValueError(
                f"{self.name} does not read images as the target's processor makes them: " + ", ".join(different)
            )

    def check_tokenizer(self, base_model_path: str, own: Mapping, where: Mapping) -> None:
        """Refuse a target whose tokenizer has another token under an id, or a token under another id.

        Either may have tokens that the other one lacks.

        Args:
            base_model_path: the target's folder or hub id.
            own, where: what tells the hub where to look, for the draft's and for the target's.
        """
        from transformers import AutoTokenizer

        paths = (self.model.name_or_path, own), (base_model_path, where)
        vocabularies = []
        for path, options in paths:
            try:
                vocabularies.append(AutoTokenizer.from_pretrained(path, **options).get_vocab())
            except Exception:  # transformers trips over what is missing or broken in many ways
                logger.warning("%s: no tokenizer there, so that of the draft VLM is not compared", path)
                return
        drafts, targets = vocabularies
        named = {i: token for token, i in targets.items()}
        for i, token in sorted((i, token) for token, i in drafts.items()):
            if targets.get(token, i) != i or named.get(i, token) != token:
                raise ValueError(
                    f"{self.model.name_or_path}: its tokenizer is another one than that of {base_model_path}: token "
                    f"{i} is {token!r}, there {named.get(i)!r}"
                )

    # --- decoding ---

    def fit(self, shape: TreeShape) -> TreeShape:
        return shape.fitted(self.proposed)

    def output(self, target: Target) -> DraftOutput:
        return DraftOutput(lambda hidden: self.vlm.logits(hidden)[..., : self.proposed], self.vlm.expect_logits)

    def expect(self, batch: int, shape: TreeShape) -> None:
        """Choose kernels for passes over the newest token, the nodes of a level, and all that a round may keep."""
        self.vlm.expect(batch * nodes for nodes in (1, shape.top_k, shape.levels + 1))

    def memory(self, rows: int, capacity: int, target: Target) -> CachedMemory:
        place = {"device": target.device}
        position = torch.zeros(rows, dtype=torch.long, **place)
        estimate = torch.zeros(rows, self.vlm.text_config.hidden_size, dtype=self.vlm.dtype, **place)
        return CachedMemory(self.vlm.new_cache(rows, capacity), position, estimate)

    def read(self, memory: CachedMemory, prompt: Prompt) -> int:
        memory.cache.restart()
        length = prompt.input_ids.shape[1]
        if length > self.vlm.max_positions:
            raise ValueError(f"{self.name} has {self.vlm.max_positions} positions, the prompt has {length} tokens")
        taken = forward_parameters(self.model)
        inputs = {name: value for name, value in prompt.inputs.items() if name in taken}
        try:
            own = self.vlm.prefill(memory.cache, self._own_ids(prompt.input_ids), inputs)
        except ValueError as error:
            raise ValueError(f"{self.name} does not read what the target has read: {error}") from error
        memory.position.fill_(length)
        if own.rope_delta is not None:
            memory.position += own.rope_delta[:, 0]
        return self._thin_images(memory, own.images[0], length)

    def _thin_images(self, memory: CachedMemory, images: Sequence[Span], length: int) -> int:
        """Drop keys of image rows, see `image_rows`; returns the tokens that are left."""
        if self.image_rows == 1 or not images:
            return length
        cache = memory.cache
        left = torch.tensor(kept_places(images, length, self.image_rows), device=cache.lengths.device)
        cache.restart()
        cache.keep(left[None, 1:])  # the first token begins the text, whatever it is
        cache.lengths.fill_(len(left))
        return len(left)

    def extend(self, memory: CachedMemory, kept: Kept) -> None:
        batch, count = kept.tokens.shape
        steps = torch.arange(count, device=kept.tokens.device)
        earlier = (steps[:, None] >= steps).expand(batch, -1, -1)
        tokens = kept.tokens.clamp(max=self._last)
        out = self._forward(memory, tokens, memory.position[:, None] + steps, earlier)
        memory.take_last(out, kept.counts)

    def candidates(
        self, memory: CachedMemory, shape: TreeShape, output: DraftOutput, growth: Growth | None = None
    ) -> Candidates:
        return expand_levels(memory.estimate[:, None], _Levels(self, memory, shape), shape, output, growth)

    def _forward(self, memory: CachedMemory, tokens, positions, ancestors) -> torch.Tensor:
        """(B, n, H); a text that has outgrown the draft's positions stays at the last one: it drafts worse there."""
        return self.vlm.forward(memory.cache, tokens, positions.clamp(max=self.vlm.max_positions - 1), ancestors).hidden

    @property
    def _last(self) -> int:
        """The id that stands for all that are behind the draft's table."""
        return len(self.vlm.embed_tokens.weight) - 1

    def _own_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """A prompt's ids as the draft can read them; marks of images may lie behind its table, as in some families."""
        ids = input_ids.clamp(max=self._last)
        for mark in (image_token_id(self.model.config), video_token_id(self.model.config)):
            if mark is not None:
                ids = torch.where(input_ids == mark, input_ids, ids)
        return ids


class _Levels:
    """Runs a VLM on one level of a tree after the other; the keys of the nodes stay provisional."""

    def __init__(self, draft: VLMDraft, memory: CachedMemory, shape: TreeShape):
        self._draft, self._memory, self._k, self._level = draft, memory, shape.top_k, 0
        nodes, device = shape.depth * shape.top_k, memory.position.device
        self.sees = torch.eye(nodes, dtype=torch.bool, device=device).repeat(len(memory.position), 1, 1)
        """(B, m, m) which nodes each of them sees."""

    def resume(self, level: int, sees: torch.Tensor | None) -> None:
        self._level = level
        if sees is not None:
            self.sees = sees.clone()

    def __call__(self, hidden: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        start, stop = self._level * self._k, (self._level + 1) * self._k
        if parents is not None:  # a node sees what its parent sees, and itself
            above = self.sees[:, start - self._k : start]
            self.sees[:, start:stop] |= above.gather(1, parents[..., None].expand(-1, -1, above.shape[2]))
        positions = (self._memory.position + self._level)[:, None].expand(-1, self._k)
        self._level += 1
        return self._draft._forward(self._memory, tokens, positions, self.sees[:, :stop, :stop])


def kept_places(images: Sequence[Span], length: int, share: float) -> list[int]:
    """The tokens of a prompt that are left where each image keeps this share of its rows, at least one, evenly spaced.

    >>> kept_places([(1, 11)], 12, 0.2)
    [0, 3, 8, 11]
    """
    dropped = set()
    for start, end in images:
        rows = end - start
        count = max(round(share * rows), 1)
        dropped |= set(range(start, end)) - {start + (2 * i + 1) * rows // (2 * count) for i in range(count)}
    return [place for place in range(length) if place == 0 or place not in dropped]


def _reader(model: PreTrainedModel, fast: bool) -> Target:
    try:
        return Target(model, fast)
    except ValueError as error:
        raise ValueError(f"as a draft: {error}") from error


def _differences(draft, target) -> list[str]:
    """What two configs say otherwise about images."""
    facts = [
        ("image token", image_token_id(draft), image_token_id(target)),
        ("video token", video_token_id(draft), video_token_id(target)),
    ]
    kinds = draft.model_type, target.model_type
    if kinds[0] != kinds[1]:
        processors = [IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) for kind in kinds]
        if processors[0] is None or processors[0] != processors[1]:
            facts.append(("family", *kinds))
    for names, configs in (
        (OF_TOWER, [getattr(config, "vision_config", None) for config in (draft, target)]),
        (OF_MODEL, (draft, target)),
    ):
        facts += [(name, *(getattr(config, name, None) for config in configs)) for name in names]
    return [
        f"{name} {own}, the target has {other}"
        for name, own, other in facts
        if own != other and None not in (own, other)
    ]
