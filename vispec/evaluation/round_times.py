"""Where the time of a plain step and of a round goes, seen from outside the decoding loop.

Rounds are timed where the loop gives them out, shortly after its one transfer from the device, so nothing waits that
would not wait otherwise. Hooks on the modules that read weights time their passes; what is left of a round is
everything else: acceptance, tree building, masks, caches, and the host between two launches.

Where steps are captured in CUDA graphs, a replay calls no module. There the two steps of a round are timed on the
device, what is left of a round is the host's, and each part is captured and replayed by itself.
"""

import time
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING

from vispec.evaluation.measure import now
from vispec.evaluation.roofline import Cost, attention_cost, pass_cost, timed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vispec.model.spec_model import SpecModel
    from vispec.model.target import Target
    from vispec.model.tree import TreeShape

WARM_UP_ROUNDS, ROUNDS = 3, 12
"""Rounds of every run that are not counted, and those that are."""

DECODER, HEAD, DRAFT_LAYER, DRAFT_HEAD = "target decoder", "output head", "draft layer", "draft output head"
STEP = "step"
"""One of the two captured steps of a round."""


@dataclass(frozen=True)
class Pass:
    """One call of a module."""

    part: str
    rows: int
    seconds: float


@dataclass
class Run:
    """One answer, round by round; the prompt's pass and the warm-up are left out, `tokens` are all that came."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each counted round."""
    passes: list[list[Pass]] = field(default_factory=list)
    """Of each counted round; empty lists where no clock was running."""

    @property
    def rounds(self) -> list[tuple[float, list[Pass]]]:
        return list(zip(self.seconds, self.passes, strict=True))


class ModuleClock:
    """Times calls while it is open; on a GPU by events, so that the host never waits. Of nested calls the outer counts.

    Args:
        parts: the modules of each part whose calls are timed; a part's time is the sum over its modules.
    """

    def __init__(self, parts: "dict[str, list[nn.Module]]", device: "torch.device"):
        self._parts, self._device = parts, device
        self._marks: list[tuple[str, int, object, object]] = []
        self._open: list = []
        self._handles: list = []

    @property
    def calls(self) -> int:
        """Calls so far."""
        return len(self._marks)

    def __enter__(self) -> "ModuleClock":
        for part, modules in self._parts.items():
            for module in modules:
                self._handles += [
                    module.register_forward_pre_hook(lambda *_: self._open.append(self._mark())),
                    module.register_forward_hook(lambda _, __, output, part=part: self._close(part, output)),
                ]
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()

    def around(self, part: str, function: Callable) -> Callable:
        """The function, its calls timed as those of a part."""

        def watched(*args):
            self._open.append(self._mark())
            output = function(*args)
            self._close(part, output)
            return output

        return watched

    def passes(self) -> list[Pass]:
        """All calls, in order."""
        now(self._device)
        return [
            Pass(part, rows, end - start if isinstance(end, float) else start.elapsed_time(end) / 1000)
            for part, rows, start, end in self._marks
        ]

    def _mark(self):
        if self._device.type != "cuda":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _close(self, part: str, output) -> None:
        start = self._open.pop()
        if not self._open:
            self._marks.append((part, rows_of(output), start, self._mark()))


def rows_of(output) -> int:
    """Rows (…, H) that a module returns, alone or first; a step returns nothing."""
    if output is None:
        return 0
    rows = output if hasattr(output, "numel") else output[0]
    return rows.numel() // rows.shape[-1]


