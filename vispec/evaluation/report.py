"""The report on `Results`: tables for people (Markdown, aligned for terminals), long rows (CSV), everything (JSON)."""

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from vispec.evaluation.benchmarks.mmspec import MMSPEC
from vispec.evaluation.comparison import DRAWS, MEASURES, PERCENTILES, SEED, TAU_CONVENTION, Estimate
from vispec.evaluation.measure import is_greedy
from vispec.evaluation.published import AVERAGE, BENCHMARK_TITLES, METHOD_TITLES, published
from vispec.evaluation.results import Cell, Results, Row, Table
from vispec.methods import GENERATE, method_of
from vispec.model.shape import AUTO

HOLE = "—"
LEGEND = f"""\
- speedup: mean over questions of tokens/s, prefill included, over the baseline's
- decode-only: the same without prefill and first token
- τ: {TAU_CONVENTION}
- 95 %: bootstrap interval over questions; (n): the average is over n benchmarks
- round in steps: time of a draft round over that of a plain step, both without prefill
- plain steps: share of the steps that had no draft; they are no rounds
- identical: questions with the baseline's output ids, of those that both arms have answered
- left out: questions that could not be asked: image unreadable, prompt too long, or actors died of it
- the baseline's tokens/s are over all questions that it has answered"""


def as_markdown(results: Results) -> str:
    """One section a target and temperature."""
    return "\n\n".join(_section(table) for table in results.tables)


