"""The frozen VLM: read a prompt, verify a tree.

The prompt goes through the whole model, as users call it. What decoding needs besides the logits (merged embeddings,
last hidden states) is seen by hooks on the text decoder, so no line here knows how a family turns pixels into rows.
After the prompt only the text decoder and the output head are called, with our cache, mask and positions.
"""

import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from vispec.model.cache import TreeCache
from vispec.model.families import embedded_ids, image_spans, tables_behind_text, token_kinds
from vispec.model.graphs import obstacle
from vispec.model.inputs import forward_parameters, refuse_missing
from vispec.model.parts import (
    eos_token_ids,
    execution_device,
    find_decoder,
    find_rope_owner,
    max_positions,
    position_axes,
    use_maskable_attention,
)
from vispec.model.prefixes import PrefixCache
from vispec.model.products import Products, has_hooks
from vispec.model.products import obstacle as product_obstacle
from vispec.model.prompt import Prompt
from vispec.model.recurrent import RecurrentLayers
from vispec.model.refusals import naming_config, refuse_decoder, refuse_layers, refuse_not_finite
from vispec.model.rescaling import find_rescaling
from vispec.model.shape import TreeShape
from vispec.model.text_decoder import LeanDecoder, StockDecoder, UnknownLayer
from vispec.model.watching import Watched, watching, watching_prompt
from vispec.model.windows import Windows

logger = logging.getLogger("vispec")

_PREFILL_LOCKS: WeakKeyDictionary[PreTrainedModel, threading.Lock] = WeakKeyDictionary()
FAST = "VISPEC_FAST"
"""Environment variable; 0 lets all targets and drafts decode by their own layers alone."""


class States(NamedTuple):
    """What the text decoder makes of n new tokens."""

    hidden: torch.Tensor
    """(B, n, H) after the final norm: what the output head reads."""
    features: torch.Tensor
    """(B, n, F) what a draft reads, see `Prompt`."""


