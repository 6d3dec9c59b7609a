"""Where the time of a plain step and of a round goes, seen from outside the decoding loop.

Rounds are timed where the loop gives them out, shortly after its one transfer from the device, so nothing waits that
would not wait otherwise. The parts of a round that read weights are run each by itself, on tensors like those of a
round and as decoding runs its steps: replayed where these are captured in CUDA graphs. What is left of a round is
everything else: acceptance, tree building, masks, the cache, and the host.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING

from vispec.evaluation.measure import generate_greedily
from vispec.evaluation.roofline import Cost, attention_cost, pass_cost, timed
from vispec.model.shape import TreeShape
from vispec.timing import now, turns

if TYPE_CHECKING:
    import torch

    from vispec.model.graphs import Steps
    from vispec.model.spec_model import SpecModel
    from vispec.model.target import Target

WARM_UP_ROUNDS, ROUNDS = 3, 12
"""Rounds of every run that are not counted, and those that are."""

DECODER, HEAD, DRAFT_LAYER, DRAFT_HEAD = "target decoder", "output head", "draft layer", "draft output head"


@dataclass
class Run:
    """One answer, round by round; the prompt's pass and the warm-up are left out, `tokens` are all that came."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each counted round."""


class PassCosts:
    """What a pass of each part costs at least, by the sizes of its modules."""

    def __init__(self, model: "SpecModel", context: int):
        target, draft = model.target, model.draft
        own_head = getattr(draft, "lm_head", None)
        text, config = target.text_config, draft.config
        heads = text.num_attention_heads
        self._context, self._element = context, target.embed_tokens.weight.element_size()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        self._attention = {
            DECODER: (text.num_hidden_layers, heads, text.num_key_value_heads, head_dim),
            DRAFT_LAYER: (1, config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        }
        self._modules = {
            DECODER: [target.decoder],
            HEAD: [target.lm_head],
            DRAFT_LAYER: [*(layer for layer in draft.beside_layers() if layer is not own_head), *draft.layers],
        }
        self._head_shape = draft.proposed, text.hidden_size

    def of(self, part: str, rows: int) -> Cost:
        """A pass of `rows` rows: weights, keys and values once, and the arithmetic."""
        if part == DRAFT_HEAD:
            weights = self._head_shape[0] * self._head_shape[1]
            return Cost(weights * self._element, 2 * rows * weights)
        cost = pass_cost(self._modules[part], rows)
        if part in self._attention:
            cost += attention_cost(*self._attention[part], rows, self._context + rows, self._element)
        return cost


def round_passes(shape: TreeShape) -> list[tuple[int, str, int]]:
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


PartTimes = dict[tuple[str, int], tuple[int, float]]
"""(passes, seconds of all of them) in a round, by part and rows."""


def part_timer(model: "SpecModel", ids: "torch.Tensor") -> Callable[[], PartTimes]:
    """What times the parts of a round, each one alone, with embeddings and mask, as often as `run` times rounds."""
    import torch

    from vispec.model.drafts.base import Kept
    from vispec.model.drafts.pair_head import Expansions
    from vispec.model.tree import choose_nodes

    target, draft, shape = model.target, model.draft, model.shape
    output, layers, steps = draft.output(target), draft.aux_layers(target), new_steps(target)
    output.expect([1, shape.top_k])
    capacity = ids.shape[1] + max(shape.total_token, draft.reach(shape))
    with torch.inference_mode():
        cache, memory = target.new_cache(1, capacity), draft.memory(1, capacity, target)
        prompt = target.prefill(cache, ids, {}, layers)
        root = prompt.logits.argmax(-1)
        draft.read(memory, prompt)
        draft.extend(memory, Kept(prompt.features[:, -1:], root[:, None], torch.ones_like(root)))
        tree = choose_nodes(root, draft.candidates(memory, shape, output), shape)
        positions = cache.lengths[:, None] + tree.depths
        hidden = target.forward(cache, tree.tokens, positions, tree.mask).hidden
    passes: Counter[tuple[str, int]] = Counter()
    for number, part, rows in round_passes(shape):
        passes[part, rows] += number

    def passing(part: str, rows: int, number: int) -> "torch.Tensor":
        """So many passes of a part."""
        if part == DECODER:
            return target.forward(cache, tree.tokens, positions, tree.mask, layers).hidden
        if part == HEAD:
            return target.logits(hidden)
        estimates = memory.estimate[:, None].expand(-1, rows, -1)
        if part == DRAFT_HEAD:
            return [output.logits(estimates) for _ in range(number)][-1]
        expand, tokens = Expansions(draft, memory, TreeShape(2, number, rows)), root[:, None].expand(-1, rows)
        return [expand(estimates, tokens, None) for _ in range(number)][-1]

    @torch.inference_mode()
    def times() -> PartTimes:
        found = {}
        for (part, rows), number in (+passes).items():
            key = part, rows, number
            found[part, rows] = number, median(replayed(target, steps, key, partial(passing, *key), ROUNDS))
        return found

    return times


def new_steps(target: "Target") -> "Steps":
    """Steps over tensors of our own, captured where those of decoding are."""
    from vispec.model.graphs import Steps

    return Steps(target.device, target.can_capture)


def replayed(target: "Target", steps: "Steps", key: tuple, work: Callable, repeats: int, warm: bool = False):
    """Seconds of each of `repeats` runs of work over fixed tensors, as decoding runs its steps: replayed if it can be.

    Args:
        key: of the step, see `Steps.run`.
        warm: it has run before, under the same key.
    """
    from vispec.model.graphs import CAPTURED_USE

    with steps.alone:
        once = partial(steps.run, key, lambda: None, work)
        return timed(once, target.device, repeats, warm_ups=1 if warm else CAPTURED_USE)


def run(model: "SpecModel", ids: "torch.Tensor", speculate: bool) -> Run:
    """Answer a prompt (1, L) for WARM_UP_ROUNDS + ROUNDS rounds."""
    most = most_new_tokens(model.shape.levels if speculate else 0)
    rounds = model.stream(ids, speculate=speculate, max_new_tokens=most)
    result, before = Run(), 0.0
    for number, step in enumerate(islice(rounds, 1 + WARM_UP_ROUNDS + ROUNDS)):
        after = now()
        result.tokens += step.token_ids
        if number > WARM_UP_ROUNDS:
            result.seconds.append(after - before)
        before = after
    rounds.close()
    return result


def run_generate(model: "SpecModel", ids: "torch.Tensor") -> Run:
    """The same by transformers' own greedy generate()."""
    tokens, at = generate_greedily(model, {"input_ids": ids}, 1 + WARM_UP_ROUNDS + ROUNDS)
    steps = [after - before for before, after in zip(at[:-1], at[1:], strict=True)]
    return Run(tokens, steps[WARM_UP_ROUNDS:])


def most_new_tokens(levels: int) -> int:
    """A limit that no run reaches whose rounds accept up to `levels` draft tokens."""
    return 2 + (WARM_UP_ROUNDS + ROUNDS) * (levels + 1)


def verification_times(
    model: "SpecModel", ids: "torch.Tensor", sizes: Iterable[int], repeats: int
) -> dict[int, list[float]]:
    """Seconds of the target's pass over n tokens after the prompt, output head included, for each n in turn."""
    import torch

    target = model.target
    length, steps = ids.shape[1], new_steps(target)
    times: dict[int, list[float]] = {n: [] for n in sizes}
    target.expect(times)
    with torch.inference_mode():
        cache = target.new_cache(1, length + max(times))
        target.prefill(cache, ids, {})
        cache.used = length
        works = {n: verification(target, cache, n) for n in times}
        for _, _, n in turns(list(times), 1, repeats):
            times[n] += replayed(target, steps, ("verify", n, 1), works[n], repeats=1, warm=bool(times[n]))
    return times


def verification(target: "Target", cache, n: int) -> Callable[[], object]:
    """A pass over a chain of n tokens and the output head, always over the same tensors."""
    import torch

    steps = torch.arange(n, device=target.device)
    tokens, positions = torch.ones_like(steps)[None], (cache.used + steps)[None]
    chain = (steps[:, None] >= steps)[None] if n > 1 else None
    return lambda: target.logits(target.forward(cache, tokens, positions, chain).hidden)


def tree_building_times(model: "SpecModel", repeats: int) -> list[float]:
    """Seconds of growing a tree from logits that are there: top k, scores, the choice of nodes, mask and paths."""
    import torch

    from vispec.model.tree import choose_nodes, expand_levels

    shape, target = model.shape, model.target
    logits = torch.randn(1, shape.top_k, model.draft.proposed, device=model.device).to(target.dtype)
    output = model.draft.output(target)._replace(logits=lambda hidden: logits[:, : hidden.shape[1]])
    root = torch.zeros(1, dtype=torch.long, device=model.device)
    estimates = torch.zeros(1, 1, 1, device=model.device)

    @torch.inference_mode()
    def build():
        candidates = expand_levels(estimates, lambda hidden, tokens, parents: hidden, shape, output)
        return choose_nodes(root, candidates, shape)

    return replayed(target, new_steps(target), ("tree", 1, shape), build, repeats)