def as_csv(results: Results) -> str:
    """One row a target, temperature, method and benchmark, averages among them; a hole has empty fields.

    `accepted_<n>` is the number of rounds with n accepted draft tokens.
    """
    lines = [line for table in results.tables for line in _csv_lines(table)]
    counted = {int(name.removeprefix("accepted_")) for line in lines for name in line if name.startswith("accepted_")}
    longest = max(counted, default=0)
    names = dict.fromkeys(name for line in lines for name in line if not name.startswith("accepted_"))
    file = io.StringIO()
    writer = csv.DictWriter(file, [*names, *(f"accepted_{n}" for n in range(longest + 1))], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def as_json(results: Results, made_by: Mapping) -> str:
    """Everything, with the settings and provenance of every answer file; a hole is null.

    Args:
        made_by: provenance of the report itself.
    """
    report = {
        "tables": [_json_table(table) for table in results.tables],
        "missing": results.notices,
        "tau_convention": TAU_CONVENTION,
        "interval": {"percentiles": PERCENTILES, "bootstrap_draws": DRAWS, "seed": SEED},
        "provenance": made_by,
    }
    return json.dumps(report, indent=1, ensure_ascii=False)


def about(table: Table) -> str:
    """What all numbers of a table have in common, in one line."""
    settings = table.settings
    sampling = "greedy" if is_greedy(table.temperature) else f"temperature {table.temperature:g}"
    several = f" ({settings['devices']} devices)" if (settings["devices"] or 1) > 1 else ""
    device = (settings["device"] or "unknown device") + several
    dtype, cap = settings["dtype"] or "unknown dtype", settings["max_new_tokens"]
    length = f", at most {cap} new tokens" if cap else ""
    config = ", the target's generation config applied" if settings.get("generation_config") else ""
    return f"{device}, {dtype}, {sampling}{length}{config}"


def title(method: str) -> str:
    """A method's name for people, with the label of its head."""
    _, found, label = method.partition("-")
    return METHOD_TITLES.get(method_of(method), method_of(method)) + (f", {label}" if found else "")


# Markdown


def _section(table: Table) -> str:
    heads = ["", "", *BENCHMARK_TITLES.values(), AVERAGE]
    ours = _speeds(table)
    behind = _behind(table)
    theirs = _published(table)
    widths = [max(map(len, column)) for column in zip(heads, *ours, *behind, *theirs, strict=True)]
    parts = [f"## {table.target}, temperature {table.temperature:g}", about(table) + "."]
    parts += [f"{title(row.method)}: {_described(row)}." for row in table.rows if row.settings]
    if any(table.baseline.values()) or any(row.benchmarks for row in table.rows) or not table.topics:
        parts += [_markdown([heads, *ours], 2, widths)]
    if theirs:
        parts += ["Published, not measured here (arXiv 2509.15235, the authors' GPUs):"]
        parts += [_markdown([heads, *theirs], 2, widths)]
    if any(row.benchmarks for row in table.rows):
        parts += ["What is behind our numbers:", _markdown([heads, *behind], 2, widths)]
    if any(row.histogram for row in table.rows):
        parts += ["Share of rounds with so many draft tokens accepted, in %:", _histograms(table)]
    if table.topics:
        kept = f", turns read on (--prefix-cache {table.prefix_cache})" if table.prefix_cache else ""
        parts += [f"MMSpec (arXiv 2603.14989) by topic, which no average above counts{kept}:", _by_topic(table)]
    return "\n\n".join([*parts, LEGEND])


def _described(row: Row) -> str:
    head, tree, vocabulary = (row.settings[name] for name in ("spec_model", "tree", "draft_vocab"))
    # of a folder, the end is enough for people; the whole path is in the JSON
    parts = [f"draft head {'/'.join(Path(head).parts[-2:])}"] if head else []
    parts += [f"draft vocabulary of {vocabulary.partition(',')[0]}"] if vocabulary else []
    if tree == AUTO:
        parts += [f"tree {AUTO}, chosen while it answers"]
    elif isinstance(tree, str):
        parts += [f"tree {tree}"]
    elif tree:
        parts += [f"tree {'/'.join(map(str, tree))} (total_token/depth/top_k)"]
    skips = row.settings.get("skip_visual")
    parts += [] if skips is None else [f"a plain step where attention to images is at least {skips:g}"]
    return ", ".join(parts) or "no draft head"


def _speeds(table: Table) -> list[list[str]]:
    """The paper's table: speedup and tau of each method, with intervals."""
    speeds = [speed.tokens_per_second if speed else None for speed in table.baseline.values()]
    average = _counted(table.baseline_average, sum(speed is not None for speed in speeds))
    lines = [[title("baseline"), "tokens/s", *map(_number, speeds), average]]
    for row in table.rows:
        name = title(row.method)
        for measure, label in (("speedup", "speedup"), ("tau", "τ")):
            found = [cell.estimates[measure] if cell else None for cell in row.cells.values()]
            average = row.average(measure)
            values = [_number(estimate.value if estimate else None) for estimate in found]
            lines.append([name, label, *values, _counted(average.value, row.benchmarks)])
            lines.append(["", "95 %", *map(_interval, [*found, average])])
            name = ""
    return lines


def _behind(table: Table) -> list[list[str]]:
    """What a speedup is made of: questions, time without prefill, cost of a round, identity."""
    asked = [_count(speed.questions if speed else 0) for speed in table.baseline.values()]
    lines = [[title("baseline"), "questions", *asked, ""]]
    lines += _left_out(table, "baseline")
    for row in table.rows:
        cells = row.cells.values()
        average = row.average("decode_speedup")
        decode = [cell.estimates["decode_speedup"].value if cell else None for cell in cells]
        rounds = [cell.round_in_steps if cell else None for cell in cells]
        lines.append([title(row.method), "questions", *(_count(_questions(cell)) for cell in cells), ""])
        lines += _left_out(table, row.method)
        lines.append(["", "decode-only", *map(_number, [*decode, average.value])])
        lines.append(["", "round in steps", *map(_number, rounds), ""])
        lines += [] if row.method == GENERATE else _plain_steps(cells)
        if is_greedy(table.temperature):
            identical = [cell.comparison.identical_questions if cell else None for cell in cells]
            lines.append(["", "identical", *map(_share, identical, map(_questions, cells)), ""])
    return lines


def _left_out(table: Table, method: str) -> list[list[str]]:
    counts = table.left_out(method)
    return [["", "left out", *map(_count, counts), ""]] if any(counts) else []


def _plain_steps(cells: Collection[Cell | None]) -> list[list[str]]:
    """A line where there are any."""
    steps = [cell.comparison.plain_steps if cell else None for cell in cells]
    all_steps = [cell.comparison.plain_steps + cell.comparison.rounds if cell else 0 for cell in cells]
    return [["", "plain steps", *map(_share, steps, all_steps), ""]] if any(steps) else []


def _published(table: Table) -> list[list[str]]:
    lines = []
    for method, found in published(table.base_model, table.temperature).items():
        pairs = [found.get(name) for name in (*BENCHMARK_TITLES, AVERAGE)]
        for index, label in enumerate(("speedup", "τ")):
            values = [_number(pair[index] if pair else None) for pair in pairs]
            lines.append([title(method) if index == 0 else "", label, *values])
    return lines


def _histograms(table: Table) -> str:
    rows = [row for row in table.rows if row.histogram]
    lengths = range(max((n for row in rows for n in row.histogram), default=0) + 1)
    lines = [["draft tokens accepted", *map(str, lengths), "rounds"]]
    for row in rows:
        rounds = row.histogram.total()
        shares = [f"{100 * row.histogram[n] / rounds:.1f}" for n in lengths]
        lines.append([title(row.method), *shares, str(rounds)])
    return _markdown(lines, 1, [max(map(len, column)) for column in zip(*lines, strict=True)])


def _by_topic(table: Table) -> str:
    lines = [["", "topic", "items", "speedup", "95 %", "τ", "95 %", "plain steps", "identical"]]
    for method, cells in table.topics.items():
        name = title(method)
        for topic, cell in cells.items():
            found = cell.comparison
            measures = [cell.estimates[measure] for measure in ("speedup", "tau")]
            values = [text for one in measures for text in (_number(one.value), _interval(one))]
            steps = _share(found.plain_steps, found.plain_steps + found.rounds) if found.plain_steps else HOLE
            same = _share(found.identical_questions, found.questions) if is_greedy(table.temperature) else HOLE
            lines.append([name, topic, str(found.questions), *values, steps, same])
            name = ""
    return _markdown(lines, 2, [max(map(len, column)) for column in zip(*lines, strict=True)])


def _markdown(lines: Sequence[Sequence[str]], left: int, widths: Sequence[int]) -> str:
    """A table whose first line is its head and whose first `left` columns are aligned to the left."""
    columns = list(enumerate(widths))
    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in columns]
    aligned = [
        [line[column].ljust(width) if column < left else line[column].rjust(width) for column, width in columns]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [aligned[0], rule, *aligned[1:]])


