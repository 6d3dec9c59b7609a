"""Choose the draft tree that brings the most tokens a second on this device (`--total-token -1`).

A larger tree has more tokens accepted in a round, and its rounds take longer. Both sides are measured on a few prompts:

1. Time. Rounds with trees of different shapes are timed. A round takes verify[N] + d · expand[k] seconds: the
   target's pass over N nodes with all else that happens once a round, and d passes of the draft over k nodes.
2. Acceptance. While the target answers alone, the draft is asked after every token what it would propose. A tree
   takes the N - 1 best of the candidates, and those of a lower depth are the first levels of a deeper one. So the
   candidates for one k tell for every N and d how many of the tokens that follow would have been accepted, and
   decoding the answer with any tree can be replayed on paper.
3. The shapes that are best on paper are run in turn with the default tree, 30/3/8. The fastest one is taken.

Triples are N/d/k: total_token, depth, top_k.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import torch

from vispec.model.tree import EMPTY, Candidates, Tree, TreeShape, choose_nodes

if TYPE_CHECKING:
    from vispec.model.spec_model import SpecModel

DEFAULT = TreeShape()
SIZES = (2, 4, 6, 8, 10, 12, 16, 24, 30, 40, 60)
WIDTHS = (1, 2, 3, 4, 8)
DEEPEST = 8
"""The grid: N, k, and d from 0 on."""
TOKENS = 48
"""Of each answer."""
WARM_ROUNDS, TIMED_ROUNDS = 3, 9
"""Rounds with each timed shape: those that may pay for what happens only once, and those that count."""
FINALISTS, REPETITIONS = 2, 3
"""How many shapes run against the default, and how often they answer each prompt."""
RANKS = 4
"""Columns of the table of acceptance."""


# --- acceptance ---


class Recorder:
    """Stands in for a draft while the target answers: keeps what the draft would propose, and proposes nothing.

    Args:
        draft: a draft head or a `PromptLookup`.
        shapes: whose candidates are kept.
    """

    def __init__(self, draft, shapes: Sequence[TreeShape]):
        self.draft, self.shapes = draft, shapes
        self.proposed: list[list[Candidates]] = []
        """For every token of the answer but the last, the candidates of each shape."""

    def fit(self, shape: TreeShape) -> TreeShape:
        return shape

    def reach(self, shape: TreeShape) -> int:
        return max(self.draft.reach(one) for one in self.shapes)

    def held(self, *args) -> int:
        return self.draft.held(*args)

    def start(self, *args):
        return self.draft.start(*args)

    def extend(self, *args) -> None:
        self.draft.extend(*args)

    def grow(self, state, root: torch.Tensor, shape: TreeShape, lm_head, token_ids=None) -> Tree:
        self.proposed.append([self.draft.candidates(state, root, s, lm_head, token_ids) for s in self.shapes])
        nothing = torch.full_like(root, EMPTY)[:, None]
        top = torch.full_like(nothing, -1)
        return choose_nodes(root, nothing.float(), nothing, top, shape)


@dataclass
class Transcript:
    """An answer of the target, and which trees would have held its tokens."""

    tokens: int
    needed: dict[int, list[list[list[int]]]] = field(default_factory=dict)
    """[k][token][d]: for each token that follows, as far as it was proposed, the least N of a tree that holds it."""
    ranks: list[Counter] = field(default_factory=list)
    """For each level how often the target's token had which rank among its siblings; None: it was not proposed."""

    def rounds(self, shape: TreeShape) -> int:
        """Rounds that decoding this answer takes with a tree of the grid."""
        place = rounds = 0
        while place < self.tokens - 1:
            needed = self.needed[shape.top_k][place][shape.depth]
            place += 1 + sum(size <= shape.total_token for size in needed)
            rounds += 1
        return rounds


