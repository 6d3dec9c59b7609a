"""The training loop of both stages.

A step's loss is the mean over all scored pairs of all its samples, however these are divided into batches, accumulated
batches and processes: every process knows the step's number of pairs before its first backward pass, and
gradients are summed.
"""

import math
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from vispec.files import write_atomic
from vispec.model.drafts import BaseHead
from vispec.model.drafts.checkpoints import own_tensors
from vispec.model.pairs import PairLayout
from vispec.train.chain import count_in_a_row, draft_chain, drafted_in_a_row
from vispec.train.losses import chunk_rows, summed_loss
from vispec.train.metrics import DEPTH, MetricsLog, Sums
from vispec.train.nonfinite import gradient_norm, spoiled_samples
from vispec.train.processes import Processes
from vispec.train.recipe import Recipe, schedule
from vispec.train.samples import Batch, SampleFiles, collate, epoch_groups, micro_batches, without_tracebacks
from vispec.train.states import (
    RESUME_FILE,
    RESUME_FORMAT,
    check_moments,
    check_weights,
    prune_states,
    read_resume,
    refuse_others,
    remove_leftovers,
    write_state,
)
from vispec.train.target_weights import tables_digest

if TYPE_CHECKING:  # the target's code takes seconds to import, and training on stored features does without
    from vispec.train.online import OnlineFeatures

DRAFTS_EVERY = 25
"""Steps of training between two whose drafts are followed: that takes several passes of the head."""