def _number(value: float | None) -> str:
    return HOLE if value is None else f"{value:.2f}"


def _counted(value: float | None, benchmarks: int) -> str:
    return _number(value) + (f" ({benchmarks})" if benchmarks else "")


def _interval(estimate: Estimate | None) -> str:
    interval = estimate.interval if estimate else None
    return "{:.2f}–{:.2f}".format(*interval) if interval else HOLE


def _questions(cell: Cell | None) -> int:
    return cell.comparison.questions if cell else 0


def _count(value: int) -> str:
    return str(value) if value else HOLE


def _share(part: int | None, whole: int) -> str:
    return HOLE if part is None or not whole else f"{100 * part / whole:.1f} %"


# CSV


def _csv_lines(table: Table) -> list[dict]:
    theirs = published(table.base_model, table.temperature)
    common = {"base_model": table.base_model, **table.settings, "temperature": table.temperature}
    lines = []
    for benchmark, speed in table.baseline.items():
        line = common | {"method": "baseline", "benchmark": benchmark}
        if speed:
            line |= {"questions": speed.questions, "tokens_per_second": speed.tokens_per_second}
            line |= {"decode_tokens_per_second": speed.decode_tokens_per_second}
        lines.append(line)
    line = common | {"method": "baseline", "benchmark": AVERAGE, "tokens_per_second": table.baseline_average}
    lines.append(line | {"benchmarks": sum(speed is not None for speed in table.baseline.values())})
    for row in table.rows:
        for benchmark, cell in row.cells.items():
            line = common | {"method": row.method, "benchmark": benchmark}
            line |= _flat(_json_cell(cell)) if cell else {}
            lines.append(line | _published_fields(theirs, row.method, benchmark))
        averages = {"benchmarks": row.benchmarks, **{name: row.average(name) for name in MEASURES}}
        line = common | {"method": row.method, "benchmark": AVERAGE}
        line |= _flat({name: _json_value(value) for name, value in averages.items()})
        lines.append(line | _published_fields(theirs, row.method, AVERAGE))
    for method, cells in table.topics.items():
        for topic, cell in cells.items():
            line = common | {"method": method, "benchmark": MMSPEC.name, "topic": topic}
            line |= {"prefix_cache": table.prefix_cache or None}
            lines.append(line | _flat(_json_cell(cell)))
    return lines


