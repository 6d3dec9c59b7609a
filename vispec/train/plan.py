"""--dry-run: what a training command would do with its data, by counting and arithmetic."""

from functools import partial

import torch
from torch.utils.data import DataLoader

from vispec.ge_data.sample_file import Tokens, read_length
from vispec.model.drafts import Eagle3Head
from vispec.prompts import load_tokenizer
from vispec.train.losses import chunk_rows
from vispec.train.samples import SampleFiles, without_tracebacks
from vispec.train.trainer import Trainer

LOGIT_TENSORS = 6
"""Of a chunk of the loss: logits and probabilities of target and draft, their difference, the logits' gradient."""


def print_plan(trainer: Trainer, basepath: str) -> None:
    """Read all samples and print what `trainer` would do.

    Args:
        basepath: has the target's tokenizer.
    """
    tokenizer = _tokenizer(basepath)
    recipe, max_len = trainer.recipe, trainer.train_set.max_len
    tokens, scored, images, *cut = _count(trainer.train_set, recipe.workers)
    held_out = _count(trainer.held_out_set, recipe.workers)
    cut, lost, empty = (a + b for a, b in zip(cut, held_out[3:], strict=True))
    frozen = sum(parameter.numel() for parameter in trainer.head.parameters()) - trainer.trained
    longest, begun = max(trainer.train_set.lengths), trainer.steps_done
    print(
        f"plan of this run; nothing is trained or written\n"
        f"samples       {len(trainer.train_set):,}, held out {len(trainer.held_out_set):,}"
        + (f", {skipped:,} of both skipped" if (skipped := trainer.skipped) else "")
        + f"\ntokens        {tokens:,}, held out {held_out[0]:,}; the longest sample has {longest:,}\n"
        f"images        {images:,}, held out {held_out[2]:,}\n"
        f"scored pairs  {scored:,}, held out {held_out[1]:,}\n"
        f"cut           {cut:,} of all samples by {lost:,} tokens together, to --max-len {max_len:,}; "
        f"{empty:,} have nothing to score\n"
        f"steps         {trainer.steps_per_epoch:,} an epoch of {trainer.group_size} samples each, "
        f"{trainer.steps_per_epoch * recipe.epochs:,} in {recipe.epochs} epochs"
        + (f"; {begun:,} of them are done" if begun else "")
        + f"\nparameters    {trainer.trained:,} trained, {frozen:,} frozen\nmemory        of each process, about:"
    )
    parts = memory_estimate(trainer)
    for what, size in {**parts, "together": sum(parts.values())}.items():
        print(f"  {size / 2**20:12,.1f} MiB  {what}")
    print("  not counted: the allocator's reserve, the libraries, the processes that read samples")
    sample, _ = trainer.train_set[(trainer.train_set.kept[0], None)]
    print(f"first sample  {sample.name}, scored tokens in ⟦ ⟧:")
    print(marked_text(sample.cut(max_len), tokenizer), flush=True)


def memory_estimate(trainer: Trainer) -> dict[str, int]:
    """Bytes by what they hold, for the largest batch that the data can make."""
    recipe, config = trainer.recipe, trainer.head.config
    parameters, trained = sum(parameter.numel() for parameter in trainer.head.parameters()), trainer.trained
    pairs = recipe.batch_size * max(trainer.train_set.lengths)
    size, steps = config.hidden_size, recipe.mtp_steps + 1
    # what backward reads of a pair: inputs of fc (and img_fc, or fc_norm), x, q, k, v, attention twice, both sides
    # of the norm; the four products of the MLP
    kept = {"vispec": 12, "specvlm": 11}.get(trainer.head.method, 10) * size + 4 * config.intermediate_size
    width, read, attention = 2 if trainer.processes.autocast else 4, 3 * size, {}
    if isinstance(trainer.head, Eagle3Head):
        read = trainer.head.fc.in_features + 2 * size
        # a second norm over what has twice the width, and the keys and values of earlier steps moved to each pair
        kept += (3 + steps - 1) * size
        # the attention along drafts is our own, which keeps its weights, as softmax makes them and as they are used
        scores = pairs * max(trainer.train_set.lengths) * config.num_attention_heads * steps
        attention = {f"attention: at most {scores:,} weights x {4 + width} bytes": scores * (4 + width)}
    rows = chunk_rows(trainer.processes.device.type, config.vocab_size, steps)
    logits = min(rows, pairs) * steps * config.vocab_size
    head = trainer.lm_head
    parts = {
        f"weights of the draft head: {parameters:,} x 4 bytes": parameters * 4,
        f"gradients: {trained:,} x 4 bytes": trained * 4,
        f"AdamW's two moments: {trained:,} x 8 bytes": trained * 8,
        f"the target's output head: {head.numel():,} x {head.element_size()} bytes": head.numel() * head.element_size(),
        f"features and embeddings of a batch: {pairs:,} pairs x {read:,} x 4 bytes": pairs * read * 4,
        f"activations: {pairs:,} pairs x {steps} step(s) x {kept:,} x {width} bytes": pairs * steps * kept * width,
        **attention,
        f"a chunk of the loss: {LOGIT_TENSORS} x {logits:,} logits x 4 bytes": LOGIT_TENSORS * logits * 4,
    }
    if trainer.online:
        tensors = list(trainer.online.target.model.parameters())
        count = sum(tensor.numel() for tensor in tensors)
        parts[f"the target of --online: {count:,} parameters"] = sum(tensor.nbytes for tensor in tensors)
    return parts


def marked_text(sample: Tokens, tokenizer) -> str:
    """The text of a sample with its scored tokens in ⟦ ⟧; token i+2 is that of scored pair i. An image is one word."""
    kind = torch.zeros(len(sample), dtype=torch.long)
    kind[2:] = sample.scored()[:-2]
    for number, (start, end) in enumerate(sample.images, 2):
        kind[start:end] = number
    kinds, counts = torch.unique_consecutive(kind, return_counts=True)
    pieces, before, end = [], "", 0
    for part, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        end += count
        # the whole text so far: alone, a part would lose the space before its first word
        text = tokenizer.decode(sample.input_ids[:end].tolist(), clean_up_tokenization_spaces=False)
        piece, before = text[len(before) :], text
        pieces.append(f"<image of {count} rows>" if part > 1 else f"⟦{piece}⟧" if part else piece)
    return "".join(pieces)


def _tokenizer(basepath: str):
    try:
        return load_tokenizer(basepath)
    except ValueError as error:
        raise ValueError(f"--basepath {basepath}: its tokenizer cannot be read ({error})") from None


def _count(samples: SampleFiles, workers: int) -> list[int]:
    """Sums of `_numbers` over the samples that are not skipped, each read as training reads it."""
    from tqdm import tqdm

    keys = [(index, None) for index in samples.kept]
    loader = DataLoader(
        samples, sampler=keys, batch_size=None, collate_fn=partial(_numbers, samples.max_len), num_workers=workers
    )
    bar = tqdm(without_tracebacks(loader), total=len(keys), desc="samples", leave=False)
    return sum(bar, torch.zeros(6, dtype=torch.long)).tolist()


def _numbers(max_len: int, item: tuple) -> torch.Tensor:
    """Tokens, scored pairs and images of a sample; whether it is cut, by how many tokens; whether nothing is scored."""
    sample = item[0].cut(max_len)
    scored, lost = int(sample.scored().sum()), read_length(sample.name) - len(sample)
    return torch.tensor([len(sample), scored, len(sample.images), lost > 0, lost, scored == 0])
