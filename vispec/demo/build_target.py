"""Train the embedded default's target from nothing, or a small VLM that drafts for it.

python -m vispec.demo.build_target --out DIR [--family qwen]
python -m vispec.demo.build_target --out DIR --size small --processor TARGET

First come the tokenizer, from the corpus, and the vision tower, as a classifier (see `vispec.demo.tower`). Then the
decoder is trained with the tower frozen: on bare lists of what lies where until it looks at the picture, then on
conversations. It starts shallow and grows: each growth puts copies behind every layer, their two output projections
zeroed, so that the function stays what it was while the depth multiplies. That sees about twice as many samples in the
same time.

The same command goes on where an interrupted one stopped.
"""

import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from vispec.cli import Parser, UserError, count, run_cli
from vispec.demo.batches import IGNORED, Batch, Stream
from vispec.demo.conversations import training_conversation
from vispec.demo.families import FAMILIES, SMALL, Family, Sizes
from vispec.demo.quiz_accuracy import quiz_accuracy
from vispec.demo.tower import fit_projector, train_tower
from vispec.evaluation.loading import quiet_transformers
from vispec.files import write_atomic, write_json_atomic

CHECKPOINT, PROCESSOR, MODEL = "checkpoint.pt", "processor", "model"
MATRIX_LR, OTHER_LR = 3e-3, 1.2e-3
LAST_LR, WARMUP, RAMP_STEPS = 0.04, 0.02, 60
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Recipe:
    """What is spent on each part."""

    minutes: float = 115.0
    """Wall time of everything but the tokenizer; the learning rate and the growth follow it."""
    steps: int | None = None
    """Decoder steps instead of `minutes`, for a run that can be repeated."""
    corpus: int = 6000
    """Conversations that the tokenizer is trained on."""
    tower_steps: int = 800
    projector_steps: int = 200
    stages: tuple[tuple[int, float], ...] = ((6, 0.25), (12, 0.54), (24, 1.0))
    """Decoder layers, until this fraction of the decoder's time."""
    batch_tokens: int = 3072
    dtype: str = "bfloat16"
    """Of the decoder's matrix products in training; weights and optimizer are float32."""
    save_every: float = 180.0
    """Seconds."""
    log_every: float = 20.0
    """Seconds."""
    look_every: float = 180.0
    """Seconds after which it is tried what the decoder sees in new pictures."""

    def layers_at(self, fraction: float) -> int:
        return next((layers for layers, until in self.stages if fraction < until), self.stages[-1][0])


RECIPES: dict[str, tuple[Sizes, Recipe]] = {
    "full": (Sizes(), Recipe()),
    # a narrow tower needs more steps, and each takes less time
    "small": (SMALL, Recipe(minutes=25.0, tower_steps=1600, stages=((2, 0.4), (4, 1.0)))),
}

@dataclass
class Progress:
    """Where the training stands; `elapsed` and `tower_elapsed` are seconds of its own work."""

    layers: int
    step: int = 0
    pool: int = 0
    batch: int = 0
    samples: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    tower_elapsed: float = 0.0
    tower_accuracy: float = 0.0
    grown_at: int = 0