class Trainer:
    """Trains a draft head.

    Args:
        head: in float32; changed in place.
        lm_head: (V, H) the target's output head.
        train, held_out: sample files.
        folder: of checkpoints, metrics and the state to resume from.
        identity: arguments that a run to be resumed must share.
        online: computes the features where `train` and `held_out` are a `TokenFolder`.
    """

    def __init__(
        self,
        head: BaseHead,
        lm_head: torch.Tensor,
        train: SampleFiles,
        held_out: SampleFiles,
        recipe: Recipe,
        folder: Path,
        processes: Processes,
        identity: dict,
        online: "OnlineFeatures | None" = None,
    ):
        self.recipe, self.folder, self.processes, self.identity = recipe, folder, processes, identity
        self.train_set, self.held_out_set, self.online = train, held_out, online
        self.head = head.to(processes.device).train()
        self.lm_head = lm_head.to(processes.device)
        self.parameters = [p for p in self.head.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        self.group_size = recipe.batch_size * recipe.accumulation * processes.count
        self.steps_per_epoch = len(self.groups(0))
        self.epoch, self.step_in_epoch, self.sums = 0, 0, Sums()
        self.seconds = 0.0
        """What the epoch's steps have taken so far, also before an interruption."""
        self.describe: Callable[[BaseHead, int, dict], str] | None = None
        """Writes the model card of a head after an epoch, given that epoch's line of metrics."""

    # --- one optimizer step ---

    def layout(self, batch: Batch) -> PairLayout | None:
        """Which pairs the head runs on; None: those that images and lengths alone decide."""
        return None

    def outputs(self, batch: Batch) -> torch.Tensor:
        """(S, M, H): the chain's outputs at the scored pairs."""
        sample = batch.hidden, batch.embeds(self._table), batch.images, batch.lengths
        outs = draft_chain(self.head, *sample, self.recipe.mtp_steps, self.layout(batch))
        return torch.stack([out.flatten(0, 1)[batch.scored] for out in outs], dim=1)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed over the scored pairs: the loss with its gradient, and its parts."""
        with self.processes.precision():
            return summed_loss(self.recipe.objective, self.outputs(batch), batch.targets, self.lm_head)

    def accumulate(self, batches: list[Batch]) -> Sums:
        """Add the gradients of this process's part of one step, and sum them over all processes.

        Returns:
            The sums of the whole step, in every process the same.

        Raises:
            ValueError: loss or gradient is not finite, in whichever process: all raise it together.
        """
        pairs = self.processes.sum(torch.tensor(sum(len(b.scored) for b in batches))).item()
        steps = self.recipe.mtp_steps + 1
        follow_drafts = self.steps_done % DRAFTS_EVERY == 0
        sums = Sums()
        for batch in batches:
            batch = batch.to(self.processes.device, torch.float32)
            loss, parts = self.loss(batch)
            (loss / max(pairs * steps, 1)).backward()
            sums.add(parts, len(batch.scored), steps, len(batch.lengths))
            if follow_drafts:
                sums.add_drafts(*self._drafts(batch))
        for parameter in self.parameters:
            if parameter.grad is None:  # the image parameters in a step without images
                parameter.grad = torch.zeros_like(parameter)
        self.processes.sum_gradients(self.parameters)
        sums = Sums(self.processes.sum(sums.values).tolist())
        norm = gradient_norm(self.parameters)
        sums.add_gradient_norm(norm)
        # both are sums over all processes, so that these agree without asking each other
        if not (math.isfinite(sums.loss) and math.isfinite(norm)):
            self._stop(batches, "gradient" if math.isfinite(sums.loss) else "loss")
        return sums

    def update(self, step: int) -> None:
        """Clip, apply and clear the gradients."""
        if self.recipe.clip_norm is None:
            torch.nn.utils.clip_grad_value_(self.parameters, self.recipe.clip_value)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _rate(self, step: int) -> float:
        return self.recipe.lr * schedule(step, self.steps_per_epoch, self.recipe.epochs)

    # --- epochs ---

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    @property
    def skipped(self) -> int:
        """Samples that are left out."""
        return sum(len(samples) - len(samples.kept) for samples in (self.train_set, self.held_out_set))

    def run(self) -> None:
        """Train to the last epoch, from wherever `resume` has put us.

        An epoch's last step is on disk before the evaluation begins: what goes wrong there does not cost the epoch.
        """
        log = None
        if self.processes.is_main:
            remove_leftovers(self.folder)
            log = MetricsLog(self.folder, self.recipe.report_to, self.epoch, self.steps_done)
        while self.epoch < self.recipe.epochs:
            self._train_epoch(log)
            train, seconds = self.sums.summary(), self.seconds
            held_out = self.evaluate()
            self.epoch, self.step_in_epoch, self.sums, self.seconds = self.epoch + 1, 0, Sums(), 0.0
            if not log:
                continue
            line = {
                "step": self.steps_done,
                "train": train,
                "held_out": held_out.summary() if held_out.pairs else None,
                "lr": self._rate(self.steps_done - 1),
                "seconds": round(seconds, 2),
                "samples_per_second": round(train["samples"] / seconds, 2),
            }
            if self.describe:
                self.head.card = self.describe(self.head, self.epoch, line)
            if self.epoch % self.recipe.save_every == 0 or self.epoch == self.recipe.epochs:
                write_state(self.head, self.folder, self.epoch, self.recipe)
                prune_states(self.folder, self.recipe.keep, self.epoch)
            log.epoch(self.epoch, line)
            self.save()
            print(_describe(self.epoch, self.recipe.epochs, line), flush=True)

    def groups(self, epoch: int) -> list[list[int]]:
        """The samples of each step of an epoch, as many steps in each."""
        return epoch_groups(self.train_set.lengths, self.group_size, self.recipe.seed, epoch)

    def _train_epoch(self, log: MetricsLog | None) -> None:
        from tqdm import tqdm

        kept = set(self.train_set.kept)
        groups = [
            [index for index in group if index in kept] for group in self.groups(self.epoch)[self.step_in_epoch :]
        ]
        mine = [
            micro_batches(group, self.recipe.batch_size, self.processes.index, self.processes.count) for group in groups
        ]
        keys = [[(index, self.epoch) for index in batch] for batches in mine for batch in batches]
        loaded = iter(self._loader(self.train_set, keys))
        bar = tqdm(
            total=self.steps_per_epoch,
            initial=self.step_in_epoch,
            unit="step",
            desc=f"epoch {self.epoch + 1}/{self.recipe.epochs}",
            disable=not self.processes.is_main,
            mininterval=1,
            leave=False,
        )
        started = time.perf_counter() - self.seconds
        for group, batches in zip(groups, mine, strict=True):
            sums = self.accumulate(list(islice(loaded, len(batches)))) if group else Sums()
            if group:  # not all of them skipped
                self.update(self.steps_done)
            self.sums.values += sums.values
            self.step_in_epoch += 1
            self.seconds = time.perf_counter() - started
            bar.update(1)
            shown = self.sums.summary()
            per_second = bar.format_dict["rate"] or 0
            bar.set_postfix(
                {
                    "loss": f"{sums.loss:.3f}",
                    "top1": f"{shown['top1']:.3f}",
                    "samples/s": f"{per_second * len(group):.1f}",
                },
                refresh=False,
            )
            if log and log.writer:
                log.step(self.steps_done, sums.summary() | {"lr": self._rate(self.steps_done - 1)})
            due = self.recipe.save_steps and self.step_in_epoch % self.recipe.save_steps == 0
            if due or self.step_in_epoch == self.steps_per_epoch:
                self.save()
        bar.close()

    @torch.no_grad()
    def evaluate(self) -> Sums:
        """Losses and accuracies on the held-out samples.

        Raises:
            ValueError: a loss is not finite, in whichever process: all raise it together.
        """
        sums, spoiled = Sums(), []
        samples = self.held_out_set
        order = sorted(samples.kept, key=lambda i: samples.lengths[i])
        mine = micro_batches(order, self.recipe.batch_size, self.processes.index, self.processes.count)
        self.head.eval()
        for batch in self._loader(self.held_out_set, [[(i, None) for i in batch] for batch in mine]):
            batch = batch.to(self.processes.device, torch.float32)
            loss, parts = self.loss(batch)
            if not loss.isfinite():
                with torch.enable_grad():
                    spoiled += spoiled_samples([batch], lambda one: self.loss(one)[0], self.parameters)
            sums.add(parts, len(batch.scored), self.recipe.mtp_steps + 1, len(batch.lengths))
            sums.add_drafts(*self._drafts(batch))
        self.head.train()
        sums = Sums(self.processes.sum(sums.values).tolist())
        if not math.isfinite(sums.loss):
            names = ", ".join(sorted(self.processes.gather(spoiled)))
            raise ValueError(
                f"the loss of held-out samples is not finite in {names}; the state after this epoch's steps is in "
                f"{self.folder / RESUME_FILE}, from which --skip goes on without them"
            )
        return sums

    def drafted(self, batch: Batch) -> Iterable[torch.Tensor]:
        """Up to DEPTH outputs (S, H): the m-th at a scored pair is that of the draft whose m-th token it predicts."""
        sample = batch.hidden, batch.embeds(self._table), batch.images, batch.lengths
        outs = drafted_in_a_row(self.head, *sample, DEPTH, self.layout(batch))
        return (out.flatten(0, 1)[batch.scored] for out in outs)

    @torch.no_grad()
    def _drafts(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        shape = batch.ids.shape
        choice = self._tokens(batch.targets)
        right = torch.zeros(DEPTH, shape.numel(), dtype=torch.bool, device=choice.device)
        with self.processes.precision():
            for m, out in enumerate(self.drafted(batch)):
                right[m, batch.scored] = self.drafted_tokens(out) == choice
        along, scored = torch.zeros_like(right[0]), torch.zeros_like(right[0])
        scored[batch.scored] = True
        along[batch.scored] = batch.ids.flatten()[batch.scored + 2] == choice
        return count_in_a_row(right.view(DEPTH, *shape), along.view(shape), scored.view(shape))

    def drafted_tokens(self, outs: torch.Tensor) -> torch.Tensor:
        """(S,) the token that each output (S, H) proposes first."""
        return self._tokens(outs)

    def _tokens(self, features: torch.Tensor) -> torch.Tensor:
        chunks = features.split(chunk_rows(features.device.type, self.lm_head.shape[0], 1))
        return torch.cat([(c.to(self.lm_head.dtype) @ self.lm_head.T).argmax(-1) for c in chunks])

    @property
    def _table(self) -> torch.Tensor:
        return self.head.embed_tokens.weight

    def _loader(self, dataset: SampleFiles, keys: list) -> Iterable[Batch]:
        loader = DataLoader(
            dataset,
            batch_sampler=keys,
            collate_fn=list if self.online else collate,
            num_workers=self.recipe.workers,
            pin_memory=self.processes.device.type == "cuda",
        )
        read = without_tracebacks(loader)
        return map(self.online.batch, read) if self.online else read

    # --- interruption ---

    def save(self) -> None:
        """Everything that a run needs to go on from here, as one file that appears whole or not at all."""
        if not self.processes.is_main:
            return
        vocabulary = self.head.draft_vocab
        state = {
            "format": RESUME_FORMAT,
            "identity": self.identity,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "sums": self.sums.values.tolist(),
            "seconds": self.seconds,
            "head": own_tensors(self.head),
            "draft_vocab": vars(vocabulary) if vocabulary else None,
            "moments": self.optimizer.state_dict()["state"],
        }
        write_atomic(self.folder / RESUME_FILE, lambda file: torch.save(state, file))

    def resume(self, state: dict | None = None) -> bool:
        """Go on with the run that `folder` holds, if it holds one.

        Args:
            state: what `read_resume` gives, where it has been read already.

        Raises:
            ValueError: it is a run of another command or of another version, its file is damaged, or the processes have
                found different ones.
        """
        state = state or read_resume(self.folder)
        if state is not None:
            path = self.folder / RESUME_FILE
            refuse_others(self.folder, state["identity"], self.identity)
            if state["step_in_epoch"] > self.steps_per_epoch or state["epoch"] > self.recipe.epochs:
                raise ValueError(
                    f"{path}: epoch {state['epoch']}, step {state['step_in_epoch']}; the run has {self.recipe.epochs} "
                    f"epochs of {self.steps_per_epoch} steps"
                )
            check_weights(path, state["head"], own_tensors(self.head))
            begun = state["epoch"] > 0 or Sums(state["sums"]).pairs > 0  # steps may have been skipped
            check_moments(path, state["moments"], self.parameters, begun)
            self.head.load_state_dict(state["head"], strict=False)  # all but the target's own table
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["moments"], "param_groups": groups})
            self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
            self.sums, self.seconds = Sums(state["sums"]), state["seconds"]
        if self.processes.count > 1:
            here = (self.epoch, self.step_in_epoch, tables_digest(*(t.cpu() for t in self.head.state_dict().values())))
            first, *others = self.processes.gather([here])
            if any(other != first for other in others):
                raise ValueError(
                    f"--cpdir {self.folder}: the processes would go on from different states; all of them have to see "
                    "one folder"
                )
        return state is not None

    def _stop(self, batches: list[Batch], what: str) -> None:
        """Save the state before this step and name the samples that spoil it; called by all processes together."""
        self.optimizer.zero_grad()
        self.save()
        moved = (batch.to(self.processes.device, torch.float32) for batch in batches)
        # after this exchange the state is on disk, and a process that ends first may take the others with it
        names = self.processes.gather(spoiled_samples(moved, lambda batch: self.loss(batch)[0], self.parameters))
        everyone = self.processes.gather([name for batch in batches for name in batch.names])
        where = ", ".join(sorted(names)) or f"the step of {', '.join(sorted(everyone))}, in none of these alone"
        raise ValueError(
            f"the {what} is not finite in {where}; the state before this step is in {self.folder / RESUME_FILE}, from "
            "which --skip goes on without them"
        )


def _describe(epoch: int, epochs: int, line: dict) -> str:
    train, held_out = line["train"], line["held_out"]
    text = f"epoch {epoch}/{epochs}: loss {train['loss']:.4f}, top1 {train['top1']:.3f}"
    if held_out:
        drafts = f", in a row {held_out.get('tau_of_chain', 0):.2f} of {DEPTH}"
        text += f"; held out: loss {held_out['loss']:.4f}, top1 {held_out['top1']:.3f}{drafts}"
    else:
        text += "; held out: nothing that is scored"
    return f"{text}; {line['samples_per_second']} samples/s, {line['seconds']} s"
