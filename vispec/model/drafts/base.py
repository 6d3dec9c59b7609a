"""What a draft is to decoding, and what all trained heads share.

A generation asks a draft for a `Memory` of so many rows, lets it `read` each prompt into a row, and then, round by
round, tells it what the target has said (`extend`) and asks what may come next (`candidates`). A draft decides by
itself what it remembers: keys and values of its own, positions of its own, the text, nothing. Of a prompt it gets all
there is, the processor's pixels too.

B rows, P pairs: a feature of the target, F numbers, and the token after it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import nn

from vispec.methods import HEADS
from vispec.model.drafts import checkpoints
from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.hub import CARD, model_card, upload_head
from vispec.model.drafts.vocabulary import VOCABULARY_FILE, DraftVocabulary
from vispec.model.hub_files import CONFIG, find_file, hub_options
from vispec.model.products import Products, obstacle
from vispec.model.prompt import Prompt
from vispec.model.shape import TreeShape
from vispec.model.target import Target
from vispec.model.tree import Candidates, DraftOutput, Growth


@dataclass
class Kept:
    """What the target has said that the draft has not read yet."""

    features: torch.Tensor
    """(B, P, F) of the root and the kept nodes, or of the last prompt token; surplus rows are ignored."""
    tokens: torch.Tensor
    """(B, P) the token after each of them."""
    counts: torch.Tensor
    """(B,) how many of the P pairs are real in each row."""


class Memory(Protocol):
    """What a draft remembers of the texts of a generation, row by row."""

    used: int
    """Places taken in the fullest row, or a bound of it: the host's to set."""

    def part(self, start: int, stop: int) -> "Memory":
        """The rows [start, stop), in the same tensors."""

    def move(self, source: int, target: int) -> None:
        """Let a row take the place of another one."""

    def clear(self) -> None:
        """Forget everything, for the next generation."""

    def enlarged(self, capacity: int) -> "Memory":
        """As many rows with more places, which hold what these hold."""


class Draft(ABC):
    """What proposes trees."""

    method: str
    by_level: bool = True
    """Whether it drafts level by level, so that an `AdaptiveTree` can end before its largest depth."""
    draft_vocab: DraftVocabulary | None = None
    """The tokens that it may propose; None: all."""

    @abstractmethod
    def check(self, target: Target) -> None:
        """Raises ValueError where it was made for another target."""

    @abstractmethod
    def make_lean(self) -> None:
        """Decode by joined products and chosen kernels from now on."""

    @abstractmethod
    def fit(self, shape: TreeShape) -> TreeShape:
        """The largest tree not above this one that the draft can fill."""

    def reach(self, shape: TreeShape) -> int:
        """Places that a round needs behind those that are taken: for what was kept, and for nodes that are expanded."""
        return shape.levels + 1 + shape.depth * shape.top_k

    def aux_layers(self, target: Target) -> tuple[int, ...]:
        """The layers of a target whose inputs it reads as features; none: it reads what the output head reads."""
        return ()

    @abstractmethod
    def output(self, target: Target) -> DraftOutput:
        """How its estimates become tokens of a target."""

    @abstractmethod
    def memory(self, rows: int, capacity: int, target: Target) -> Memory:
        """Room for texts of `capacity` tokens."""

    @abstractmethod
    def expect(self, batch: int, shape: TreeShape) -> None:
        """Get ready for rounds of a batch with trees of this shape."""

    @abstractmethod
    def read(self, memory: Memory, prompt: Prompt) -> int:
        """Read a prompt into a memory of one row, all but its last pair: that one comes with the first new token.

        Returns:
            How many places it takes.
        """

    @abstractmethod
    def extend(self, memory: Memory, kept: Kept) -> None:
        """Read what the target has said."""

    @abstractmethod
    def candidates(
        self, memory: Memory, shape: TreeShape, output: DraftOutput, growth: Growth | None = None
    ) -> Candidates:
        """All that may follow what was read; `shape` is one that it can fill.

        An `AdaptiveTree`, which only drafts `by_level` are asked for, comes with the `growth` for `expand_levels`.
        """


Head = TypeVar("Head", bound="BaseHead")


