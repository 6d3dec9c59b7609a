"""The report of `vispec.evaluation.bench` as text."""

from vispec.evaluation.comparison import RATIOS
from vispec.evaluation.round_times import DRAFT_HEAD, DRAFT_LAYER


def text(result: dict) -> str:
    """Everything that was measured, one table after another; times in milliseconds."""
    lines = [*_head(result), "", *_step(result), "", *_verification(result)]
    for tree, row in result["trees"].items():
        lines += ["", *_tree(tree, row, result["context"])]
        everything = result["trees"][tree.split(" ")[0]]
        if row is not everything:
            share = row["draft_seconds"] / everything["draft_seconds"]
            lines.append(f"the draft takes {share:.2f} of what it takes over all tokens")
        lines += ["", *_speeds(tree, row)]
    lines += ["", RATIOS]
    return "\n".join(lines)


def _head(result: dict) -> list[str]:
    device, rates = result["device"], result["rates"]
    versions = ", ".join(f"{name} {device['versions'][name]}" for name in ("torch", "transformers"))
    return [
        f"{device['pair']}, {device['weights']} weights, {device['dtype']}, on {device['kind']}",
        f"{device['name']}; {versions}",
        f"target {_billions(device['parameters'])} parameters, draft head {_billions(device['draft_parameters'])}; "
        f"a plain step reads {_size(result['plain_step']['bytes'])}",
        f"measured: copy {rates['bandwidth'] / 1e9:.1f} GB/s (read + written), "
        f"matrix product {rates['matmul'] / 1e12:.2f} TFLOP/s; prompt of {result['context']} tokens",
    ]


def _step(result: dict) -> list[str]:
    step, theirs = result["plain_step"], result["transformers_step"]
    lines = [
        _row("one token at a time", "ms", "floor", "x floor"),
        _timed("plain step", step),
        _row("transformers' generate", _ms(theirs["seconds"]), "", ""),
        f"plain step: {step['bandwidth'] / 1e9:.1f} GB/s, {_percent(1 / step['times_floor'])} of the possible speed; "
        f"our tokens/s over those of generate: {theirs['our_tokens_per_second_over_theirs']:.2f}",
    ]
    for name, found in result["outputs"].items():
        same = "the same" if found["identical"] else f"other than the baseline's from token {found['first_difference']}"
        lines.append(f"outputs of {name}: {same} ({found['compared']} tokens compared)")
    return lines


def _verification(result: dict) -> list[str]:
    rows = [_timed(f"{n} tokens", found) for n, found in result["verification"].items()]
    return [_row("verification of", "ms", "floor", "x floor"), *rows]


def _tree(tree: str, row: dict, context: int) -> list[str]:
    lines = [_row(f"a round at {tree}", "ms", "floor", "x floor")]
    lines += [_timed(f"  {part['passes']} x {part['part']}, {part['rows']} rows", part) for part in row["parts"]]
    lines += [_timed("  tree building, alone", row["tree_building"]), _timed("round", row["round"])]
    layer, head = (_size(row["draft_bytes"][part]) for part in (DRAFT_LAYER, DRAFT_HEAD))
    lines.append(f"a pass of the draft reads {layer} in its layer, {head} in the output head")
    lines.append(
        f"a round takes {row['round_in_plain_steps']:.2f} plain steps; the draft's layer and output head take "
        f"{_ms(row['draft_module_seconds'])} ms of it, with tree building {_ms(row['draft_seconds'])} ms"
    )
    cache = row["draft_cache"]
    held = [f"{cache[kind]['held']} of {cache[kind]['prompt_tokens']}" for kind in ("text", "with_images")]
    lines.append(
        f"the draft's cache holds {held[0]} tokens of the prompt ({_size(cache['text']['bytes'])}); with eight images "
        f"of as many tokens each it would hold {held[1]} ({_size(cache['with_images']['bytes'])})"
    )
    share = _percent(row["everything_else_share"])
    if row["device_busy_seconds"] is None:
        lines.append(
            f"everything but these passes (so tree building is in it): {share} "
            f"of a round after a prompt of {context} tokens"
        )
    else:
        busy = _ms(row["device_busy_seconds"])
        lines.append(
            f"CUDA graphs: after a prompt of {context} tokens these parts, captured and replayed one by one, take "
            f"{busy} ms of a round; the rest is the host's and the kept path's: {share} of a round"
        )
    return lines


def _speeds(tree: str, row: dict) -> list[str]:
    lines = [f"{tree + ' at tau':<24}{'tokens/s':>10}{'x plain':>10}{'x generate':>12}"]
    for found in row["projected"]:
        lines.append(_speed(found["tau"], found["tokens_per_second"], found, "speedup") + f"  {found['kind']}")
        if "published_speedup" in found:
            lines[-1] += f" (published: {found['published_speedup']:.2f} over the authors' loop)"
    answers = row["measured"]
    if answers:
        lines.append(
            _speed(answers["tau"], answers["spec"]["decode_tokens_per_second"], answers, "decode_speedup")
            + f"  measured on {answers['questions']} questions (with prefill {answers['speedup']:.2f} x plain, "
            f"{answers['speedup_over_generate']:.2f} x generate; {answers['identical_questions']} outputs identical)"
        )
    return lines


def _speed(tau: float, tokens_per_second: float, found: dict, ratio: str) -> str:
    return f"{tau:<24.2f}{tokens_per_second:>10.1f}{found[ratio]:>10.2f}{found[f'{ratio}_over_generate']:>12.2f}"


def _timed(name: str, found: dict) -> str:
    return _row(name, _ms(found["seconds"]), _ms(found["floor"]), f"{found['times_floor']:.2f}")


def _row(name: str, *columns: str) -> str:
    return f"{name:<44}" + "".join(f"{column:>10}" for column in columns)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
