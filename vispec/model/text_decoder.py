"""The lean pass: a target's text decoder run by few operations, from the stock modules' own weights.

Layers are recognised by their parts, not by name, and only where every part and attribute is known. When a target is
wrapped, the pass is compared with the stock decoder; where they do not agree, the stock decoder decodes. Draft heads
run their layers by the same `LeanLayers`.

B rows, n tokens of a pass, R = B n, H hidden size, T = query + key + value heads, D head size, m visible tokens.
"""

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from vispec.model.cache import TreeCache
from vispec.model.decoder_layer import (
    CpuNorm,
    LayerParts,
    Norm,
    after_attention,
    attend_cached,
    before_attention,
    grouped,
    heads_of,
    norm_of,
    parts_of,
    widened,
)
from vispec.model.products import Product, Products, has_hooks, obstacle
from vispec.model.watching import Watched, watching

logger = logging.getLogger("vispec")

AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 3e-2, torch.float64: 1e-4}
"""Largest norm of the difference to what stock modules make, relative to the norm of that."""
CHECKED_TOKENS = 6
"""Tokens of each of the two passes that are compared, at the first and at the last positions."""
COMPILED_ON = "cuda"
"""Device on which the layer's small operations are fused by torch.compile."""
BACKEND = "inductor"

PARTS = {"self_attn", "mlp", "post_attention_layernorm", "input_layernorm", "hidden_norm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ATTENTION_ATTRIBUTES = {
    "config", "layer_idx", "hidden_size", "num_heads", "num_key_value_heads", "num_key_value_groups", "head_dim",
    "scaling", "attention_dropout", "is_causal", "rope_scaling", "rope_theta", "rope_parameters",
    "max_position_embeddings", "layer_type", "sliding_window", "attention_type", "rotary_fn",
}  # fmt: skip
"""Of attention modules, beside those of every nn.Module; what they say is in their weights, or checked below."""


class UnknownLayer(ValueError):
    """A decoder layer is not of the kind that the lean pass knows; the message says why."""