def record(model: "SpecModel", inputs: Mapping, shapes: Sequence[TreeShape], max_new_tokens: int) -> Transcript:
    """Let the target answer a prompt and look up its tokens among what the draft proposes.

    Args:
        shapes: the deepest one of each k; the last one is the widest, whose candidates tell the ranks.
    """
    recorder = Recorder(model.draft, shapes)
    listening = model.with_tree(shapes[-1], recorder)  # with room for the largest candidates
    listening.target = copy.copy(model.target)
    listening.target.can_capture = False  # the replay of a graph would not ask the recorder
    said = [token for step in listening.stream(**inputs, max_new_tokens=max_new_tokens) for token in step.token_ids]
    ranks: list[Counter] = [Counter() for _ in range(shapes[-1].levels)]
    transcript = Transcript(len(said), {shape.top_k: [] for shape in shapes}, ranks)
    for place, proposed in enumerate(recorder.proposed[: len(said) - 1]):
        for shape, candidates in zip(shapes, proposed, strict=True):
            one = Candidates(*(x[0].cpu() for x in candidates))
            path = follow(one, said[place + 1 :])
            levels = levels_of(one.parents, shape.levels)
            transcript.needed[shape.top_k].append(
                [needed_sizes(one, path, levels, depth) for depth in range(shape.depth + 1)]
            )
        _count_ranks(ranks, one, path, len(said) - 1 - place)
    return transcript


def follow(candidates: Candidates, said: Sequence[int]) -> list[int]:
    """The candidates (M,) that are the tokens `said`, one below the other, as far as there are any."""
    path: list[int] = []
    node = -1
    for token in said:
        found = ((candidates.parents == node) & (candidates.tokens == token)).nonzero()
        if len(found) == 0:
            break
        node = int(found[0])
        path.append(node)
    return path


def levels_of(parents: torch.Tensor, levels: int) -> torch.Tensor:
    """(M,) the level of each candidate, from 1 on."""
    found = torch.ones_like(parents)
    for _ in range(levels - 1):
        found = torch.where(parents < 0, 1, found[parents] + 1)
    return found


def needed_sizes(candidates: Candidates, path: Sequence[int], levels: torch.Tensor, depth: int) -> list[int]:
    """The least N, for each candidate of a path, of a tree of this depth that holds it: its place by score, plus 2.

    Args:
        path: as `follow` finds it; what is below `depth` is left out.
        levels: (M,) of the candidates.
    """
    there = levels <= depth + 1
    index = torch.arange(len(levels))
    sizes = []
    for node in path[: depth + 1]:
        score = candidates.scores[node]
        # among equal scores the earlier candidate comes first, as in `choose_nodes`
        before = (candidates.scores > score) | ((candidates.scores == score) & (index < node))
        sizes.append(int((before & there).sum()) + 2)
    return sizes


def _count_ranks(ranks: Sequence[Counter], candidates: Candidates, path: Sequence[int], left: int) -> None:
    """Add one answer's token to the counts; `left` tokens follow it."""
    for level, node in enumerate(path):
        siblings = candidates.parents == candidates.parents[node]
        ranks[level][int((candidates.scores[siblings] > candidates.scores[node]).sum())] += 1
    if len(path) < min(left, len(ranks)):
        ranks[len(path)][None] += 1


# --- time ---


def time_rounds(
    model: "SpecModel", shapes: Sequence[TreeShape], prompts: Sequence[Mapping], max_new_tokens: int
) -> dict[TreeShape, float]:
    """Median seconds of a round with trees of these shapes.

    Args:
        prompts: their answers have more than one token.
    """
    found = {}
    for shape in shapes:
        arm = model.with_tree(shape)
        seconds: list[float] = []
        for inputs in prompts:
            stream = arm.stream(**inputs, max_new_tokens=max_new_tokens)
            next(stream)
            while len(seconds) < WARM_ROUNDS + TIMED_ROUNDS:
                start = time.perf_counter()
                if next(stream, None) is None:
                    break
                seconds.append(time.perf_counter() - start)
        found[shape] = median(seconds[WARM_ROUNDS:] or seconds)
    return found