def _published_fields(theirs: Mapping, method: str, benchmark: str) -> dict[str, float]:
    pair = theirs.get(method, {}).get(benchmark)
    return dict(zip(("published_speedup", "published_tau"), pair, strict=True)) if pair else {}


def _flat(fields: Mapping) -> dict:
    """Estimates as three fields each, histograms as one field a length."""
    flat = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and "value" in value:
            low, high = value["interval"] or (None, None)
            flat |= {name: value["value"], f"{name}_low": low, f"{name}_high": high}
        elif isinstance(value, Mapping):
            flat |= {f"accepted_{length}": rounds for length, rounds in value.items()}
        else:
            flat[name] = value
    return flat


# JSON


def _json_table(table: Table) -> dict:
    theirs = published(table.base_model, table.temperature)
    pairs = {method: {name: _pair(*pair) for name, pair in found.items()} for method, found in theirs.items()}
    return {
        "base_model": table.base_model,
        "temperature": table.temperature,
        "settings": table.settings,
        "baseline": {name: vars(speed) if speed else None for name, speed in table.baseline.items()},
        "methods": [_json_row(row) for row in table.rows],
        "published_not_measured_here": pairs or None,
        MMSPEC.name: {
            method: {topic: _json_cell(cell) for topic, cell in cells.items()} for method, cells in table.topics.items()
        },
        "files": [
            {
                "path": str(file.path),
                "settings": file.settings,
                "provenance": file.meta.get("provenance", {}),
                "left_out": file.left_out,
            }
            for file in table.files
        ],
    }


def _json_row(row: Row) -> dict:
    return {
        "method": row.method,
        **row.settings,
        "benchmarks": {name: _json_cell(cell) if cell else None for name, cell in row.cells.items()},
        AVERAGE: {"benchmarks": row.benchmarks, **{name: _json_value(row.average(name)) for name in MEASURES}},
        "accepted_rounds": _json_value(row.histogram),
    }


def _json_cell(cell: Cell) -> dict:
    comparison = cell.comparison
    return {
        "questions": comparison.questions,
        "tokens_per_second": comparison.spec.tokens_per_second,
        "decode_tokens_per_second": comparison.spec.decode_tokens_per_second,
        "baseline_tokens_per_second": comparison.baseline.tokens_per_second,
        **{name: _json_value(cell.estimates[name]) for name in MEASURES},
        "rounds": comparison.rounds,
        "plain_steps": comparison.plain_steps,
        "round_in_steps": cell.round_in_steps,
        "identical_questions": comparison.identical_questions,
        "identical_share": comparison.identical_questions / comparison.questions,
        "accepted_rounds": _json_value(cell.histogram),
    }


def _json_value(value):
    if isinstance(value, Estimate):
        return {"value": value.value, "interval": value.interval}
    if isinstance(value, Counter):
        return {length: value[length] for length in range(max(value, default=-1) + 1)}
    return value


def _pair(speedup: float, tau: float) -> dict[str, float]:
    return {"speedup": speedup, "tau": tau}