class Training:
    """Model, optimizer and progress, and the way they are written down and read again."""

    def __init__(
        self,
        family: Family,
        recipe: Recipe,
        out: Path,
        device: str,
        log: Callable[[str], None],
        processor: Path | None = None,
    ):
        self.family, self.recipe, self.out, self.device, self.log = family, recipe, out, device, log
        self.processor = self._processor(processor)
        torch.manual_seed(0)
        path = out / CHECKPOINT
        saved = torch.load(path, map_location=device, weights_only=True) if path.exists() else None
        if saved and saved["family"] != family.name:
            raise UserError(f"{path} is a checkpoint of the family {saved['family']}, asked for is {family.name}")
        self.progress = Progress(**saved["progress"]) if saved else Progress(recipe.stages[0][0])
        self.model = family.model(self.processor.tokenizer, self.progress.layers).to(device)
        if saved:
            self.model.load_state_dict(saved["model"])
            log(f"resumed at step {self.progress.step}, {self.progress.elapsed:.0f}s")
        else:
            start_decoder(family, self.model)
        self.optimizers = make_optimizers(family, self.model)
        if saved and saved["optimizers"]:
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)

    def run(self) -> None:
        if not self.progress.elapsed:
            self._train_eyes()
        self._train_decoder()
        self._publish()

    def _processor(self, other: Path | None):
        """The one of an earlier start, else that of another model, else one around a tokenizer of its own."""
        folder = self.out / PROCESSOR
        if not folder.exists() and other is not None:
            write_folder(folder, transformers.AutoProcessor.from_pretrained(other).save_pretrained)
        elif not folder.exists():
            conversations = (training_conversation("train", i) for i in range(self.recipe.corpus))
            texts = ("".join(text for text, _ in self.family.pieces(talk)) for talk in conversations)
            processor = self.family.processor(self.family.tokenizer(texts))
            write_folder(folder, processor.save_pretrained)
        return transformers.AutoProcessor.from_pretrained(folder)

    def _train_eyes(self) -> None:
        started, recipe, progress = time.monotonic(), self.recipe, self.progress
        tower = self.family.tower(self.model).requires_grad_(True)
        arguments = (self.family, self.model, self.processor)
        progress.tower_accuracy = train_tower(*arguments, recipe.tower_steps, self.log)
        tower.requires_grad_(False)
        fit_projector(*arguments, recipe.projector_steps, self.log)
        self.model.zero_grad()  # the tower's last gradients would count when the decoder's are clipped
        progress.elapsed = progress.tower_elapsed = time.monotonic() - started
        self._checkpoint(with_optimizers=False)

    def _train_decoder(self) -> None:
        progress, recipe = self.progress, self.recipe
        stream = Stream(self.family, self.processor, recipe.batch_tokens)
        on_gpu = self.model.device.type != "cpu"
        batches = (stream.prefetched if on_gpu else stream.batches)(progress.pool, progress.batch)
        mark = last_log = last_save = last_look = time.monotonic()
        average = None
        while (fraction := self._fraction()) < 1:
            if recipe.layers_at(fraction) > progress.layers:
                self._grow(recipe.layers_at(fraction))
            progress.pool, progress.batch, batch = next(batches)
            rate = schedule(fraction, progress.step - progress.grown_at)
            loss = self._step(batch, rate)
            progress.step += 1
            progress.samples += batch.samples
            progress.tokens += batch.input_ids.numel()
            average = loss if average is None else 0.95 * average + 0.05 * loss
            now = time.monotonic()
            progress.elapsed, mark = progress.elapsed + now - mark, now
            if now - last_log >= recipe.log_every or progress.step == 1:
                self.log(
                    f"step {progress.step} loss {loss:.4f} mean {average:.4f} rate {rate:.3f} layers {progress.layers} "
                    f"samples {progress.samples} tokens {progress.tokens} elapsed {progress.elapsed:.0f}s"
                )
                last_log = now
            if now - last_save >= recipe.save_every:
                self._checkpoint()
                last_save = now
            if now - last_look >= recipe.look_every:
                self._log_lookups(stream)
                last_look = now
        self._checkpoint()
        self._log_lookups(stream)

    def _fraction(self) -> float:
        """How much of the decoder's training is done."""
        progress, recipe = self.progress, self.recipe
        if recipe.steps is not None:
            return progress.step / recipe.steps
        return (progress.elapsed - progress.tower_elapsed) / (60 * recipe.minutes - progress.tower_elapsed)

    def _grow(self, layers: int) -> None:
        self.progress.layers, self.progress.grown_at = layers, self.progress.step
        self.model = grow(self.family, self.model, self.processor.tokenizer, layers)
        self.optimizers = make_optimizers(self.family, self.model)
        self.log(f"grown to {layers} layers at step {self.progress.step}")

    def _step(self, batch: Batch, rate: float) -> float:
        with torch.autocast(self.model.device.type, PRECISIONS[self.recipe.dtype]):
            loss = batch_loss(self.family, self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def _log_lookups(self, stream: Stream) -> None:
        by_place, by_name = (quiz_accuracy(stream, self.model, by_place) for by_place in (True, False))
        self.log(f"lists of new pictures: what lies in a place {by_place:.2f} right, where a thing lies {by_name:.2f}")

    def _checkpoint(self, with_optimizers: bool = True) -> None:
        state = {
            "family": self.family.name,
            "model": self.model.state_dict(),
            "progress": asdict(self.progress),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers] if with_optimizers else None,
        }
        write_atomic(self.out / CHECKPOINT, lambda file: torch.save(state, file))

    def _publish(self) -> None:
        """The folder that from_pretrained reads, in bfloat16, and a report of what made it."""
        report = {
            "family": self.family.name,
            **asdict(self.progress),
            "recipe": asdict(self.recipe),
            "device": self.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }

        def fill(folder: Path) -> None:
            self.model.to(torch.bfloat16).save_pretrained(folder)
            self.processor.save_pretrained(folder)
            write_json_atomic(folder / "training.json", report)

        write_folder(self.out / MODEL, fill)
        self.log(f"written to {self.out / MODEL} after {self.progress.elapsed:.0f}s of training")