def check_layer(layer: nn.Module) -> None:
    """Raises UnknownLayer where a layer has a part or an attribute that the lean pass would pass over."""
    attention, mlp = (getattr(layer, name, None) for name in ("self_attn", "mlp"))
    for module, known, needed in (
        (layer, PARTS, {"self_attn", "mlp", "post_attention_layernorm"}),
        (attention, ATTENTION_PARTS, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (mlp, MLP_PARTS, {"gate_proj", "up_proj", "down_proj"}),
    ):
        found = {name for name, child in module.named_children()} if isinstance(module, nn.Module) else set()
        if not needed <= found <= known:
            different = ", ".join(sorted(found ^ (found & known | needed))) or "no parts"
            raise UnknownLayer(f"{type(module).__name__} is built otherwise ({different})")
    check_hooks(layer)
    names = {name for name in vars(attention) if not name.startswith("_")} - set(vars(nn.Module()))
    unknown = sorted(names - ATTENTION_ATTRIBUTES)
    if unknown:
        raise UnknownLayer(f"{type(attention).__name__} has {', '.join(unknown)}")
    if getattr(attention, "sliding_window", None) is not None:
        raise UnknownLayer(f"{type(attention).__name__} has a sliding window")
    for layers in (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    ):
        reason = obstacle(layers)
        if reason:
            raise UnknownLayer(reason)
    norms = [
        getattr(owner, name, None)
        for owner in (layer, attention)
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm", "q_norm", "k_norm")
    ]
    for norm in filter(None, norms):
        check_norm(norm)


def check_norm(norm: nn.Module) -> None:
    check_hooks(norm)
    weight = norm_of(norm).weight if [*norm._parameters] == ["weight"] else None
    if weight is None or weight.dim() != 1 or weight.is_inference() or not isinstance(norm_of(norm).eps, float):
        raise UnknownLayer(f"{type(norm).__name__} is no RMSNorm")


def check_hooks(owner: nn.Module) -> None:
    for module in owner.modules():
        if has_hooks(module):
            raise UnknownLayer(f"{type(module).__name__} has hooks")


class LeanLayers:
    """Decoder layers as the lean pass runs them.

    Args:
        layers: alike but for their weights.
        products: where those of the layers are made.

    Raises:
        UnknownLayer: they are of another kind; nothing has been changed.
    """

    def __init__(self, layers: nn.ModuleList, products: Products):
        self._modules, self._products = layers, products
        for layer in layers:
            check_layer(layer)
        self.heads = heads_of(layers[0].self_attn)
        self._before, self._after = before_attention, after_attention
        if layers[0].self_attn.q_proj.weight.device.type == COMPILED_ON:
            self._before, self._after = Fused(before_attention), Fused(after_attention)
        self._build()

    @property
    def fused(self) -> bool | None:
        """Whether torch.compile fuses their small operations; None where it is not asked to, as on a CPU."""
        parts = self._before, self._after
        return all(part.works for part in parts) if isinstance(parts[0], Fused) else None

    def _build(self) -> None:
        self._structure = self._found_structure()
        self._parts = [parts_of(layer, self._products.of) for layer in self._modules]
        if self._before is not before_attention:
            # tensors, not objects, so that one compiled function serves all layers
            self._parts = [LayerParts(*map(_tensors, parts)) for parts in self._parts]
        self._parts = [LayerParts(*map(_lean_norm, parts)) for parts in self._parts]

    def _found_structure(self) -> list[int]:
        modules = [module for layer in self._modules for module in layer.modules()]
        hooks = sum(map(has_hooks, modules))
        parameters = [weight for module in modules for weight in module._parameters.values() if weight is not None]
        return [hooks, *map(id, modules), *map(id, parameters)]

    def refresh(self) -> None:
        """Follow the modules: they may have been trained, moved or replaced since the last prompt.

        Raises:
            UnknownLayer: the layers are no longer of a kind that is known.
        """
        if self._found_structure() != self._structure:
            for layer in self._modules:
                check_layer(layer)
            self._products.forget()
        self._products.refresh()
        self._build()  # always: what is made of norms costs little, and a change of their data leaves no trace

    def last_queries(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotated and scaled queries of the last layer, of rows that come to it as x (R, H): (R, query heads, D)."""
        qkv = self._before(x, *angles, self._parts[-1], self.heads)
        return qkv[:, : self.heads.queries] * self.heads.scale

    def __call__(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        attend: Callable[..., torch.Tensor],
        watched: Watched,
    ) -> torch.Tensor:
        """All layers over rows x (R, H).

        Args:
            angles: see `widened`.
            attend: (layer number, (R, T, D)) -> (R, query heads · D).
        """
        cos, sin = angles
        for number, parts in enumerate(self._parts):
            if number in watched:
                watched[number] = x
            attended = attend(number, self._before(x, cos, sin, parts, self.heads))
            x = self._after(x, attended, parts)
        return x


def _tensors(part):
    return (part.weight, part.bias) if isinstance(part, Product) else part


def _lean_norm(part):
    return CpuNorm.of(part) if isinstance(part, Norm) and part.weight.is_cpu else part


class Fused:
    """A function by torch.compile; where that fails it runs as it is, and one line says so."""

    def __init__(self, stock: Callable):
        self._stock, self._compiled = stock, torch.compile(stock, dynamic=True, backend=BACKEND)

    @property
    def works(self) -> bool:
        return self._compiled is not None

    def __call__(self, *args):
        if self._compiled is None:
            return self._stock(*args)
        try:
            return self._compiled(*args)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no Triton, …: all have classes of their own
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # the capture failed, not the compiler, which has done its work before
            self._compiled = None
            reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
            logger.warning("decoder layers run unfused: torch.compile failed (%s)", reason)
            return self._stock(*args)


# --- a target's text decoder ---


class StockDecoder:
    """A target's text decoder, as transformers runs it.

    Args:
        axes: of the positions that it takes, more than one for M-RoPE.
        lock: to be held by whoever sets hooks.
        tables: see `vispec.model.families.tables_behind_text`.
    """

    def __init__(self, decoder: nn.Module, axes: int, lock: threading.Lock, tables: Sequence[nn.Module]):
        self.decoder, self._axes, self._lock, self._tables = decoder, axes, lock, tables
        takes = inspect.signature(type(decoder).forward).parameters
        # decoders with windows ask the device for it, to cut a mask by it that is ours; no longer in transformers 5
        self._further = {"last_cache_position": 0} if "last_cache_position" in takes else {}
        self.reads_ids = "per_layer_inputs" in takes
        """Whether it is called with tokens, since layers look them up in tables of their own (Gemma 3n and 4)."""

    def places(self, positions: torch.Tensor) -> torch.Tensor:
        """(B, n) -> (axes, B, n); on text all axes of M-RoPE say the same."""
        return positions if self._axes == 1 else positions[None].expand(self._axes, -1, -1)

    def __call__(
        self,
        cache: TreeCache,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        watched: Watched,
    ) -> torch.Tensor:
        """Features (B, n, H) of new tokens, whose keys stay provisional.

        Args:
            embeds: (B, n, H); where it `reads_ids` the tokens (B, n).
            positions: (B, n).
            mask: (B, 1, n, m), added to the scores; None where nothing is hidden.
            watched: gets (B, n, H) each.
        """
        with self._lock if watched else nullcontext(), watching(self.decoder.layers, watched):
            return self.decoder(
                **self._given(embeds),
                attention_mask=mask,
                position_ids=self.places(positions),
                past_key_values=cache,
                use_cache=True,
                **self._further,
            ).last_hidden_state

    def _given(self, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the decoder is told of the new tokens, see `__call__`."""
        if not self.reads_ids:
            return {"inputs_embeds": embeds}
        if not self._tables:
            return {"input_ids": embeds}
        ids, embeds = embeds, self.decoder.embed_tokens(embeds)
        for table in self._tables:
            first, end = table.vocab_offset, table.vocab_offset + table.vocab_size
            own = table(input_ids=ids.clamp(first, end - 1)).to(embeds.dtype)
            embeds = torch.where((ids >= first)[..., None], own, embeds)
        return {"inputs_embeds": embeds, "per_layer_inputs": self.decoder.get_per_layer_inputs(ids)}


class LeanDecoder:
    """The same by the lean pass.

    Args:
        stock: what it stands in for.
        products: where those of the layers are made.
        max_positions: of the target.

    Raises:
        UnknownLayer: the decoder is of another kind, or does not agree with the stock one.
    """

    def __init__(self, stock: StockDecoder, products: Products, max_positions: int):
        self._stock, self._decoder = stock, stock.decoder
        if not all(isinstance(getattr(self._decoder, name, None), nn.Module) for name in ("norm", "rotary_emb")):
            raise UnknownLayer(f"{type(self._decoder).__name__} has no norm or no rotary_emb")
        check_norm(self._decoder.norm)
        try:
            self._layers = LeanLayers(self._decoder.layers, products)
            self._norm = _lean_norm(norm_of(self._decoder.norm))
            _compare(self, stock, max_positions)
        except (UnknownLayer, torch.OutOfMemoryError):
            raise
        except Exception as error:  # parts of known names that compute otherwise, with any sizes
            reason = " ".join(str(error).split())
            raise UnknownLayer(f"the lean pass of {type(self._decoder).__name__} fails ({reason})") from error

    @property
    def fused(self) -> bool | None:
        """See `LeanLayers.fused`."""
        return self._layers.fused

    def refresh(self) -> None:
        check_norm(self._decoder.norm)
        self._layers.refresh()
        self._norm = _lean_norm(norm_of(self._decoder.norm))

    def __call__(self, cache, embeds, positions, mask, watched):
        if torch.is_autocast_enabled(embeds.device.type):
            return self._stock(cache, embeds, positions, mask, watched)
        heads = self._layers.heads
        attend = partial(attend_cached, cache, heads, grouped(mask, heads))
        angles = self._angles(embeds, positions)
        out = self._layers(embeds.reshape(-1, embeds.shape[-1]), angles, attend, watched)
        for number, state in watched.items():
            watched[number] = state.view(embeds.shape)
        return self._norm(out).view(embeds.shape)

    def last_queries(self, state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `Target.last_queries`."""
        return self._layers.last_queries(state, self._angles(state[:, None], positions))

    def _angles(self, embeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `widened`; embeds (B, n, H), positions (B, n)."""
        found = self._decoder.rotary_emb(embeds, self._stock.places(positions))
        flat = [(angle[0] if angle.dim() == 4 else angle).reshape(-1, angle.shape[-1]) for angle in found]
        return widened(*flat, self._layers.heads)


@torch.inference_mode()  # as decoding is, or what is compiled here would serve this comparison alone
def _compare(lean: LeanDecoder, stock: StockDecoder, max_positions: int) -> None:
    """Raises UnknownLayer where the two decoders differ on random tokens, at the first or at the last positions.

    Some decoders scale queries or change their angles far from the beginning only.
    """
    table = stock.decoder.embed_tokens.weight
    n = min(CHECKED_TOKENS, max(max_positions // 2, 1))
    ids = torch.randint(len(table), (1, 2 * n), generator=torch.Generator().manual_seed(0)).to(table.device)
    places = torch.arange(n, device=table.device)[None]
    earlier = places[..., None] >= places[:, None]
    for start in (0, max_positions - 2 * n):
        caches = [TreeCache([table.device] * len(stock.decoder.layers), 1, 2 * n) for _ in range(2)]
        for part in range(2):
            embeds = stock.decoder.embed_tokens(ids[:, part * n : (part + 1) * n])
            outs = []
            for decoder, cache in zip((lean, stock), caches, strict=True):
                cache.reserve(n)
                mask = cache.mask(earlier, table.dtype)
                outs.append(decoder(cache, embeds, places + (start + part * n), mask, {}).float())
                cache.commit(torch.full_like(cache.lengths, n))
            difference = ((outs[0] - outs[1]).norm() / outs[1].norm()).item()
            if not difference <= AGREEMENT[table.dtype]:
                raise UnknownLayer(
                    f"the lean pass of {type(stock.decoder).__name__} differs from it by {difference:.1e} at position "
                    f"{start + part * n}"
                )
