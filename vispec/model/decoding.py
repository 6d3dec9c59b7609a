"""The decoding loop.

All prompts are read, one by one and without padding, into rows of one cache; then, while rows are left, a tree is
drafted, the target verifies it, a path is accepted and kept, and the rows' tokens go out. Plain decoding is the same
loop with a tree of one node. A row whose answer has ended leaves: the last row takes its place. A prompt may join
between any two rounds.

What is on the device is in `Rows`, what the host knows of an answer in `Answer`. A round has one transfer from the
device. All that the host tells a step is a bound of the lengths; where steps are captured it is rounded up, so that
shapes change rarely. Any number of generations can run side by side on one decoder, each in a seat of its own.

B rows, N nodes of a tree, D levels below its root, P pairs that the draft has not read, F numbers of a feature, V
vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from vispec.model.adaptive import AdaptiveTree
from vispec.model.batches import SinglePrompt
from vispec.model.drafts.base import Draft, Kept
from vispec.model.gaze import Gaze
from vispec.model.graphs import CAPTURED_USE
from vispec.model.policies import Policy
from vispec.model.reading import read_prompt
from vispec.model.rows import Answer, Round, Rows, Stop, Verified, drop_ended
from vispec.model.sampling import Choice, accept
from vispec.model.seats import Batch, Seat
from vispec.model.shape import TreeShape
from vispec.model.target import Target
from vispec.model.tree import Growth, Tree, choose_nodes

CAPACITY_AHEAD = 2048
"""New tokens for which a row has slots at first; where an answer needs more, its slots are doubled."""
BUCKET = 128
"""Lengths are rounded up to a multiple of so many where steps are captured; a graph serves all lengths of a bucket."""


class Decoder:
    """A target with a draft.

    Args:
        draft: None for plain decoding alone.
        skip_visual: threshold of `vispec.model.gaze`; None: no draft is skipped.
    """

    def __init__(self, target: Target, draft: Draft | None = None, skip_visual: float | None = None):
        self.target, self.draft = target, draft
        self.output = draft.output(target) if draft is not None else None
        self._layers = draft.aux_layers(target) if draft is not None else ()
        self._width = target.text_config.hidden_size * max(len(self._layers), 1)
        self._gaze = None if skip_visual is None or draft is None else Gaze(target, self._layers, skip_visual)
        self._watched = self._layers if self._gaze is None else self._gaze.watched
        self._bucket = BUCKET if target.can_capture else 1
        # where steps are captured, a seat waits for the next generation: its graphs know its tensors only
        self._idle: deque[Seat] = deque(maxlen=1)
        self.failed_captures = 0

    def rounds(
        self, prompts: Sequence[SinglePrompt], stops: Sequence[Stop], choice: Choice, policy: Policy
    ) -> Iterator[dict[int, Round]]:
        """Answer prompts; each item has the rows, counted as in `prompts`, that had not ended yet.

        The first item is what the prompts' own passes give, each further one is a round.
        """
        longest = max(
            ids.shape[1] + min(stop.max_new_tokens, CAPACITY_AHEAD)
            for (ids, _), stop in zip(prompts, stops, strict=True)
        )
        batch = self.open(len(prompts), longest, choice, policy)
        try:
            asked = enumerate(zip(prompts, stops, strict=True))
            yield {number: self.join(batch, number, prompt, stop) for number, (prompt, stop) in asked}
            while batch.answers:
                yield self.round(batch)
        finally:
            self.close(batch)

    def open(self, rows: int, tokens: int, choice: Choice, policy: Policy) -> Batch:
        """Room for so many answers at a time, of so many tokens with their prompts; more tokens are made room for."""
        with torch.inference_mode():
            return Batch(self._seat(rows, self._rounded(tokens) + self._reach(policy), policy), choice, policy)

    def join(self, batch: Batch, number: int, prompt: SinglePrompt, stop: Stop) -> Round:
        """Read a prompt; an answer that ends with its first token does not become a row.

        Args:
            number: what the answer is called from now on.
        """
        answer = Answer(number, stop, committed=prompt[0].shape[1] - 1, prompt=None)
        token = self._read_prompt(batch.seat, len(batch.answers), *prompt, batch.choice, answer)
        first = answer.take([token], accepted=0, levels=0)
        first.reused = answer.prompt.reused
        if not answer.ended:
            batch.answers.append(answer)
        self._follow(batch.seat)
        return first

    def round(self, batch: Batch) -> dict[int, Round]:
        """Go on with all answers, by one round or plain step; those that end leave."""
        seat, answers, choice, policy = batch.seat, batch.answers, batch.choice, batch.policy
        self._make_room(seat, answers, policy)
        rows, skipped = seat.part(len(answers)), all(answer.looks for answer in answers)
        shape = None if skipped else policy.shape()
        with seat.steps.alone:
            outcome = self._step(seat, rows, answers, choice, shape, bool(policy.shapes))
        levels = 0 if shape is None else seat.levels
        # the only transfer of a round from the device
        outcomes = outcome.tolist()
        step = {
            answer.row: answer.take(named[: accepted + 1], accepted, levels)
            for answer, (accepted, *named) in zip(answers, outcomes, strict=True)
        }
        if self._gaze is not None and policy.shapes:
            for answer, (*_, looks) in zip(answers, outcomes, strict=True):
                answer.looks = bool(looks)
        if not skipped:
            policy.learn(shape, step.values())
        drop_ended(seat.rows, answers)
        return step

    def close(self, batch: Batch) -> None:
        self.failed_captures += batch.seat.steps.take_failures()
        if self.target.can_capture:
            self._idle.append(batch.seat)

    @torch.inference_mode()
    def _step(
        self, seat: Seat, rows: Rows, answers: list[Answer], choice: Choice, shape: TreeShape | None, drafts: bool
    ) -> torch.Tensor:
        """A round, or a plain step: (B, 1 + tokens); behind a `Gaze` a last column says whether to skip the next."""
        if shape is not None:
            outcome = self._round(seat, rows, answers, choice, shape)
        else:
            outcome = self._plain_step(seat, rows, answers, choice, drafts)
        if self._gaze is None or not drafts:
            return outcome
        bound = self._set_bounds(rows, answers)
        slots = min(rows.cache.used + (1 if shape is None else shape.total_token), rows.cache.capacity)
        looks = seat.steps.run(("look", len(answers), None, slots), bound, self._gaze.look, rows, slots)
        return torch.cat([outcome, looks], dim=1)

    @torch.inference_mode()
    def _round(self, seat: Seat, rows: Rows, answers: list[Answer], choice: Choice, shape: TreeShape) -> torch.Tensor:
        """Draft a tree, verify it in one pass, keep one path (paper, section 3.1); returns (B, 1 + D + 1)."""
        self._read_prompts(seat, rows, answers)
        waiting = max(answer.waiting for answer in answers)
        if self.target.can_capture:
            waiting = seat.usual if waiting <= seat.usual else seat.most
        bound = self._set_bounds(rows, answers)
        run, size = seat.steps.run, len(answers)
        if isinstance(shape, AdaptiveTree):
            tree = self._draft_by_rule(seat, rows, bound, shape, waiting)
        else:
            tree = run(("draft", size, shape, rows.memory.used, waiting), bound, self._draft, rows, shape, waiting)
            seat.levels = shape.levels
        for answer in answers:
            answer.read += answer.waiting
        verified = run(("verify", size, shape, rows.cache.used), bound, self._verify, rows, tree)
        chosen = seat.steps.hold(("choose", size, shape), choice.choose(verified.logits, answers, tree))
        return run(("keep", size, shape), bound, self._keep, rows, tree, verified.features, chosen, shape)

    def _draft(self, rows: Rows, shape: TreeShape, waiting: int) -> Tree:
        """The draft reads what was kept and grows a tree."""
        self._extend(rows, waiting)
        return choose_nodes(rows.root, self.draft.candidates(rows.memory, shape, self.output), shape)

    def _extend(self, rows: Rows, waiting: int) -> tuple[()]:
        kept = rows.kept
        features = kept.features[:, :waiting, : self._width]
        self.draft.extend(rows.memory, Kept(features, kept.tokens[:, :waiting], kept.counts))
        return ()

    def _draft_by_rule(self, seat: Seat, rows: Rows, reset: Callable, shape: AdaptiveTree, waiting: int) -> Tree:
        """The same, but the host asks which level is the last one: where steps are captured, each is one."""
        size, memory, read = len(rows.root), rows.memory, rows.memory.used
        seat.steps.run(("extend", size, waiting, read), reset, self._extend, rows, waiting)

        def extended() -> None:
            memory.used = read + waiting  # a step that is replayed changes nothing on the host

        def run(name: str, step: Callable, *args):
            return seat.steps.run((name, size, (shape, read, waiting, growth.levels)), extended, step, *args)

        extended()
        growth = Growth(rows.notes, run if self.target.can_capture else None, seat.rehearsed)
        candidates = self.draft.candidates(memory, shape, self.output, growth)
        tree = run("tree", choose_nodes, rows.root, candidates, shape)
        seat.levels = growth.levels
        return seat.steps.hold(("tree", size, shape), tree)

    def _verify(self, rows: Rows, tree: Tree) -> Verified:
        """The target's pass over a tree."""
        tokens = tree.tokens.clamp(min=0)  # empty nodes go along as any token, nobody reads what they say
        return self._verified(rows, tokens, rows.positions(tree.depths), tree.mask)

    def _verified(self, rows: Rows, *given) -> Verified:
        hidden, features = self.target.forward(rows.cache, *given, self._watched)
        return Verified(self._to_keep(hidden, features), self.target.logits(hidden))

    def _to_keep(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return features if self._gaze is None else self._gaze.kept(hidden, features)

    def _keep(
        self, rows: Rows, tree: Tree, features: torch.Tensor, chosen: torch.Tensor, shape: TreeShape
    ) -> torch.Tensor:
        """Keep the path that the target named: (B, 1 + D + 1), its length, its tokens, and the next root."""
        accepted = accept(tree, chosen)
        path, counts, kept = accepted.path, accepted.count + 1, rows.kept
        rows.cache.keep(path[:, 1 : tree.tokens.shape[1]])
        rows.cache.commit(counts)
        rows.root.copy_(accepted.root)
        kept.features[:, : path.shape[1]] = features.gather(1, path[..., None].expand(-1, -1, features.shape[2]))
        kept.tokens[:, : path.shape[1]] = accepted.tokens
        kept.counts.copy_(counts)
        if isinstance(shape, AdaptiveTree):
            shape.learn(rows.notes, accepted.count)
        return torch.cat([accepted.count[:, None], accepted.tokens], dim=1)

    @torch.inference_mode()
    def _plain_step(self, seat: Seat, rows: Rows, answers: list[Answer], choice: Choice, drafts: bool):
        """A tree of one node: (B, 2). Where rounds with a draft may follow, `drafts`, they are told of it."""
        if drafts and max(answer.waiting for answer in answers) >= seat.most:
            self._catch_up(seat, rows, answers)
        bound = self._set_bounds(rows, answers)
        run, size = seat.steps.run, len(answers)
        verified = run(("plain", size, None, rows.cache.used), bound, self._verify_root, rows)
        chosen = seat.steps.hold(("choose", size, None), choice.choose(verified.logits, answers))
        return run(("add", size, drafts), bound, self._add, rows, verified.features, chosen, drafts)

    def _verify_root(self, rows: Rows) -> Verified:
        """A pass over the newest token; its cache is exact, and needs no mask, for one row of the true length."""
        root = rows.root[:, None]
        exact = self._bucket == 1 and len(root) == 1
        itself = None if exact else torch.ones_like(root, dtype=torch.bool)[:, None]
        return self._verified(rows, root, rows.positions(torch.zeros_like(root)), itself)

    def _add(self, rows: Rows, features: torch.Tensor, chosen: torch.Tensor, drafts: bool) -> torch.Tensor:
        rows.cache.commit(torch.ones_like(rows.root))
        rows.root.copy_(chosen[:, 0])
        if drafts:
            kept = rows.kept
            place = kept.counts[:, None]
            kept.features.scatter_(1, place[..., None].expand_as(features), features)
            kept.tokens.scatter_(1, place, chosen)
            kept.counts += 1
        return torch.cat([torch.zeros_like(chosen), chosen], dim=1)

    # --- before the first round ---

    def _seat(self, rows: int, capacity: int, policy: Policy) -> Seat:
        size = rows, capacity, policy.waiting
        try:
            seat = self._idle.pop()
        except IndexError:
            seat = self._new_seat(*size)
        if not seat.fits(*size):
            larger = map(max, size, (seat.size, seat.capacity, seat.waiting))
            del seat  # its memory may be needed
            seat = self._new_seat(*larger)
        if policy.shapes:
            if seat.rows.memory is None:
                seat.give_memory(self.draft.memory(seat.size, seat.capacity, self.target))
            seat.usual, seat.most = 1 + max(shape.levels for shape in policy.shapes), policy.waiting
            for shape in policy.shapes:
                self.draft.expect(rows, shape)
                self.output.expect([rows, rows * shape.top_k])
        self.target.expect(rows * nodes for nodes in (1, *(shape.total_token for shape in policy.shapes)))
        return seat

    def _new_seat(self, rows: int, capacity: int, waiting: int) -> Seat:
        width = self._width if self._gaze is None else self._gaze.states * self.target.text_config.hidden_size
        return Seat(self.target, rows, capacity, waiting, width, looks=self._gaze is not None)

    @torch.inference_mode()
    def _read_prompt(self, seat: Seat, place: int, input_ids, inputs, choice: Choice, answer: Answer) -> int:
        """Prefill; returns the first token, with which the last pair of the prompt waits for the draft."""
        row = seat.rows.part(place, place + 1)
        for store in row.stores:
            store.clear()
        answer.prompt = prompt = read_prompt(self.target, row.cache, input_ids, inputs, self._watched)
        with seat.steps.alone:
            row.root.copy_(choice.choose(prompt.logits[:, None], [answer])[:, 0])
        row.offset.copy_(0 if prompt.rope_delta is None else prompt.rope_delta)
        row.kept.features[:, 0] = self._to_keep(prompt.hidden[:, -1], prompt.features[:, -1])
        row.kept.tokens[:, 0] = row.root
        row.kept.counts.fill_(1)
        row.notes.zero_()
        if self._gaze is not None:
            answer.looks = self._gaze.read(row, prompt, self._width)
        return int(row.root)

    def _read_prompts(self, seat: Seat, rows: Rows, answers: list[Answer]) -> None:
        """Let the draft read the prompts that it has not read."""
        unread = [place for place, answer in enumerate(answers) if answer.prompt is not None]
        for place in unread:
            memory = rows.memory.part(place, place + 1)
            memory.used = 0  # the other rows' bound is none of this one
            answers[place].read = self.draft.read(memory, answers[place].prompt)
            answers[place].prompt = None
        if unread:
            self._follow(seat)

    def _follow(self, seat: Seat) -> None:
        """Steps that were captured over weights which have been moved since are void."""
        if self.target.can_capture:
            owners = [self.target.decoder, self.target.lm_head, self.draft]
            weights = (weight for owner in owners if isinstance(owner, nn.Module) for weight in owner.parameters())
            seat.follow((self.target.lean, *(weight.data_ptr() for weight in weights)))

    def _catch_up(self, seat: Seat, rows: Rows, answers: list[Answer]) -> None:
        """Let the draft read all that waits."""
        self._read_prompts(seat, rows, answers)
        self._set_bounds(rows, answers)
        kept = rows.kept
        self.draft.extend(rows.memory, Kept(kept.features[..., : self._width], kept.tokens, kept.counts))
        rows.kept.counts.zero_()
        for answer in answers:
            answer.read += answer.waiting
            answer.waiting = 0

    # --- lengths ---

    def _make_room(self, seat: Seat, answers: list[Answer], policy: Policy) -> None:
        """The one place where a seat grows: an answer is longer than CAPACITY_AHEAD."""
        reach = self._reach(policy)
        needed = self._rounded(max(answer.committed for answer in answers)) + reach
        if needed > seat.capacity:
            last = max(answer.committed + answer.stop.max_new_tokens - answer.new for answer in answers)
            seat.enlarge(min(2 * needed, self._rounded(last) + reach))

    def _reach(self, policy: Policy) -> int:
        """Slots that a round may need behind those of the text, in the target's cache or in the draft's memory."""
        return 1 + max([1, *(max(s.total_token, policy.waiting + self.draft.reach(s)) for s in policy.shapes)])

    def _set_bounds(self, rows: Rows, answers: list[Answer]) -> Callable[[], object]:
        """Tell cache and memory how far they are used; returns what does it again."""
        rows.cache.used = self._rounded(max(answer.committed for answer in answers))
        if rows.memory is not None:
            rows.memory.used = self._rounded(max(answer.read for answer in answers))
        return partial(self._set_bounds, rows, answers)

    def _rounded(self, length: int) -> int:
        return -(-length // self._bucket) * self._bucket

    # --- seats between generations ---

    def warm_up(self, policy: Policy, prompt_tokens: int, max_new_tokens: int, rows: int = 1) -> None:
        """Choose kernels, and capture all steps that answers of this size need; see `SpecModel.warmup`."""
        first, last = self._rounded(prompt_tokens), self._rounded(prompt_tokens + max_new_tokens)
        with torch.inference_mode():
            seat = self._seat(rows, last + self._reach(policy), policy)
            plain_too = policy.waiting > seat.usual  # rounds with a draft have plain steps among them
            # a draft may remember far less than the target: an image in a few places
            for read in range(0, last + 1, self._bucket):
                committed = max(read, first)
                for _ in range(CAPTURED_USE):
                    for drafts in {False, plain_too}:
                        self._rehearse(seat, rows, None, committed, read, drafts=drafts)
                    for shape in policy.shapes:
                        for waiting in {seat.usual, policy.waiting}:
                            all_levels = self.target.can_capture and isinstance(shape, AdaptiveTree)
                            for seat.rehearsed in range(1, shape.levels + 1) if all_levels else [None]:
                                self._rehearse(seat, rows, shape, committed, read, waiting)
                if not self.target.can_capture:
                    break
            seat.rehearsed = None
            for store in seat.rows.stores:
                store.clear()
        self.failed_captures += seat.steps.take_failures()
        if self.target.can_capture:
            self._idle.append(seat)

    def _rehearse(
        self,
        seat: Seat,
        size: int,
        shape: TreeShape | None,
        committed: int,
        read: int,
        waiting: int = 1,
        drafts: bool = False,
    ) -> None:
        """A round of rows that hold nothing, as if they held texts of these lengths."""
        rows, stop = seat.part(size), Stop(1, frozenset())
        answers = [Answer(row, stop, committed, None, read, waiting) for row in range(size)]
        if rows.memory is not None:
            rows.memory.clear()
        for tensor in (rows.cache.lengths, rows.kept.counts):
            tensor.fill_(1)
        with seat.steps.alone:
            self._step(seat, rows, answers, Choice(), shape, drafts or shape is not None)

    def free(self) -> None:
        """Give back the memory that waits for the next generation."""
        self._idle.clear()