class PassCosts:
    """What a pass of each part costs at least, by the sizes of its modules."""

    def __init__(self, model: "SpecModel", context: int):
        target, draft = model.target, model.draft
        text, config = target.text_config, draft.config
        heads = text.num_attention_heads
        self._context, self._element = context, target.embed_tokens.weight.element_size()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        self._attention = {
            DECODER: (text.num_hidden_layers, heads, text.num_key_value_heads, head_dim),
            DRAFT_LAYER: (1, config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        }
        fusion = [module for name in ("fc", "img_fc") if (module := getattr(draft, name, None)) is not None]
        self.modules = {
            DECODER: [target.decoder],
            HEAD: [target.lm_head],
            DRAFT_LAYER: [*fusion, *draft.layers],
        }
        self._head_shape = drafted_tokens(model), text.hidden_size

    def of(self, part: str, rows: int) -> Cost:
        """A pass of `rows` rows: weights, keys and values once, and the arithmetic."""
        if part == DRAFT_HEAD:
            weights = self._head_shape[0] * self._head_shape[1]
            return Cost(weights * self._element, 2 * rows * weights)
        cost = pass_cost(self.modules[part], rows)
        if part in self._attention:
            cost += attention_cost(*self._attention[part], rows, self._context + rows, self._element)
        return cost

    def number(self, part: str, calls: int) -> int:
        """Passes through a part whose modules were called so many times in all."""
        return calls // len(self.modules.get(part, [None]))


def drafted_tokens(model: "SpecModel") -> int:
    """Rows of the output head that the draft reads: those of its draft vocabulary, or all."""
    vocabulary = model.draft.draft_vocab
    return model.target.lm_head.weight.shape[0] if vocabulary is None else len(vocabulary)


def round_passes(shape: "TreeShape") -> list[tuple[int, str, int]]:
    """(number, part, rows) of the passes of a round: one of the target over N rows, depth + 1 of the draft.

    The draft's first pass reads the kept path, the others the top_k nodes of a level.
    """
    return [
        (1, DECODER, shape.total_token),
        (1, HEAD, shape.total_token),
        (1, DRAFT_LAYER, shape.levels + 1),
        (1, DRAFT_HEAD, 1),
        (shape.depth, DRAFT_LAYER, shape.top_k),
        (shape.depth, DRAFT_HEAD, shape.top_k),
    ]


def watched_run(model: "SpecModel", ids: "torch.Tensor", costs: PassCosts) -> Run:
    """The rounds of `run` with a clock on all parts, or on the steps where these are captured; a little slower."""
    from vispec import SpecModel

    shape = model.shape
    watched = SpecModel(model.target.model, model.draft, shape.total_token, shape.depth, shape.top_k)
    target = watched.target
    if model.target.can_capture:
        clock = ModuleClock({}, target.device)
        new_steps = target.new_steps

        def timed_steps():
            steps = new_steps()
            steps.run = clock.around(STEP, steps.run)
            return steps

        target.new_steps = timed_steps
    else:
        target.can_capture = False
        clock = ModuleClock(costs.modules, target.device)
        output = watched.draft_output
        watched.draft_output = output._replace(logits=clock.around(DRAFT_HEAD, output.logits))
    return run(watched, ids, speculate=True, clock=clock)


def watched_parts(runs: Iterable[Run], costs: PassCosts) -> dict[tuple[str, int], tuple[int, float]]:
    """(passes, seconds of all of them) in a round of watched runs, by part and rows."""
    rounds = [passes for one in runs for passes in one.passes]
    found = {}
    for key in {(one.part, one.rows) for passes in rounds for one in passes}:
        own = [[one.seconds for one in passes if (one.part, one.rows) == key] for passes in rounds]
        found[key] = costs.number(key[0], max(map(len, own))), median(map(sum, own))
    return found


def replayed_parts(model: "SpecModel", ids: "torch.Tensor", repeats: int) -> dict[tuple[str, int], tuple[int, float]]:
    """The same where steps are captured: each part alone on tensors like those of a round, with embeddings and mask."""
    import torch

    target, draft, shape = model.target, model.draft, model.shape
    steps = target.new_steps()
    capacity = ids.shape[1] + max(shape.total_token, draft.reach(shape))
    with torch.inference_mode():
        cache = target.new_cache(1, capacity)
        prompt = target.prefill(cache, ids.to(model.device), {})
        root = prompt.logits.argmax(-1)
        state = draft.start(prompt, root, capacity)
        tree = draft.grow(state, root, shape, *model.draft_output)
        positions = cache.lengths[:, None] + tree.depths
        features = target.forward(cache, tree.tokens, positions, tree.mask)

        def draft_layer(rows: int) -> Callable[[], object]:
            hidden = state.hidden[:, None].repeat(1, rows, 1)
            tokens = root[:, None].repeat(1, rows)
            itself = torch.eye(rows, dtype=torch.bool, device=model.device)[None]
            return lambda: draft.expand(state, 1, hidden, tokens, itself)

        def draft_head(rows: int) -> Callable[[], object]:
            hidden = state.hidden[:, None].repeat(1, rows, 1)
            return lambda: model.draft_output.logits(hidden)

        works = {
            DECODER: lambda rows: lambda: target.forward(cache, tree.tokens, positions, tree.mask),
            HEAD: lambda rows: lambda: target.logits(features),
            DRAFT_LAYER: draft_layer,
            DRAFT_HEAD: draft_head,
        }
        found: dict[tuple[str, int], tuple[int, float]] = {}
        for number, part, rows in round_passes(shape):
            before, seconds = found.get((part, rows), (0, 0.0))
            work = works[part](rows)
            once = median(replayed(target, steps, (part, rows, number), work, repeats))
            found[part, rows] = before + number, seconds + number * once
    return {key: entry for key, entry in found.items() if entry[0]}


def replayed(target: "Target", steps, key: Hashable, work: Callable[[], object], repeats: int, warm: bool = False):
    """Seconds of each of `repeats` runs of work over fixed tensors, as decoding runs its steps: replayed if it can be.

    `warm` says that it has run before, under the same key.
    """
    from vispec.model.graphs import CAPTURED_USE

    def step() -> None:
        steps.run(key, work, reset=lambda: None)

    return timed(step, target.device, repeats, warm_ups=1 if warm else CAPTURED_USE)


def run(model: "SpecModel", ids: "torch.Tensor", speculate: bool, clock: ModuleClock | None = None) -> Run:
    """Answer a prompt (1, L) for WARM_UP_ROUNDS + ROUNDS rounds; the calls seen by a `clock` are those of this run."""
    most = most_new_tokens(model.shape.levels if speculate else 0)
    rounds = model.stream(ids, speculate=speculate, max_new_tokens=most)
    result, borders, before = Run(), [], None
    with nullcontext() if clock is None else clock:
        for number, step in enumerate(islice(rounds, 1 + WARM_UP_ROUNDS + ROUNDS)):
            after = time.perf_counter(), 0 if clock is None else clock.calls
            result.tokens += step.token_ids
            if number > WARM_UP_ROUNDS:
                result.seconds.append(after[0] - before[0])
                borders.append((before[1], after[1]))
            before = after
    passes = [] if clock is None else clock.passes()
    result.passes = [passes[start:end] for start, end in borders]
    return result


def run_generate(model: "SpecModel", ids: "torch.Tensor") -> Run:
    """The same by transformers' own greedy generate()."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Stamps(BaseStreamer):
        """When each token came; the first call is the prompt."""

        def __init__(self):
            self.at: list[float] = []

        def put(self, value):
            self.at.append(time.perf_counter())

        def end(self):
            pass

    stamps = Stamps()
    with torch.inference_mode():
        output = model.target.model.generate(
            input_ids=ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            do_sample=False,
            max_new_tokens=1 + WARM_UP_ROUNDS + ROUNDS,
            streamer=stamps,
        )
    first, *later = stamps.at[1:]
    steps = [after - before for before, after in zip([first, *later[:-1]], later, strict=True)]
    return Run(output[0, ids.shape[1] :].tolist(), steps[WARM_UP_ROUNDS:])


def most_new_tokens(levels: int) -> int:
    """A limit that no run reaches whose rounds accept up to `levels` draft tokens."""
    return 2 + (WARM_UP_ROUNDS + ROUNDS) * (levels + 1)


def verification_times(
    model: "SpecModel", ids: "torch.Tensor", sizes: Iterable[int], repeats: int
) -> dict[int, list[float]]:
    """Seconds of the target's pass over n tokens after the prompt, output head included, for each n in turn."""
    import torch

    target = model.target
    length, steps = ids.shape[1], target.new_steps()
    times: dict[int, list[float]] = {n: [] for n in sizes}
    with torch.inference_mode():
        cache = target.new_cache(1, length + max(times))
        target.prefill(cache, ids, {})
        cache.used = length
        works = {n: verification(target, cache, n) for n in times}
        for _ in range(repeats):
            for n, found in times.items():
                found += replayed(target, steps, n, works[n], repeats=1, warm=bool(found))
    return times


def verification(target: "Target", cache, n: int) -> Callable[[], object]:
    """A pass over a chain of n tokens and the output head, always over the same tensors."""
    import torch

    steps = torch.arange(n, device=target.device)
    tokens, positions = torch.ones_like(steps)[None], (cache.used + steps)[None]
    chain = (steps[:, None] >= steps)[None] if n > 1 else None
    return lambda: target.logits(target.forward(cache, tokens, positions, chain))


def tree_building_times(model: "SpecModel", repeats: int) -> list[float]:
    """Seconds of growing a tree from logits that are there: top k, scores, the choice of nodes, mask and paths."""
    import torch

    from vispec.model.tree import grow_tree

    class Drafted:
        """A head that has already run: what it would say is given by `logits`."""

        estimates = torch.zeros(1, 1, 1, device=model.device)

        def expand(self, state, level, hidden, tokens, ancestors):
            return hidden

    shape, token_ids = model.shape, model.draft_output.token_ids
    logits = torch.randn(1, shape.top_k, drafted_tokens(model), device=model.device).to(model.target.dtype)
    drafted, root = Drafted(), torch.zeros(1, dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def build():
        return grow_tree(drafted, drafted, root, shape, lambda hidden: logits[:, : hidden.shape[1]], token_ids)

    return replayed(model.target, model.target.new_steps(), "tree", build, repeats)
