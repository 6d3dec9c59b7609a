"""The demo's figure: scenes with their answers, drafted tokens marked, beside the speeds of all arms."""

import textwrap
from pathlib import Path

from vispec.demo.runner import Result

SHOWN = 3
COLUMNS, LINES = 78, 8
"""Size of an answer in characters; a longer one ends with an ellipsis."""

DRAFTED_GROUND = "#bfe8c6"
INK, FAINT, BASELINE, OURS = "#1f2328", "#6e7781", "#b6bcc4", "#2da44e"
FONT = "DejaVu Sans Mono"
"""Comes with matplotlib."""
CHARACTER_WIDTH = 0.602
"""In units of the font size."""


def draw(result: Result, path: Path) -> None:
    """Draw a run and write it as PNG; the file appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from vispec.files import write_atomic

    shown = result.replies[:SHOWN]
    width, row = 11.0, 1.72
    height = 0.95 + row * len(shown) + 0.15
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    _title(figure, result, height)
    for index, reply in enumerate(shown):
        bottom = (0.15 + row * (len(shown) - 1 - index)) / height
        picture = figure.add_axes((0.02, bottom + 0.14 / height, 1.36 / width, 1.36 / height))
        picture.imshow(reply.question.image, interpolation="lanczos")
        picture.set(xticks=[], yticks=[])
        for side in picture.spines.values():
            side.set_color("#d0d7de")
        text = figure.add_axes((0.163, bottom, 0.625, row / height))
        _answer(text, reply.question.text, reply.pieces, points=0.625 * width * 72)
    _bars(figure.add_axes((0.835, 0.5 / height, 0.145, 1 - 1.75 / height)), result)
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def _title(figure, result: Result, height: float) -> None:
    comparison = result.comparison
    same = "the same tokens" if comparison.outputs_identical else "not always the same tokens"
    figure.text(
        0.02, 1 - 0.32 / height, "ViSpec answers about images it has never seen", fontsize=15, weight="bold", color=INK
    )
    figure.text(
        0.02,
        1 - 0.62 / height,
        f"{comparison.questions} questions, greedy, {result.dtype}: {same} as plain decoding, "
        f"at {comparison.speedup:.2f}× its speed and {result.over_generate.speedup:.2f}× that of generate(), "
        f"τ = {comparison.tau or 0:.2f}",
        fontsize=10,
        color=FAINT,
    )
    figure.text(
        0.788, 1 - 0.29 / height, " drafted and accepted ", fontsize=9, color=INK, ha="right",
        bbox={"facecolor": DRAFTED_GROUND, "edgecolor": "none", "pad": 2.5},
    )  # fmt: skip


def _answer(axes, question: str, pieces: list[tuple[str, bool]], points: float) -> None:
    """A question and its answer in a box that is `points` wide."""
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, COLUMNS), ylim=(LINES + 1.9, -0.1))
    axes.axis("off")
    size = points / COLUMNS / CHARACTER_WIDTH
    axes.text(0, 0.75, question, fontsize=size + 2, weight="bold", color=INK, va="center")
    for number, line in enumerate(wrapped(pieces, COLUMNS, LINES)):
        middle = number + 2.1
        for start, end in _stretches([drafted for _, drafted in line]):
            axes.add_patch(Rectangle((start, middle - 0.46), end - start, 0.92, color=DRAFTED_GROUND, linewidth=0))
        # word by word: a font's rounded advances drift away from the grid over a whole line
        for start, end in _stretches([character != " " for character, _ in line]):
            word = "".join(character for character, _ in line[start:end])
            axes.text(
                start, middle, word, fontsize=size, family=FONT, color=INK, va="center_baseline", parse_math=False
            )


def wrapped(pieces: list[tuple[str, bool]], columns: int, lines: int) -> list[list[tuple[str, bool]]]:
    """Lines of (character, drafted), broken between words."""
    characters = [(" " if c.isspace() else c, drafted) for text, drafted in pieces for c in text]
    text = "".join(c for c, _ in characters)
    wrapper = textwrap.TextWrapper(columns, break_on_hyphens=False, drop_whitespace=False, expand_tabs=False)
    rows, start = [], 0
    for row in wrapper.wrap(text):
        rows.append(characters[start : start + len(row)])
        start += len(row)
    rows = [_stripped(row) for row in rows]
    if len(rows) > lines:
        rows = rows[:lines]
        rows[-1] = [*rows[-1][: columns - 2], (" ", False), ("…", False)]
    return rows


def _stripped(row: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    inked = [i for i, (character, _) in enumerate(row) if character != " "]
    return row[inked[0] : inked[-1] + 1] if inked else []


def _stretches(flags: list[bool]) -> list[tuple[int, int]]:
    """Maximal stretches of True as (start, end)."""
    edges = [i for i, (a, b) in enumerate(zip([False, *flags], [*flags, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _bars(axes, result: Result) -> None:
    arms = {
        "generate": (result.over_generate.baseline, BASELINE),
        "plain": (result.comparison.baseline, BASELINE),
        "ViSpec": (result.comparison.spec, OURS),
    }
    speeds = [arm.tokens_per_second for arm, _ in arms.values()]
    bars = axes.bar(list(arms), speeds, color=[colour for _, colour in arms.values()], width=0.62)
    axes.bar_label(bars, labels=[f"{speed:.0f}" for speed in speeds], fontsize=12, weight="bold", color=INK, padding=3)
    axes.set_title("tokens per second", fontsize=10, color=INK, pad=12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#d0d7de")
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.set_yticks([])
    axes.set_ylim(0, 1.12 * max(speeds))