class Target:
    """A loaded VLM of transformers, used as it is.

    Args:
        model: the VLM.
        fast: False decodes by the stock layers alone, see `vispec.model.text_decoder`; so does VISPEC_FAST=0.

    Raises:
        ValueError: the model has a part that tree decoding cannot handle; the message names it.
    """

    def __init__(self, model: PreTrainedModel, fast: bool = True):
        self.model = model.eval()
        self.config = model.config
        self.decoder = find_decoder(model)
        self.lm_head = model.get_output_embeddings()
        self.embed_tokens = model.get_input_embeddings()
        refuse_layers(model, self.decoder)
        refuse_decoder(model, self.decoder, self.lm_head)
        # of the layers the first and last, so that large targets are not read twice
        unread = {id(weight) for layer in self.decoder.layers[1:-1] for weight in layer.parameters()}
        named = ((name, weight) for name, weight in model.named_parameters() if id(weight) not in unread)
        refuse_not_finite(f"the target {type(model).__name__}", named)
        self.text_config = model.config.get_text_config()
        self.max_positions = max_positions(self.text_config)
        self.layer_devices = [execution_device(layer) for layer in self.decoder.layers]
        self.eos_token_ids = eos_token_ids(model)
        self._input_device = execution_device(self.embed_tokens)
        self._rope_owner = find_rope_owner(model)
        # hooks sit on modules that all threads share, so a model reads only one prompt at a time
        self._prefill_lock = _PREFILL_LOCKS.setdefault(model, threading.Lock())
        use_maskable_attention(model)
        self._windows = Windows(model, self.decoder)
        self._recurrent = RecurrentLayers(self.decoder, self.layer_devices)
        self._embedded = embedded_ids(model.config, len(self.embed_tokens.weight))
        if self._embedded is not None:
            self._embedded = self._embedded.to(self._input_device)
        self.rescale = find_rescaling(model, self.lm_head)
        """What follows the output head, (…, V) -> (…, V); None for nothing."""
        self.prefixes: PrefixCache | None = None
        """Set it to let prompts be read on from what they share with earlier ones, see `vispec.model.reading`. What it
        holds is of these weights."""
        self.fast = fast and os.environ.get(FAST, "1") != "0"
        axes = position_axes(self.decoder, self.text_config)
        self._stock = StockDecoder(self.decoder, axes, self._prefill_lock, tables_behind_text(model))
        self._products: Products | None = None
        self._text: StockDecoder | LeanDecoder = self._stock
        if self.fast:
            with self._prefill_lock:
                self._make_lean()

    def _make_lean(self) -> None:
        """Decode by the lean pass where that is possible; says once why it is not."""
        products = Products()
        try:
            self._check_lean()
            self._text = LeanDecoder(self._stock, products, self.max_positions)
            self._products = products
            products.of(self.lm_head)
            products.expect([1])
        except UnknownLayer as error:
            logger.warning("decoding goes by transformers' own layers, not by the lean pass: %s", error)

    def _check_lean(self) -> None:
        """Raises UnknownLayer where something around the layers asks for the stock decoder."""
        reason = product_obstacle([self.lm_head])
        if len(set(self.devices)) > 1:
            reason = "the target is spread over devices"
        elif has_hooks(self.decoder):
            reason = "the text decoder has hooks"
        elif self._windows:
            reason = "some layers see a part of the text only"
        elif self._recurrent:
            reason = "some layers keep a state of the text"
        elif self._stock.reads_ids:
            reason = "its layers have tables of tokens"
        if reason is not None:
            raise UnknownLayer(reason)

    @property
    def lean(self) -> bool:
        """Whether decoding goes by the lean pass."""
        return self._text is not self._stock

    @property
    def recurrent(self) -> bool:
        """Whether some layers keep a state of the text."""
        return bool(self._recurrent)

    def fit(self, shape: TreeShape) -> TreeShape:
        """The tree of this depth that the target can follow: a chain, where some layers keep a state of the text."""
        return shape.chain if self.recurrent else shape

    def expect(self, rows: Iterable[int]) -> None:
        """Choose kernels for passes over so many tokens, those of all rows of a batch together."""
        if self._products is not None:
            self._products.expect(rows)

    def expect_logits(self, rows: Iterable[int]) -> None:
        """Choose kernels of the output head alone, for a draft that asks for the logits of so many estimates."""
        if self._products is not None:
            self._products.expect(rows, self.lm_head)

    @property
    def kernels(self) -> dict[str, str]:
        """What the lean pass computes by which kernel: products by dtype, size and rows, as `Products` chose them.

        What is not named is PyTorch's own.
        """
        if self._products is None:
            return {}
        fused = self._text.fused
        told = {} if fused is None else {"small operations": "fused" if fused else "unfused"}
        return self._products.kernels | told

    def refresh(self) -> None:
        """With every prompt: weights may have been loaded, trained, moved or replaced since the last one."""
        with self._prefill_lock:
            self._refresh()

    def _refresh(self) -> None:
        self.lm_head, self.embed_tokens = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if self._text is self._stock:
            return
        try:
            self._check_lean()
            self._text.refresh()
        except UnknownLayer as error:
            self._text, self._products = self._stock, None
            logger.warning("decoding goes on by transformers' own layers: %s", error)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def devices(self) -> list[torch.device]:
        """Where embeddings, layers and output head compute."""
        return [self._input_device, *self.layer_devices, execution_device(self.lm_head)]

    @property
    def device(self) -> torch.device:
        """Where features and logits come out, and where the draft head lives."""
        return self.layer_devices[-1]

    @cached_property
    def can_capture(self) -> bool:
        """Whether steps of decoding are captured in CUDA graphs; says once why they are not."""
        reason = obstacle(self.model, self.decoder, self.devices)
        if self._recurrent and reason is None:
            reason = "some layers keep a state of the text"
        if reason is not None:
            level = logging.INFO if self.device.type == "cpu" else logging.WARNING
            logger.log(level, "decoding runs without CUDA graphs: %s", reason)
        return reason is None

    def new_cache(self, batch_size: int, capacity: int) -> TreeCache:
        return self._recurrent.new_cache(batch_size, capacity)

    @torch.no_grad()
    def prefill(self, cache: TreeCache, input_ids: torch.Tensor, inputs: Mapping, layers: Sequence[int] = ()) -> Prompt:
        """Run the whole VLM over a prompt; its keys and values are committed to `cache`.

        Args:
            cache: empty.
            input_ids: (B, L).
            inputs: what else the family's processor returned, attention_mask included.
            layers: see `forward`.
        """
        batch, length = input_ids.shape
        refuse_missing(self.model, inputs)
        with naming_config(self.model):
            spans = image_spans(self.model, input_ids, inputs)
        inputs = self.placed(inputs)
        if self._rope_owner is not None:  # Qwen's Omni looks for images only where there is a mask
            inputs.setdefault("attention_mask", torch.ones_like(input_ids, device=self._input_device))
        wants_kinds = self._rope_owner is not None and "mm_token_type_ids" in forward_parameters(self.model)
        if wants_kinds and "mm_token_type_ids" not in inputs:  # others answer without them, and otherwise with them
            inputs["mm_token_type_ids"] = self._place(token_kinds(self.config, input_ids))
        cache.reserve(length)
        with self._prefill_lock:
            self._refresh()
            if self._rope_owner is not None:
                self._rope_owner.rope_deltas = None
            watched: Watched = dict.fromkeys(layers)
            around = watching_prompt(self.decoder, self.embed_tokens, self.lm_head)
            with naming_config(self.model), around as seen, watching(self.decoder.layers, watched):
                logits = self.model(
                    input_ids=input_ids.to(self._input_device), past_key_values=cache, use_cache=True, **inputs
                ).logits
            remembered = None
            if self._rope_owner is not None:
                remembered, self._rope_owner.rope_deltas = self._rope_owner.rope_deltas, None
        offset = self._offset(seen["positions"], remembered, batch, length)
        cache.commit(torch.full_like(cache.lengths, length))
        hidden, positions = seen["hidden"].to(self.device), seen["positions"]
        return Prompt(
            input_ids.to(self.device),
            inputs,
            hidden,
            seen["embeds"].to(self.device),
            logits[:, -1].to(self.device),
            spans,
            offset if offset is None else offset.to(self.device),
            self._features(hidden, watched),
            positions.to(self.device) if positions is not None and positions.dim() == 3 else None,
        )

    def _features(self, hidden: torch.Tensor, watched: Watched) -> torch.Tensor:
        """(B, L, F) what a draft reads of a pass: features after the final norm, or what went into some layers."""
        if not watched:
            return hidden
        if any(state.shape != hidden.shape for state in watched.values()):
            shapes = ", ".join(sorted({str(tuple(state.shape)) for state in watched.values()}))
            raise ValueError(
                f"{type(self.decoder).__name__}: its layers read {shapes} where features are {tuple(hidden.shape)}: no "
                "head for their inputs is known"
            )
        return torch.cat([state.to(self.device) for state in watched.values()], dim=-1)

    def _offset(
        self, positions: torch.Tensor | None, remembered: torch.Tensor | None, batch: int, length: int
    ) -> torch.Tensor | None:
        """(B, 1) what is added to positions after a prompt: they count on from its last one; None for nothing.

        Args:
            positions: of the prompt, as the decoder was given them: (B, L), or M-RoPE's (axes, B, L).
            remembered: what M-RoPE's owner has noted, for a decoder that was given none.
        """
        if positions is None:
            return remembered if remembered is None else remembered.reshape(batch, 1)
        offset = positions[..., -1:] + 1 - length
        if positions.dim() == 3 and self._rope_owner is not None:
            if (offset != offset[0]).any():
                raise ValueError("the prompt ends within an image or a video: put text behind it")
            return offset[0]
        numbers = torch.arange(length, device=positions.device)
        if positions.dim() != 2 or (positions != numbers + offset).any():
            raise ValueError(
                f"{type(self.model).__name__} does not count the positions of a prompt one by one; what follows the "
                "prompt would stand elsewhere than in its own generate()"
            )
        return offset.expand(batch, 1)

    def forward(
        self,
        cache: TreeCache,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        ancestors: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> States:
        """Run the text decoder over n new tokens a row; their keys stay provisional in `cache`.

        Args:
            tokens: (B, n).
            positions: (B, n), rope deltas added.
            ancestors: (B, m, m) bool, which of the provisional tokens each of them sees: those of passes before, which
                are still provisional, then the n new ones. None where nothing is to be hidden: n = m = 1 and a single
                row whose length the host knows exactly, so that `cache.used` is that length.
            layers: numbers of those whose inputs are to be the features, ascending; none: what the output head reads.
        """
        n = tokens.shape[1]
        if ancestors is None and self._windows:
            ancestors = torch.ones_like(tokens, dtype=torch.bool)[:, None]
        cache.reserve(n, offset=0 if ancestors is None else ancestors.shape[2] - n)
        mask = None if ancestors is None else cache.mask(ancestors[:, -n:], self.dtype)
        tokens = self._embedded_as(tokens)
        embeds = tokens if self._stock.reads_ids else self.embed_tokens(tokens)
        heard = self._recurrent.watch(cache) if self._recurrent and n > 1 else nullcontext()
        watched: Watched = dict.fromkeys(layers)
        with heard, self._windows.set(cache, ancestors, mask) if self._windows else nullcontext():
            hidden = self._text(cache, embeds, self._place(positions), self._place(mask), watched).to(self.device)
        return States(hidden, self._features(hidden, watched))

    def last_queries(self, state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotated and scaled queries of the last layer (B, query heads, D); the lean pass alone has them.

        Args:
            state: (B, H) what went into that layer at one token of each row.
            positions: (B, 1) of these tokens.
        """
        return self._text.last_queries(state, positions)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, H) features -> (…, V); a head that is tied to the embeddings may sit on another device."""
        if self._products is None:
            logits = self.lm_head(hidden).to(self.device)
        else:
            logits = self._products.linear(self.lm_head, hidden)
        return logits if self.rescale is None else self.rescale(logits)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, n) tokens of text -> (B, n, H), what goes into the text decoder."""
        return self.embed_tokens(self._embedded_as(tokens)).to(self.device)

    def _embedded_as(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self._place(tokens)
        return tokens if self._embedded is None else self._embedded[tokens]

    def placed(self, inputs: Mapping) -> dict:
        """What a processor returned, without what is absent, where the target reads it."""
        return {name: self._place(value) for name, value in inputs.items() if value is not None}

    def _place(self, value):
        return value.to(self._input_device) if isinstance(value, torch.Tensor) else value
