"""The EAGLE-3 draft head (Li et al., arXiv 2503.01840).

A feature is what goes into a low, a middle and a high layer of the target, side by side; fc makes one of their three.
The decoder layer reads the embedding of token i+1 and the feature of token i, each after a norm of its own, and adds to
the feature: its output stands in for the next feature as it is, without fc. An output head of the head's own reads it
after a norm and knows the most frequent tokens only.

What is published: code, weights and training of text models (SafeAILab/EAGLE@cb7e0841, whose recordings this repeats),
and weights for some VLMs by SpecForge and by speculators, whose formats are read too. Not settled is what stands for an
image: heads see its rows as ordinary ones, and their embeddings are (ours) the target's merged ones, shifted by one as
text's are. A head with a table of another width than the target's reads the image's placeholders from its own (ours).

Shapes: B rows, L tokens, R pairs of one pass, n layers of the target, H hidden size, V_d tokens of the head.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from vispec.model.arguments import of_kind, whole
from vispec.model.decoder_layer import widened
from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.formats import AUX_LAYERS, token_ids
from vispec.model.drafts.layer import DraftLayer, rotary_frequencies
from vispec.model.drafts.pair_head import DraftMemory, PairHead
from vispec.model.pairs import PairLayout
from vispec.model.prompt import Prompt
from vispec.model.target import Target
from vispec.model.tree import DraftOutput

DRAFT_VOCABULARY = 32000
"""Tokens of a new head whose config does not say."""
FEWEST_LAYERS = 7
"""Of a target, below which the layers that heads read by default are not three."""


class Eagle3Layer(DraftLayer):
    """The weights of a decoder layer over [embedding; feature]."""

    def __init__(self, config: DraftConfig):
        super().__init__(config, input_norm=True, width=2 * config.hidden_size)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_before_residual = bool(config.extra.get("norm_before_residual"))


class Eagle3Head(PairHead):
    """The EAGLE-3 head. Parameter names are those of SafeAILab's and SpecForge's checkpoints.

    Raises:
        ValueError: the config asks for what is not known here.
    """

    method = "eagle3"
    reads_target_head = False

    def __init__(self, config: DraftConfig):
        super().__init__(config)
        self._listed = listed_layers(config)
        rope = config.rope_scaling or {}
        if rope.get("mrope_interleaved") or (rope and 2 * sum(config.mrope_section) != config.head_dim):
            raise ValueError(f"rope_scaling {rope} is not known for EAGLE-3 heads of head_dim {config.head_dim}")
        size, eps = config.hidden_size, config.rms_norm_eps
        layers, width = 3 if self._listed is None else len(self._listed), self.target_size
        self.fc_norm = None
        if config.extra.get("fc_norm"):
            self.fc_norm = nn.ModuleList([nn.RMSNorm(width, eps=eps) for _ in range(layers)])
        self.fc = nn.Linear(layers * width, size, bias=config.bias)
        self.midlayer = Eagle3Layer(config)
        self.norm = nn.RMSNorm(size, eps=eps)
        tokens = whole("draft_vocab_size", config.extra.get("draft_vocab_size") or config.vocab_size, 1)
        if tokens > config.vocab_size:
            raise ValueError(f"draft_vocab_size {tokens}, but the target has {config.vocab_size} tokens")
        self.lm_head = nn.Linear(size, tokens, bias=False)
        self.register_buffer("d2t", torch.zeros(tokens, dtype=torch.long))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @classmethod
    def new_config(cls, config: DraftConfig) -> DraftConfig:
        """As published, without biases, and in SpecForge's words.

        Raises:
            ValueError: the target is to be of another width.
        """
        if config.extra.get("target_hidden_size") not in (None, config.hidden_size):
            raise ValueError("target_hidden_size: heads of another width than the target's are not trained here")
        size = config.extra.get("draft_vocab_size") or min(DRAFT_VOCABULARY, config.vocab_size)
        extra = {**config.extra, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": size}
        return replace(config, bias=False, qkv_bias=False, extra=extra)

    @property
    def layers(self) -> list[nn.Module]:
        return [self.midlayer]

    @property
    def target_size(self) -> int:
        return whole("target_hidden_size", self.config.extra.get("target_hidden_size") or self.config.hidden_size, 1)

    def aux_layers(self, target: Target) -> tuple[int, ...]:
        return self.layers_of(len(target.decoder.layers))

    def layers_of(self, layers: int) -> tuple[int, ...]:
        """Those that it reads of a target of so many layers, see `aux_layers`."""
        return aux_layers(layers, self._listed)

    # --- what the layer reads ---

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(…, 3 H) what went into the target's layers -> (…, H)."""
        if self.fc_norm is not None:
            parts = features.split(self.target_size, dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.linear(self.fc, features)

    def fuse(self, next_embeds, hidden, global_feature=None):
        """(B, R, 2 H): the embedding of token i+1 first."""
        return torch.cat([next_embeds, hidden], dim=-1)

    def prompt_embeds(self, prompt: Prompt) -> torch.Tensor:
        if prompt.embeds.shape[2] == self.config.hidden_size:
            return prompt.embeds
        return self.embed(prompt.input_ids)

    # --- positions ---

    def prompt_angles(self, prompt: Prompt, layout: PairLayout, dtype: torch.dtype):
        """With M-RoPE pair i stands where the target has token i; behind the prompt all axes say the same."""
        if self.config.mrope_section is None or prompt.positions is None:
            return super().prompt_angles(prompt, layout, dtype)
        sections = torch.tensor(self.config.mrope_section, device=layout.positions.device)
        axis = torch.arange(len(sections), device=sections.device).repeat_interleave(sections).repeat(2)
        places = prompt.positions[axis, :, : layout.positions.shape[1]].flatten(1).t()  # (B R, head_dim)
        turned = places.float() * rotary_frequencies(self.config.head_dim, self.config.rope_theta, places.device)
        return widened(turned.cos().to(dtype), turned.sin().to(dtype), self.heads)

    def read(self, memory: DraftMemory, prompt: Prompt) -> int:
        kept = super().read(memory, prompt)
        if self.config.mrope_section is not None and prompt.rope_delta is not None:
            memory.position += prompt.rope_delta[:, 0]
        return kept

    # --- tokens ---

    @property
    def proposed(self) -> int:
        return self.lm_head.out_features

    @property
    def token_ids(self) -> torch.Tensor:
        """(V_d,) the target's token of each of its own."""
        return token_ids(self.d2t)

    def output(self, target: Target) -> DraftOutput:
        return DraftOutput(self.logits, self.expect_logits, self.token_ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, H) estimates -> (…, V_d)."""
        normed = self.norm(hidden) if self.config.extra.get("norm_output", True) else hidden
        return self.linear(self.lm_head, normed)

    def expect_logits(self, rows: Iterable[int]) -> None:
        if self._products is not None:
            self._products.expect(rows, self.lm_head)

    def beside_layers(self) -> list[nn.Module]:
        return [self.fc, self.lm_head]


def listed_layers(config: DraftConfig) -> tuple[int, ...] | None:
    """The layers whose inputs a head's config says that it reads, ascending; None where it says nothing.

    Raises:
        TypeError, ValueError: it says something else than numbers.
    """
    told = config.extra.get("eagle_config")
    of_kind("eagle_config", told, dict)
    listed = (told or {}).get(AUX_LAYERS)
    if listed is None:
        return None
    if not isinstance(listed, list) or not listed or not all(type(number) is int for number in listed):
        raise ValueError(f"eagle_config.{AUX_LAYERS} must be a list of layers, found {listed!r}")
    return tuple(sorted({number + 1 for number in listed}))  # they count outputs


def aux_layers(layers: int, listed: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The layers of a target of so many whose inputs a head reads.

    Raises:
        ValueError: the target has too few, or not those that are listed.
    """
    if listed is None:
        if layers < FEWEST_LAYERS:
            raise ValueError(
                f"an EAGLE-3 head reads three layers, by default of {FEWEST_LAYERS} or more, and the target has "
                f"{layers}: list them as eagle_config.{AUX_LAYERS} in the head's config"
            )
        return 2, layers // 2, layers - 3
    if listed[0] < 0 or listed[-1] >= layers:
        raise ValueError(
            f"the draft head reads the inputs of layers {', '.join(map(str, listed))}, counted from 0, and the target "
            f"has {layers}"
        )
    return listed
