"""Training on a GPU: data generation, both stages in bfloat16, and a training that goes on after kill -9.

sh scripts/gpu_check.sh --train                                        # LLaVA-1.6 7B's sizes, at most six minutes
python scripts/gpu_train_check.py --size tiny --device cpu             # tries the script itself without a GPU

The target has random weights, and the rows are random tokens and pixels, so that neither `datasets` nor `fschat` nor a
download is needed; answers, features and trainings are the commands' own code. Every part is a process of its own, so
the table is printed whatever happens. Of the target, training gets a folder with the two tables that it reads.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_check import environment, in_a_process

from vispec.cli import device_name, run_cli
from vispec.files import write_json_atomic

NAME = "llava-v1.6-vicuna-7b-hf"
TINY = {
    "text": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
    "other": {"image_token_index": 511, "image_grid_pinpoints": [[56, 56]]},
}
TINY["text"]["vocab_size"], TINY["vision"]["image_size"] = 512, 28
"""What `--size tiny` changes of that target's config."""
ANSWERED_TOGETHER = 16
EPOCHS = 2
KILLED, RESUMED = "stage 2, killed", "stage 2, resumed"
LEAST_AGREEING = {"7b": 0.8, "tiny": 1.0}
"""Share of the answers' tokens that features of one pass predict too; in bfloat16 rounding decides near-ties."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    out, started = Path(args.out), time.monotonic()
    if args.part is not None:
        found = make_data(args, out) if args.part == "data" else run_training(args.part, args.arguments)
        write_json_atomic(args.json, found)
        return 0
    if out.exists():
        raise ValueError(f"--out {out}: there already, and parts of another run would be gone on with; remove it")
    out.mkdir(parents=True)
    found, failed = {}, {}
    for name, command in commands(args, out).items():
        log, limit = out / f"{name}.log", max(args.limit - (time.monotonic() - started), 1)
        run = partial(killed, state=out / "killed" / "resume.pt") if name == KILLED else in_a_process
        if reason := run(command, log, limit):
            failed[name] = reason
        elif name != KILLED:
            found[name] = json.loads((out / f"{name}.json").read_text())
        print(f"{name}: {reason or 'done'}, {time.monotonic() - started:.0f} s since the start", flush=True)
    wrong = [f"{name}: {reason}" for name, reason in failed.items()] or what_is_wrong(args, found["data"], out)
    print("\n".join([*report(args, found, out), *(f"- {one}" for one in wrong)]))
    return 1 if wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=("7b", "tiny"), default="7b", help="of the target (%(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--samples", type=int, default=64, help="of text, and as many of images (%(default)s)")
    add("--new-tokens", type=int, default=64, help="of an answer (%(default)s)")
    add("--text-tokens", type=int, default=600, help="of a conversation, 100 of them the prompt (%(default)s)")
    add("--limit", type=float, default=350, help="seconds for everything (%(default)s)")
    add("--out", default="out/gpu_train_check", help="folder that is filled and can be removed (%(default)s)")
    for hidden in ("--part", "--json"):
        add(hidden, help=argparse.SUPPRESS)
    add("arguments", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def commands(args: argparse.Namespace, out: Path) -> dict[str, list[str]]:
    """The arguments of python for each part.

    Stage 1 leaves heads in bfloat16 without the target's table, and stage 2 begins with one.
    """
    shared = {"--basepath": out / "target", "--configpath": out / "config.json", "--num-epochs": EPOCHS, "--lr": 1e-4}
    lean = {"--save-dtype": "bfloat16", "--save-embedding": False}
    one = {**shared, "--tmpdir": out / "text", "--cpdir": out / "stage 1", **lean}
    two = {**shared, "--tmpdir": out / "images", "--loadpath": out / "stage 1" / f"state_{EPOCHS}"}
    unbroken = {**two, "--cpdir": out / "stage 2"}
    broken = {**two, "--cpdir": out / "killed", "--save-steps": max(args.samples // 4, 1)}
    plan = {"--dry-run": None}
    parts = {
        "data": ("data", {}),
        "plan of stage 1": ("vispec.train.main", one | plan),
        "stage 1": ("vispec.train.main", one),
        "plan of stage 2": ("vispec.train.main_mtp", unbroken | plan),
        "stage 2": ("vispec.train.main_mtp", unbroken),
        KILLED: ("vispec.train.main_mtp", broken),
        RESUMED: ("vispec.train.main_mtp", broken),
    }
    own = {name: getattr(args, name) for name in ("size", "device", "samples", "new_tokens", "text_tokens", "out")}
    found = {}
    for name, (part, flags) in parts.items():
        mine = {f"--{key.replace('_', '-')}": value for key, value in own.items()}
        mine |= {"--part": part, "--json": out / f"{name}.json"}
        words = [[f if value is None else f"{f}={value}" for f, value in one.items()] for one in (mine, flags)]
        found[name] = [str(Path(__file__).resolve()), *words[0], "--", *words[1]]
    return found


# --- parts, each in a process of its own ---


def make_data(args: argparse.Namespace, out: Path) -> dict:
    """Write samples as data generation does, of random rows; what it took."""
    import torch

    from vispec.evaluation.random_pairs import build_target, draft_config
    from vispec.ge_data.batch_generate import generate_answers
    from vispec.ge_data.jobs import features
    from vispec.ge_data.sample_file import file_name, write_sample
    from vispec.model.target import Target

    sizes, dtype = sizes_of(args.size), torch.float32 if args.size == "tiny" else torch.bfloat16
    model = build_target(sizes, torch.device(args.device), dtype)
    target, generator = Target(model), torch.Generator().manual_seed(0)
    found, words = {}, sizes.text["vocab_size"] // 2  # below the ids that mean something
    prompts = [image_prompt(model.config, words, generator, dtype) for _ in range(args.samples)]
    started, answers = time.perf_counter(), []
    for start in range(0, args.samples, ANSWERED_TOGETHER):
        batch = prompts[start : start + ANSWERED_TOGETHER]
        answers += generate_answers(target, batch, [args.new_tokens] * len(batch))
    found["answer_tokens_per_second"] = sum(map(len, answers)) / (time.perf_counter() - started)
    found["prompt_tokens"] = prompts[0]["input_ids"].shape[1]
    texts = torch.randint(words, (args.samples, args.text_tokens), generator=generator)
    rows = {"text": [(ids, {}, args.text_tokens - 100) for ids in texts], "images": []}
    for prompt, answer in zip(prompts, answers, strict=True):
        rest = {name: value for name, value in prompt.items() if name != "input_ids"}
        rows["images"].append((torch.cat([prompt["input_ids"][0], answer]), rest, len(answer)))
    agreeing = []
    for kind, items in rows.items():
        started = time.perf_counter()
        for index, (ids, inputs, scored) in enumerate(items):
            mask = torch.arange(len(ids)) >= len(ids) - scored
            sample = features(target, ids, mask, inputs, "pairs")
            write_sample(out / kind / file_name(index), sample)
            if kind == "images":
                predicting = sample.hidden[torch.isin(sample.hidden_positions + 1, mask.nonzero()[:, 0])]
                said = target.logits(predicting.to(target.device)).argmax(-1).cpu()
                agreeing += (said == ids[-len(said) :]).tolist()
        found[f"{kind}_per_second"] = len(items) / (time.perf_counter() - started)
    found["agreeing"] = sum(agreeing) / len(agreeing)
    write_tables(model, out / "target")
    write_json_atomic(out / "config.json", draft_config(sizes).to_dict())
    return found | peak_memory()


def sizes_of(size: str):
    from vispec.evaluation.random_pairs import TARGETS

    sizes = TARGETS[NAME]
    if size == "7b":
        return sizes
    return replace(sizes, draft=None, **{name: getattr(sizes, name) | TINY[name] for name in TINY})


def image_prompt(config, words: int, generator, dtype) -> dict:
    """What LLaVA-NeXT's processor makes of a square picture of 2 x 2 tiles, with random pixels and words around it."""
    import torch

    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    rows = patches**2 + 2 * patches * (2 * patches + 1)  # the small picture, the tiles with a newline behind each row
    before, after = torch.randint(words, (2, 20), generator=generator)
    ids = torch.cat([before, torch.full((rows,), config.image_token_index), after])[None]
    pixels = torch.randn(1, 5, 3, side, side, generator=generator).to(dtype)
    sizes = torch.tensor([[2 * side, 2 * side]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}


def write_tables(model, folder: Path) -> None:
    """What training reads of a target: embedding, output head, config, and a tokenizer to show samples with."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tables = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    folder.mkdir(exist_ok=True)
    save_file({f"{name}.weight": module.weight.cpu() for name, module in tables.items()}, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    words = {f"<{token}>": token for token in range(len(tables["lm_head"].weight))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def run_training(module: str, arguments: list[str]) -> dict:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    if import_module(module).main(arguments) != 0:
        raise ValueError(f"{module} failed")
    return peak_memory()


def peak_memory() -> dict:
    import torch

    return {"peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}


# --- around them ---


def killed(command: list[str], log: Path, limit: float, state: Path) -> str | None:
    """Start a training and kill -9 it once it has left a state; what went wrong, None if nothing did."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
    ends = time.monotonic() + limit
    while process.poll() is None and not state.exists() and time.monotonic() < ends:
        time.sleep(0.01)
    ended = process.poll()
    if ended is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None if ended is None and state.exists() else f"it should have been killed with a state, exit code {ended}"


def what_is_wrong(args: argparse.Namespace, data: dict, out: Path) -> list[str]:
    """What the parts, which all came to their end, should have found and did not."""
    wrong = []
    if data["agreeing"] < LEAST_AGREEING[args.size]:
        wrong.append(f"data: features predict {data['agreeing']:.1%} of the answers' tokens only")
    if "goes on after epoch" not in (out / f"{RESUMED}.log").read_text():
        wrong.append(f"{RESUMED}: it began anew")
    for folder in ("stage 1", "stage 2", "killed"):
        lines = metrics(out / folder)
        if [line["epoch"] for line in lines] != list(range(1, EPOCHS + 1)):
            wrong.append(f"{folder}: its epochs are {[line['epoch'] for line in lines]}")
        if not all(math.isfinite(line["train"]["loss"]) for line in lines):
            wrong.append(f"{folder}: a loss is not finite")
    if args.device == "cpu" and (difference := largest_difference(out)):
        wrong.append(f"{RESUMED}: its weights differ from those of an unbroken run by up to {difference}")
    return wrong


def metrics(cpdir: Path) -> list[dict]:
    return [json.loads(line) for line in (cpdir / "metrics.jsonl").read_text().splitlines()]


def largest_difference(out: Path) -> float:
    """Between the weights of the training that was killed and of the one that was not."""
    from safetensors.torch import load_file

    one, other = (load_file(out / name / f"state_{EPOCHS}" / "model.safetensors") for name in ("stage 2", "killed"))
    return max((one[name] - other[name]).abs().max().item() for name in one)


def report(args: argparse.Namespace, found: dict, out: Path) -> list[str]:
    """The table, and what does not fit into one."""
    lines = [
        "",
        f"{NAME if args.size == '7b' else 'a tiny target'}, {device_name()}, {args.samples} samples, in bfloat16",
    ]
    if data := found.get("data"):
        lines += [
            f"answers to prompts of {data['prompt_tokens']} tokens in batches of {ANSWERED_TOGETHER}: "
            f"{data['answer_tokens_per_second']:.0f} tokens/s",
            f"features: {data['images_per_second']:.1f} answers/s, {data['text_per_second']:.1f} conversations/s; they "
            f"predict {data['agreeing']:.1%} of the answers' tokens; peak memory {gib(data['peak'])}",
        ]
    lines.append("\n| training | samples/s | peak memory | planned | loss of the last epoch |\n|---|---|---|---|---|")
    for name, plan, folder in (
        ("stage 1", "plan of stage 1", "stage 1"),
        ("stage 2", "plan of stage 2", "stage 2"),
        (RESUMED, "plan of stage 2", "killed"),
    ):
        if name in found and plan in found:
            last, planned = (
                metrics(out / folder)[-1],
                re.search(r"([\d,.]+) MiB  together", (out / f"{plan}.log").read_text()),
            )
            cells = (name, last["samples_per_second"], gib(found[name]["peak"]))
            cells += (gib(float(planned[1].replace(",", "")) * 2**20), f"{last['train']['loss']:.4f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    if "stage 2" in found and RESUMED in found:
        lines.append(f"{RESUMED}: the last weights differ by up to {largest_difference(out):.2g} from those of stage 2")
    return lines


def gib(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    run_cli(main)