def non_decreasing(values: Iterable[float]) -> list[float]:
    """The nearest sequence that never falls (pool adjacent violators): more nodes do not take less time, noise may."""
    pools: list[list[float]] = []  # mean and length
    for value in values:
        pools.append([value, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (left, n), (right, m) = pools[-2:]
            pools[-2:] = [[(left * n + right * m) / (n + m), n + m]]
    return [mean for mean, length in pools for _ in range(int(length))]


@dataclass(frozen=True)
class RoundTime:
    """Seconds of a round with any tree of the grid."""

    verify: dict[int, float]
    """By N: all that happens once a round."""
    expand: dict[int, float]
    """By k: one more level of the draft."""

    @classmethod
    def fitted(cls, measured: Mapping[TreeShape, float]) -> "RoundTime":
        """Least squares over the measured shapes."""
        sizes, widths = (sorted({getattr(s, name) for s in measured}) for name in ("total_token", "top_k"))
        table = torch.zeros(len(measured), len(sizes) + len(widths), dtype=torch.float64)
        for row, shape in zip(table, measured, strict=True):
            row[sizes.index(shape.total_token)] = 1
            row[len(sizes) + widths.index(shape.top_k)] = shape.depth
        times = torch.tensor(list(measured.values()), dtype=torch.float64)
        # a draft whose trees have one depth leaves open what belongs to which, which this driver allows
        found = torch.linalg.lstsq(table, times[:, None], driver="gelsd").solution[:, 0].tolist()
        verify, expand = non_decreasing(found[: len(sizes)]), non_decreasing(found[len(sizes) :])
        return cls(dict(zip(sizes, verify, strict=True)), dict(zip(widths, expand, strict=True)))

    def __call__(self, shape: TreeShape) -> float:
        return self.verify[shape.total_token] + shape.depth * self.expand[shape.top_k]


# --- the choice ---


@dataclass(frozen=True)
class Prediction:
    """What a tree brings on paper."""

    shape: TreeShape
    tau: float
    """Accepted draft tokens a round."""
    seconds: float
    """Of a round."""

    @property
    def speed(self) -> float:
        """Tokens a second, without the prompt's pass."""
        return (self.tau + 1) / self.seconds


def choose(
    shapes: Iterable[TreeShape], transcripts: Sequence[Transcript], seconds: Callable[[TreeShape], float]
) -> list[Prediction]:
    """The shapes with what they bring on paper, the fastest first; among equally fast ones the smallest first.

    Args:
        seconds: of a round with a tree of some shape.
    """
    tokens = sum(transcript.tokens - 1 for transcript in transcripts)
    found = []
    for shape in sorted(shapes, key=lambda s: (s.total_token, s.depth, s.top_k)):
        rounds = sum(transcript.rounds(shape) for transcript in transcripts)
        found.append(Prediction(shape, tokens / rounds - 1, seconds(shape)))
    return sorted(found, key=lambda prediction: -prediction.speed)


def run_in_turn(
    model: "SpecModel", shapes: Sequence[TreeShape], prompts: Sequence[Mapping], max_new_tokens: int
) -> dict[TreeShape, float]:
    """Tokens a second of each shape, without the prompts' passes: every prompt is answered with each in turn."""
    arms = {shape: model.with_tree(shape) for shape in shapes}
    tokens: Counter = Counter()
    seconds: dict[TreeShape, list[list[float]]] = {shape: [[] for _ in prompts] for shape in shapes}
    for repetition in range(REPETITIONS):
        for number, inputs in enumerate(prompts):
            for shape in shapes:
                _, new, _, spent = arms[shape].specgenerate(
                    **inputs, max_new_tokens=max_new_tokens, log=True, return_decode_time=True
                )
                seconds[shape][number].append(spent)
                tokens[shape] += new - 1 if repetition == 0 else 0
    return {shape: tokens[shape] / sum(map(median, seconds[shape])) for shape in shapes}


@dataclass(frozen=True)
class Tuning:
    """What was measured, and what was chosen."""

    shape: TreeShape
    default: TreeShape
    """30/3/8, or what the draft can fill of it."""
    time: RoundTime
    predictions: list[Prediction]
    """Of the shapes that were run, the chosen one among them."""
    measured: dict[TreeShape, float]
    """Tokens a second of each."""
    transcripts: list[Transcript]

    def report(self) -> str:
        """Why this shape, in a few short tables."""
        tokens = sum(transcript.tokens for transcript in self.transcripts)
        lines = [f"draft tree, measured on {len(self.transcripts)} prompts and {tokens} tokens (tree: N/d/k)"]
        lines.append(f"a round of N nodes, without expansions, in ms: {_milliseconds(self.time.verify)}")
        lines.append(f"each expansion of k nodes, in ms: {_milliseconds(self.time.expand)}")
        lines += self._acceptance()
        lines += ["| tree | τ on paper | ms a round | tokens/s on paper | measured |", "|---|---|---|---|---|"]
        for row in self.predictions:
            lines.append(
                f"| {_name(row.shape)} | {row.tau:.2f} | {1000 * row.seconds:.2f} | {row.speed:.1f} | "
                f"{self.measured[row.shape]:.1f} |"
            )
        ratio = self.measured[self.shape] / self.measured[self.default]
        lines.append(f"chosen: {_name(self.shape)}, {ratio:.2f} times as fast as {_name(self.default)} in this run")
        return "\n".join(lines)

    def _acceptance(self) -> list[str]:
        names = ["1st", "2nd", "3rd", *(f"{rank}th" for rank in range(4, RANKS + 1))]
        lines = [f"| level | {' | '.join(names)} | later | not proposed |", "|---" * (RANKS + 3) + "|"]
        for level in range(max(len(transcript.ranks) for transcript in self.transcripts)):
            counts = sum((transcript.ranks[level] for transcript in self.transcripts), Counter())
            if not counts:
                break
            shares = [counts[rank] for rank in range(RANKS)]
            shares += [counts.total() - sum(shares) - counts[None], counts[None]]
            cells = " | ".join(f"{share / counts.total():.0%}" for share in shares)
            lines.append(f"| {level + 1} | {cells} |")
        return ["rank of the target's token among what the draft proposed, where all before it was right:", *lines]


def tune(model: "SpecModel", prompts: Sequence[Mapping], max_new_tokens: int = TOKENS) -> Tuning:
    """Measure which tree brings the most tokens a second; the model is left as it is.

    Args:
        model: with a draft.
        prompts: what the processor returned for each prompt, one row each, input_ids included.
        max_new_tokens: of each answer; answers are greedy.

    Raises:
        ValueError: there are no prompts, or all answers end with their first token.
    """
    if not prompts:
        raise ValueError("no tree can be chosen without prompts")
    fit = model.draft.fit
    shapes, default = _grid(fit), fit(DEFAULT)
    deepest = sorted({fit(TreeShape(2, DEEPEST, k)) for k in (*WIDTHS, default.top_k)}, key=lambda s: s.top_k)
    transcripts = [record(model, inputs, deepest, max_new_tokens) for inputs in prompts]
    told = [(inputs, one) for inputs, one in zip(prompts, transcripts, strict=True) if one.tokens > 1]
    if not told:
        raise ValueError("no tree can be chosen: the answers to these prompts end with their first token")
    prompts, transcripts = zip(*told, strict=True)
    time_of = RoundTime.fitted(time_rounds(model, _shapes_to_time(shapes, default), prompts, max_new_tokens))
    ranked = choose(shapes, transcripts, time_of)
    finalists = [row for row in ranked if row.shape != default][:FINALISTS]
    finalists += [row for row in ranked if row.shape == default]
    measured = run_in_turn(model, [row.shape for row in finalists], prompts, max_new_tokens)
    return Tuning(max(measured, key=measured.get), default, time_of, finalists, measured, transcripts)


def _grid(fit: Callable[[TreeShape], TreeShape]) -> list[TreeShape]:
    """The shapes that a draft can fill with as many nodes as they ask for, and the default."""
    asked = [TreeShape(size, depth, k) for size in SIZES for depth in range(DEEPEST + 1) for k in WIDTHS]
    filled = {fit(shape) for shape in asked if fit(shape).total_token == shape.total_token}
    return sorted(filled | {fit(DEFAULT)}, key=lambda s: (s.total_token, s.depth, s.top_k))


def _shapes_to_time(shapes: Sequence[TreeShape], default: TreeShape) -> list[TreeShape]:
    """Enough to tell verify[N] from expand[k]: for each N a shape like the default, for each k a deep one."""
    by_size, by_width = {}, {}
    for shape in sorted(shapes, key=lambda s: (-abs(s.top_k - default.top_k), -abs(s.depth - default.depth))):
        by_size[shape.total_token] = shape
    for shape in sorted(shapes, key=lambda s: (s.depth, s.total_token)):
        if shape.total_token <= default.total_token:
            by_width[shape.top_k] = shape
    return list(dict.fromkeys([*by_size.values(), *by_width.values()]))


def _name(shape: TreeShape) -> str:
    return f"{shape.total_token}/{shape.depth}/{shape.top_k}"


def _milliseconds(seconds: Mapping[int, float]) -> str:
    return ", ".join(f"{size}: {1000 * value:.2f}" for size, value in sorted(seconds.items()))