class BaseHead(nn.Module, Draft):
    """What all draft heads share: config, the frozen copy of the target's embedding table, files, and the hub."""

    kinds: ClassVar[dict[str, type["BaseHead"]]] = {}
    """The class of each method."""
    reads_target_head: ClassVar[bool] = True
    """Whether its estimates become tokens by the target's output head, of which a draft vocabulary takes some rows."""
    reads_image_features: bool = False
    """Whether it reads the target's features of image rows too."""
    fixed_depth: int | None = None
    """Expansions of the head's trees where it allows one depth only; None: as many as are asked for."""
    card: str | None = None
    """The model card that the head came with, or that its training wrote."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):
            BaseHead.kinds[cls.method] = cls

    @classmethod
    def new_config(cls, config: DraftConfig) -> DraftConfig:
        """Of a head whose training begins, from what was asked for; a method may take more of its own."""
        return config

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.weight.requires_grad_(False)
        self._products: Products | None = None

    def __getstate__(self) -> dict:
        """A copy starts without products, whose kernels cannot be copied."""
        return {**self.__dict__, "_products": None}

    # --- decoding ---

    @property
    def target_size(self) -> int:
        """Hidden size of the target."""
        return self.config.hidden_size

    @property
    def proposed(self) -> int:
        """How many tokens it may propose."""
        return self.config.vocab_size if self.draft_vocab is None else len(self.draft_vocab)

    def check(self, target: Target) -> None:
        vocabulary, hidden = target.embed_tokens.weight.shape
        found = self.target_size, self.config.vocab_size
        if found != (hidden, vocabulary):
            raise ValueError(
                f"the draft head was made for another target: hidden_size {found[0]} and vocab_size {found[1]}, "
                f"the target has {hidden} and {vocabulary}"
            )
        wanted = torch.empty(0, dtype=target.dtype, device=target.device)  # "cuda" becomes "cuda:0"
        places = {(parameter.dtype, parameter.device) for parameter in self.parameters()}
        if places != {(wanted.dtype, wanted.device)}:
            found = " and ".join(sorted(f"{dtype} on {device}" for dtype, device in places))
            raise ValueError(
                f"the draft head is in {found}, the target in {wanted.dtype} on {wanted.device}: bring the head there "
                "by draft.to(device, dtype)"
            )

    def fit(self, shape: TreeShape) -> TreeShape:
        return shape.fitted(self.proposed, self.fixed_depth)

    def output(self, target: Target) -> DraftOutput:
        if self.draft_vocab is None:
            return DraftOutput(target.logits, target.expect_logits)
        return self.draft_vocab.output(target)

    def make_lean(self) -> None:
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        if self._products is None and all(obstacle([layer]) is None for layer in layers):
            self._products = Products()
            for layer in self.beside_layers():
                self._products.of(layer)

    def beside_layers(self) -> list[nn.Module]:
        """What `linear` is called with."""
        return []

    def refresh(self) -> None:
        """With every prompt: weights may have been trained, moved or put into adapters since the last one."""
        if self._products is not None and any(obstacle([layer]) for layer in self.beside_layers()):
            self._products = None
        if self._products is not None:
            self._follow()

    def _follow(self) -> None:
        self._products.refresh()

    def expect(self, batch: int, shape: TreeShape) -> None:
        """Choose kernels for passes over the nodes of a level."""
        if self._products is not None:
            self._products.expect([batch * shape.top_k])

    @property
    def lean(self) -> bool:
        """Whether products may be used in this pass, which is one of decoding."""
        decoding = self._products is not None and torch.is_inference_mode_enabled()
        return decoding and not torch.is_autocast_enabled(self.embed_tokens.weight.device.type)

    def linear(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """(…, I) -> (…, O)."""
        return self._products.linear(layer, x) if self.lean else layer(x)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(tokens)

    # --- files and the hub, as libraries around it have them ---

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None, embedding: bool = True) -> None:
        """Write config.json, model.safetensors, README.md (the model card) and a draft vocabulary into `folder`.

        A head without a card gets one that tells what its own tensors show.

        Args:
            dtype: of the tensors in the file; the head's when None.
            embedding: False leaves the embedding table out: the head then loads with its target, which has it.
        """
        checkpoints.save_draft(self, folder, dtype, embedding)
        if self.card is None:
            Path(folder, CARD).write_text(model_card(self), encoding="utf-8")

    @classmethod
    def from_pretrained(cls: type[Head], path: str, method: str | None = None, **options) -> Head:
        """Load a draft head with its model card; `options` are those of `load_draft`.

        Args:
            path: a folder or a hub id.
            method: checked against the weights when given.

        Raises:
            ValueError: a file is missing or wrong, or the head is not one of this class.
        """
        head = load_draft(path, method, **options)
        if not isinstance(head, cls):
            raise ValueError(f"{path}: these are {head.method} weights, found where a {cls.__name__} is expected")
        card = find_file(path, CARD, **hub_options(options))
        head.card = card.read_text(encoding="utf-8") if card else None
        return head

    def push_to_hub(self, repo_id: str, dtype: torch.dtype | None = None, embedding: bool = True, **options) -> str:
        """Upload the files of `save_pretrained` to a model repository, which is made where it is missing.

        Args:
            repo_id: "owner/name".
            dtype, embedding: see `save_pretrained`.
            options: see `vispec.model.drafts.hub.upload_head`.

        Returns:
            The address of the commit.
        """
        return upload_head(partial(self.save_pretrained, dtype=dtype, embedding=embedding), repo_id, **options)


def build_head(config: DraftConfig, method: str, **sizes: int | bool) -> BaseHead:
    """A head without memory for its weights (meta device), to be filled by `load_state_dict(assign=True)`.

    Args:
        sizes: num_q of ViSpec, heads of Medusa, input_norm of MSD; their defaults where they are not given.
    """
    if method not in BaseHead.kinds:
        raise ValueError(f"method {method!r} is not one of {', '.join(HEADS)}")
    with torch.device("meta"):
        return BaseHead.kinds[method](config, **sizes)


def load_draft(
    path: str,
    method: str | None = None,
    num_q: int | None = None,
    dtype: torch.dtype | None = None,
    embedding: torch.Tensor | None = None,
    draft_vocab: bool = True,
    **hub,
) -> BaseHead:
    """Load a draft head from a folder or a hub id.

    Args:
        path: folder with config.json and model.safetensors or pytorch_model.bin, or the hub id of such a repository.
        method: one of HEADS; checked against the weights when given. MSD's have EAGLE-2's names, so it has to be given
            for those that say nowhere what they are.
        num_q: queries of the vision adaptor; checked against the weights when given.
        dtype: of the loaded head; that of the file when None.
        embedding: the target's (V, H) embedding table, used where the file has none.
        draft_vocab: False leaves a draft vocabulary beside the weights alone.
        hub: subfolder, of a folder too; for a hub id revision, token, cache_dir, local_files_only, as huggingface_hub
            takes them.

    Raises:
        TypeError: `hub` holds something else.
        ValueError: a file or tensor is missing, surplus or has the wrong shape, or does not fit what was asked.
    """
    config, weights_file = checkpoints.find_draft(path, **hub)
    weights, config = checkpoints.read_weights(weights_file, config)
    found = checkpoints.identify(weights, config, weights_file, method, num_q)
    try:
        head = build_head(config, **found)
    except (TypeError, ValueError) as error:  # a config that this kind of head cannot have
        raise ValueError(f"{weights_file.with_name(CONFIG)}: {error}") from None
    checkpoints.fill(head, weights, weights_file, dtype, embedding if head.target_size == config.hidden_size else None)
    head.embed_tokens.weight.requires_grad_(False)
    vocabulary_file = find_file(path, VOCABULARY_FILE, **hub) if draft_vocab else None
    if vocabulary_file is not None:
        if not head.reads_target_head:
            raise ValueError(
                f"{vocabulary_file}: a {head.method} head has an output head of its own, so no draft vocabulary holds "
                "for it; remove that file, or load with draft_vocab=False"
            )
        head.draft_vocab = DraftVocabulary.read(vocabulary_file, config.vocab_size)
    return head.eval()