def grow(family: Family, small, tokenizer, layers: int):
    """A model of `layers` layers that computes exactly what `small` does."""
    grown = family.model(tokenizer, layers).to(small.device)
    old_layers, new_layers = family.decoder_layers(small), family.decoder_layers(grown)
    copies = layers // len(old_layers)
    prefix = next(name for name, module in small.named_modules() if module is old_layers) + "."
    state = {name: value for name, value in small.state_dict().items() if not name.startswith(prefix)}
    missing, surplus = grown.load_state_dict(state, strict=False)
    if surplus or any(not name.startswith(prefix) for name in missing):
        raise RuntimeError(f"growth does not fit: missing {missing}, surplus {surplus}")
    for i, layer in enumerate(new_layers):
        layer.load_state_dict(old_layers[i // copies].state_dict())
        if i % copies:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return grown


def start_decoder(family: Family, model) -> None:
    """Start values with which the decoder soon finds out where to look.

    The usual standard deviation of 0.02 is made for wide models: 192 wide, attention would begin all but uniform.
    Queries begin equal to the keys that they meet, so that tokens attend to what is like them, and the output head
    equal to the embedding, so that what is attended to tends to be said.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    deviation = embedding.shape[1] ** -0.5
    torch.nn.init.normal_(embedding, std=deviation)
    with torch.no_grad():
        head.copy_(embedding)
        for layer in family.decoder_layers(model):
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    torch.nn.init.normal_(module.weight, std=deviation)
            attention = layer.self_attn
            keys = attention.k_proj.weight.unflatten(0, (-1, attention.head_dim))
            groups = attention.q_proj.weight.shape[0] // attention.k_proj.weight.shape[0]
            attention.q_proj.weight.copy_(keys.repeat_interleave(groups, 0).flatten(0, 1))


def make_optimizers(family: Family, model) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices, AdamW for all the rest but the tower, which is frozen; vectors do not decay."""
    family.tower(model).requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in family.decoder_layers(model).parameters() if parameter.dim() == 2]
    in_muon = set(map(id, matrices))
    rest = [parameter for parameter in trained if id(parameter) not in in_muon]
    groups = [
        {"params": [parameter for parameter in rest if parameter.dim() > 1], "peak": OTHER_LR, "weight_decay": 0.05},
        {"params": [parameter for parameter in rest if parameter.dim() <= 1], "peak": OTHER_LR, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon([{"params": matrices, "peak": MATRIX_LR}], weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.98)),
    ]


def schedule(fraction: float, steps_since_growth: int) -> float:
    """Factor of the learning rates: cosine over the budget, with a warm-up, and a short ramp after each growth."""
    warm = min(1.0, (fraction + 1e-4) / WARMUP)
    cosine = LAST_LR + (1 - LAST_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return warm * cosine * min(1.0, (1 + steps_since_growth) / RAMP_STEPS)


def batch_loss(family: Family, model, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the scored tokens. Padding is on the right, so no mask is needed."""
    device = model.device
    images = family.image_inputs(batch.pixels.to(device)) if batch.pixels is not None else {}
    logits = model(input_ids=batch.input_ids.to(device), use_cache=False, **images).logits
    labels = batch.labels[:, 1:].to(device)
    scored = labels != IGNORED
    return F.cross_entropy(logits[:, :-1][scored].float(), labels[scored])


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a folder beside the final one, then put it in place."""
    beside = folder.with_name(f".{folder.name}.part")
    for leftover in (beside, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    fill(beside)
    os.replace(beside, folder)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo.build_target", description="Train the demo's target from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and the final model/")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llava")
    parser.add_argument("--size", choices=tuple(RECIPES), default="full", help="small: one that drafts for a full one")
    parser.add_argument("--processor", type=Path, help="folder of a model whose processor and tokenizer it gets")
    minutes = ", ".join(f"{recipe.minutes:g} for {size}" for size, (_, recipe) in RECIPES.items())
    parser.add_argument("--minutes", type=float, help=f"wall time (default: {minutes})")
    parser.add_argument("--steps", type=count, help="decoder steps instead of --minutes, for a repeatable run")
    parser.add_argument("--dtype", choices=tuple(PRECISIONS), default=Recipe.dtype, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        with (args.out / "train.log").open("a") as file:
            file.write(line + "\n")

    quiet_transformers()
    sizes, recipe = RECIPES[args.size]
    minutes = recipe.minutes if args.minutes is None else args.minutes
    recipe = replace(recipe, minutes=minutes, steps=args.steps, dtype=args.dtype)
    Training(FAMILIES[args.family](sizes), recipe, args.out, args.device, log, args.processor).run()
    return 0


if __name__ == "__main__":
    run_cli(main)
