"""The bar chart of a results table: speedup of each method on each benchmark, with intervals and τ."""

from collections.abc import Mapping
from pathlib import Path

from vispec.cli import UserError
from vispec.evaluation.published import AVERAGE, BENCHMARK_TITLES
from vispec.evaluation.report import about, title
from vispec.evaluation.results import Results, Row, Table
from vispec.files import write_atomic
from vispec.methods import method_of

INK, FAINT, LINE = "#1f2328", "#6e7781", "#d0d7de"
COLOURS: Mapping[str, str] = {
    "vispec": "#2da44e", "eagle2": "#54a3d8", "eagle3": "#2f6fab", "msd": "#c2577a", "specvlm": "#8c6bb1",
    "vlm": "#7a5c3e", "medusa": "#e3a34f", "lookup": "#b6bcc4", "generate": "#57606a",
}  # fmt: skip
OTHER_COLOUR = "#a58bd0"
MOST_NUMBERED = 5
"""Methods that a group has room to write τ for."""
IN_A_LINE = 5
"""Names of the legend."""
WIDTH, HEIGHT, DPI = 11.0, 4.4, 150
"""Inches, and pixels an inch."""
GROUP = 0.84
"""Share of a group's place that its bars fill."""


def draw_all(results: Results, name: str) -> list[Path]:
    """Draw the table of the lowest temperature; each of them where `name` holds {T}. Returns what was written.

    Raises:
        UserError: the results are of several targets, which one chart cannot tell apart.
    """
    targets = {table.base_model for table in results.tables}
    if len(targets) > 1:
        raise UserError(
            f"--figure: found answers of {len(targets)} targets, expected one: {', '.join(sorted(targets))}"
        )
    tables = results.tables if "{T}" in name else results.tables[:1]
    paths = [Path(name.replace("{T}", f"{table.temperature:g}")) for table in tables]
    for table, path in zip(tables, paths, strict=True):
        draw(table, path)
    return paths


def draw(table: Table, path: Path) -> None:
    """Draw a table and write it as PNG, WIDTH × HEIGHT inches; the file appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    more = 0.05 * ((len(table.rows) - 1) // IN_A_LINE)  # lines of the legend
    axes = figure.add_axes((0.048, 0.105, 0.94, 0.69 - more))
    tops = [_bars(axes, row, place, len(table.rows)) for place, row in enumerate(table.rows)]
    _frame(axes, table.rows, highest=max([1.0, *tops]))
    figure.text(0.02, 0.94, f"Speedup over plain decoding: {table.target}", fontsize=15, weight="bold", color=INK)
    figure.text(0.02, 0.885, about(table), fontsize=10, color=FAINT)
    numbers = "Whiskers: 95 % intervals."
    if len(table.rows) <= MOST_NUMBERED:
        numbers += " Numbers: τ, draft tokens accepted a round."
    figure.text(0.02, 0.838, numbers, fontsize=10, color=FAINT)
    if table.rows:
        figure.legend(
            handles=[Patch(**_look(row), label=title(row.method)) for row in table.rows],
            loc="upper right", bbox_to_anchor=(0.992, 0.875), ncols=IN_A_LINE, frameon=False, fontsize=10,
            labelcolor=INK, handlelength=1.0, columnspacing=1.2, borderaxespad=0,
        )  # fmt: skip
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def _bars(axes, row: Row, place: int, rows: int) -> float:
    """A method's bar in every group, the `place`-th of `rows`; returns the top of the highest one."""
    groups = [cell.estimates if cell else None for cell in row.cells.values()]
    groups.append({name: row.average(name) for name in ("speedup", "tau")} if row.benchmarks else None)
    width = GROUP / max(rows, 2)
    top = 0.0
    for group, found in enumerate(groups):
        middle = group + (place - (rows - 1) / 2) * width
        if found is None:
            axes.text(middle, 0.02, "—", ha="center", va="bottom", fontsize=9, color=FAINT)
            continue
        speedup, tau = found["speedup"], found["tau"]
        axes.bar(middle, speedup.value, width * 0.92, **_look(row))
        low, high = speedup.interval or (speedup.value, speedup.value)
        errors = [[speedup.value - low], [high - speedup.value]]
        axes.errorbar(middle, speedup.value, errors, color=INK, linewidth=0.9, capsize=2.2, capthick=0.9)
        if tau.value is not None and rows <= MOST_NUMBERED:
            axes.annotate(
                f"{tau.value:.2f}", (middle, high), (0, 3), textcoords="offset points", ha="center", va="bottom",
                fontsize=8 if rows <= 3 else 6.5, color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.4},
            )  # fmt: skip
        top = max(top, high)
    return top


def _look(row: Row) -> dict:
    """Of a method's bars; those of a head with a label are hatched."""
    labelled = {"hatch": "////", "edgecolor": "white", "linewidth": 0} if row.method != method_of(row.method) else {}
    return {"facecolor": COLOURS.get(method_of(row.method), OTHER_COLOUR), **labelled}


def _frame(axes, rows: list[Row], highest: float) -> None:
    from matplotlib.ticker import MaxNLocator

    counts = [row.benchmarks for row in rows]
    incomplete = any(count < len(BENCHMARK_TITLES) for count in counts)
    average = f"{AVERAGE}\nof {', '.join(map(str, counts))}" if incomplete else AVERAGE
    heads = [*BENCHMARK_TITLES.values(), average]
    axes.axhline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0.5)
    axes.axvline(len(heads) - 1.5, color=LINE, linewidth=1.0)
    axes.set(xlim=(-0.5, len(heads) - 0.5), ylim=(0, 1.1 * highest))
    axes.set_xticks(range(len(heads)), heads)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(length=0, labelsize=10.5, labelcolor=INK)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}×")
    axes.yaxis.set_tick_params(labelcolor=FAINT, labelsize=9.5)
