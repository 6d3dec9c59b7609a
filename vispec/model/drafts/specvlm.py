"""SpecVLM's draft head (Huang et al., arXiv 2509.11815): EAGLE-2's, whose image rows go through an elastic compressor.

Branches make fewer rows of an image's n:

    prune      random rows stay, n / ratio of them
    pool       the mean of every `ratio` rows
    conv       a convolution over every `ratio` rows
    resampler  attention of a few learned queries over all rows, as ViSpec's adaptor
    text       none: the head sees text alone

and a mode says what becomes of them:

    weight     the sum of prune, pool and conv at one ratio, weighted by the gate
    concat     prune, pool, conv and resampler one after the other
    select     one of all five, which the gate chooses: by Gumbel-softmax in training, the greatest afterwards
    none       no compressor: image rows are ordinary pairs

The gate reads the target's features of the prompt, so it knows the question. Images of a prompt, and frames of videos,
are compressed each by itself and with the same weights.

What is published: this, the ratios of weight (3) and of concat (prune and pool 20, conv 3, 2 queries), and the loss.
Neither code nor weights are, so all else is ours, and this is no reproduction:

- a LayerNorm stands on fc's output; compressed rows bypass fc, beside no feature, and take the last places of the run;
- the gate is one hidden layer of H/4 with SiLU over the mean of the prompt's features that text pairs read, and begins
  with equal weights; Gumbel-softmax has temperature 1;
- select has concat's ratios. The rows that it has chosen are multiplied by 1, through which the gate learns (straight
  through); nothing is multiplied where text was chosen, so text gains where the others lose;
- a convolution's kernel and stride are its ratio, the last one may reach into zeros; it begins as the mean;
- prune's rows depend on n alone, in training and in decoding, so that one prompt has one answer of the head.

Shapes: B prompts, L tokens, H hidden size, n rows of an image, K branches that the gate weighs.
"""

from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from vispec.model.arguments import whole
from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.eagle2 import DraftHead
from vispec.model.drafts.vispec import VisionAdaptor
from vispec.model.pairs import PairLayout, Span, plan_pairs
from vispec.model.prompt import Prompt

BRANCHES = {
    "weight": ("prune", "pool", "conv"),
    "concat": ("prune", "pool", "conv", "resampler"),
    "select": ("prune", "pool", "conv", "resampler", "text"),
    "none": (),
}
"""Of each mode, in the order of the rows and of the gate's weights."""
MODE = "select"
"""The published default."""
GATED = ("weight", "select")
KEY = "compressor"
"""Of a head's config: a `Compression`."""


