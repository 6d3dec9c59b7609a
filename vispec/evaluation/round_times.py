"""Where the time of a plain step and of a round goes, seen from outside the decoding loop.

Rounds are timed where the loop gives them out, shortly after its one transfer from the device, so nothing waits that
would not wait otherwise. Hooks on the modules that read weights time their passes; what is left of a round is
everything else: acceptance, tree building, masks, caches, and the host between two launches.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from vispec.evaluation.roofline import Cost, attention_cost, now, pass_cost, timed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vispec.model.spec_model import SpecModel

WARM_UP_ROUNDS, ROUNDS = 3, 12
"""Rounds of every run that are not counted, and those that are."""

DECODER, HEAD, DRAFT_LAYER, DRAFT_HEAD = "target decoder", "output head", "draft layer", "draft output head"


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
        event.record()
        return event

    def _close(self, part: str, output) -> None:
        start, rows = self._open.pop(), output if hasattr(output, "numel") else output[0]
        if not self._open:
            self._marks.append((part, rows.numel() // rows.shape[-1], start, self._mark()))


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


def watched_run(model: "SpecModel", ids: "torch.Tensor", costs: PassCosts) -> Run:
    """The rounds of `run` with a clock on all parts; a little slower than without."""
    from vispec import SpecModel

    shape = model.shape
    watched = SpecModel(model.target.model, model.draft, shape.total_token, shape.depth, shape.top_k)
    watched.target.can_capture = False  # a CUDA graph that is replayed calls no module
    clock = ModuleClock(costs.modules, watched.target.device)
    output = watched.draft_output
    watched.draft_output = output._replace(logits=clock.around(DRAFT_HEAD, output.logits))
    return run(watched, ids, speculate=True, clock=clock)


def busy_seconds(model: "SpecModel", ids: "torch.Tensor", speculate: bool) -> float | None:
    """Seconds of a round in which a GPU computes, by torch's profiler; None on a CPU or where it sees no kernels."""
    if model.target.device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    rounds = model.stream(ids, speculate=speculate, max_new_tokens=most_new_tokens(model.shape.levels))
    for _ in islice(rounds, 1 + WARM_UP_ROUNDS):
        pass
    now(model.target.device)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in islice(rounds, ROUNDS):
            pass
        now(model.target.device)
    kernels = [event.time_range.elapsed_us() for event in trace.events() if event.device_type == DeviceType.CUDA]
    return sum(kernels) / 1e6 / ROUNDS if kernels else None


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
    length = ids.shape[1]
    times: dict[int, list[float]] = {n: [] for n in sizes}
    with torch.inference_mode():
        cache = target.new_cache(1, length + max(times))
        target.prefill(cache, ids, {})
        cache.used = length
        for _ in range(repeats):
            for n, found in times.items():
                tokens = torch.ones(1, n, dtype=torch.long, device=model.device)
                steps = torch.arange(n, device=model.device)
                chain = (steps[:, None] >= steps)[None] if n > 1 else None

                def verify(tokens=tokens, positions=(length + steps)[None], chain=chain):
                    return target.logits(target.forward(cache, tokens, positions, chain))

                found += timed(verify, target.device, repeats=1, warm_ups=1 if found else 2)
    return times


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

    return timed(build, model.target.device, repeats)