@dataclass(frozen=True)
class Compression:
    """How images are compressed.

    Attributes:
        prune, pool, conv: rows of an image for each row of the branch.
        queries: rows of the resampler.
    """

    mode: str = MODE
    prune: int = 20
    pool: int = 20
    conv: int = 3
    queries: int = 2

    def __post_init__(self):
        if self.mode not in BRANCHES:
            raise ValueError(f"{KEY}: mode {self.mode!r} is not one of {', '.join(BRANCHES)}")
        for field in fields(self)[1:]:
            whole(f"{KEY}: {field.name}", getattr(self, field.name), 1)
        if self.mode == "weight" and len({self.prune, self.pool, self.conv}) > 1:
            raise ValueError(
                f"{KEY}: mode weight sums rows of one ratio, found prune {self.prune}, pool {self.pool}, "
                f"conv {self.conv}"
            )

    @classmethod
    def of_mode(cls, mode: str) -> "Compression":
        """As published."""
        return cls(mode, 3, 3, 3) if mode == "weight" else cls(mode)

    @classmethod
    def of_config(cls, config: DraftConfig) -> "Compression":
        """Raises ValueError or TypeError at a key that is missing, unknown or wrong."""
        values = config.extra.get(KEY)
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"{KEY} is {values!r:.80}, expected an object of {', '.join(sorted(names))}")
        return cls(**values)

    def rows(self, branch: str, n: int) -> int:
        """How many a branch makes of n."""
        if branch in ("resampler", "text"):
            return self.queries if branch == "resampler" else 0
        return -(-n // getattr(self, branch))


@lru_cache(maxsize=256)
def pruned_rows(n: int, kept: int) -> torch.Tensor:
    """Which `kept` of n rows stay, ascending: random ones, but of equal images the same."""
    with torch.inference_mode(False):  # training may meet the same tensor
        return torch.randperm(n, generator=torch.Generator().manual_seed(n))[:kept].sort().values


Mix = list[tuple[str, torch.Tensor | None]]
"""The branches that an image goes through, and what the rows of each are multiplied by; None: by nothing."""


class Compressor(nn.Module):
    """Makes few rows of an image's, and the gate's weights of a prompt's features."""

    def __init__(self, config: DraftConfig, how: Compression):
        super().__init__()
        self.how, self.branches = how, BRANCHES[how.mode]
        size, gate = config.hidden_size, max(config.hidden_size // 4, 1)
        if "conv" in self.branches:
            self.conv = nn.Conv1d(size, size, how.conv, stride=how.conv)
            with torch.no_grad():
                self.conv.weight.copy_(torch.eye(size)[..., None] / how.conv)
                self.conv.bias.zero_()
        if "resampler" in self.branches:
            self.resampler = VisionAdaptor(config, how.queries)
        if how.mode in GATED:
            self.gate = nn.Sequential(nn.Linear(size, gate), nn.SiLU(), nn.Linear(gate, len(self.branches)))
            nn.init.zeros_(self.gate[-1].weight)
            nn.init.zeros_(self.gate[-1].bias)

    def weights(self, features: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """How much each branch counts, (B, K): in mode select exactly one of each row does.

        Args:
            features: (B, H) means of the prompts'.
            noise: (B, K) of Gumbel's distribution, in training; it draws a branch in mode select.
        """
        logits = self.gate(features).float()
        if self.how.mode == "weight":
            return logits.softmax(-1).to(features.dtype)
        soft = (logits if noise is None else logits + noise).softmax(-1)
        chosen = F.one_hot(soft.argmax(-1), soft.shape[-1])
        return (chosen + (soft - soft.detach())).to(features.dtype)

    def mixes(self, prompts: int, weights: torch.Tensor | None) -> list[Mix]:
        """What becomes of the images of each prompt; `weights` (B, K) where the mode has a gate."""
        if self.how.mode not in GATED:
            return [[(name, None) for name in self.branches]] * prompts
        if self.how.mode == "weight":
            return [list(zip(self.branches, row, strict=True)) for row in weights]
        chosen = weights.argmax(1).tolist()
        return [[(self.branches[place], row[place])] for place, row in zip(chosen, weights, strict=True)]

    def count(self, mix: Mix, n: int) -> int:
        """Rows that n rows become."""
        counts = [self.how.rows(name, n) for name, _ in mix]
        return counts[0] if self.how.mode == "weight" else sum(counts)

    def forward(self, image: torch.Tensor, mix: Mix) -> torch.Tensor:
        """Image rows (n, H) -> (m, H)."""
        rows = [self.branch(name, image) * (1 if weight is None else weight) for name, weight in mix]
        return torch.stack(rows).sum(0) if self.how.mode == "weight" else torch.cat(rows)

    def branch(self, name: str, image: torch.Tensor) -> torch.Tensor:
        """Image rows (n, H) -> those of a branch."""
        n, kept = len(image), self.how.rows(name, len(image))
        if name == "resampler":
            return self.resampler(image)
        if name == "text":
            return image[:0]
        if name == "prune":
            return image[pruned_rows(n, kept).to(image.device)]
        if name == "pool":
            return F.avg_pool1d(image.T[None], self.how.pool, ceil_mode=True)[0].T
        padded = F.pad(image, (0, 0, 0, kept * self.how.conv - n))
        return self.conv(padded.T[None])[0].T


@dataclass
class CompressedLayout(PairLayout):
    """Of pairs whose images are compressed; `mixes` says how those of each prompt are."""

    mixes: list[Mix]


class SpecVLMHead(DraftHead):
    """The EAGLE-2 head with a norm on fc's output and the compressor, which the config's key `compressor` describes."""

    method = "specvlm"

    def __init__(self, config: DraftConfig):
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.compressor = Compressor(config, Compression.of_config(config))

    @classmethod
    def new_config(cls, config: DraftConfig, mode: str | None = None) -> DraftConfig:
        """One that describes the compressor: of mode `mode`, or as it is in the config, or the published default.

        Raises:
            TypeError, ValueError: the config describes it wrongly, or another one than `mode`.
        """
        if KEY in config.extra:
            found = Compression.of_config(config)
            if mode not in (None, found.mode):
                raise ValueError(f"{KEY} has mode {found.mode!r}, {mode!r} was asked for")
            return config
        return replace(config, extra={**config.extra, KEY: asdict(Compression.of_mode(mode or MODE))})

    @property
    def reads_image_features(self) -> bool:
        return self.compressor.how.mode == "none"

    def fuse(self, next_embeds, hidden, global_feature=None):
        return self.fc_norm(super().fuse(next_embeds, hidden))

    def weights(
        self,
        features: torch.Tensor,
        images: list[list[Span]],
        lengths: list[int],
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """What `plan` asks for; None where the mode has no gate.

        Args:
            features: (B, L, H) of the target.
            images: token spans of the images of each row.
            lengths: tokens of each row's prompt.
            noise: see `Compressor.weights`.
        """
        if self.compressor.how.mode not in GATED:
            return None
        places = torch.arange(features.shape[1], device=features.device)
        read = places < torch.tensor(lengths, device=features.device)[:, None]
        for row, spans in enumerate(images):
            for start, end in spans:
                read[row, max(start - 1, 0) : end - 1] = False
        total = (features * read[..., None]).sum(1, dtype=torch.float32)
        return self.compressor.weights((total / read.sum(1, keepdim=True).clamp(min=1)).to(features.dtype), noise)

    def plan(self, lengths: list[int], images: list[list[Span]], weights: torch.Tensor | None = None) -> PairLayout:
        """See `PairHead`; `weights` (B, K) are those of each row's prompt."""
        if self.compressor.how.mode == "none" or not any(images):
            return super().plan(lengths, images)
        mixes = self.compressor.mixes(len(lengths), weights)
        counts = [
            [self.compressor.count(mix, end - start) for start, end in spans]
            for mix, spans in zip(mixes, images, strict=True)
        ]
        return CompressedLayout(**vars(plan_pairs(lengths, images, counts)), mixes=mixes)

    def plan_prompt(self, prompt: Prompt, pairs: int) -> PairLayout:
        weights = self.weights(prompt.features, prompt.images, [prompt.features.shape[1]])
        return self.plan([pairs], prompt.images, weights)

    def join(self, layout, hidden, embeds, next_embeds):
        text, none = super().join(layout, hidden, embeds, next_embeds)
        rows = [self.compressor(embeds[row, start:end], layout.mixes[row]) for row, (start, end) in layout.images]
        return (layout.with_images(text, torch.cat(rows)) if rows else text), none
