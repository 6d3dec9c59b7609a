"""Training curves of the embedded head: losses and accuracies from the checkpoints' metrics, τ on unseen scenes.

python -m vispec.demo.curves --work out/rebuild --figure figs/training.png
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vispec.cli import Parser, UserError, count, run_cli
from vispec.demo import tau
from vispec.demo.figure import INK
from vispec.embedded import TREE_NAME
from vispec.files import read_json, write_atomic

STAGES = ("stage1", "stage2")
TITLES = {"stage1": "stage 1: text", "stage2": "stage 2: images"}
COLOURS = {"stage1": "#0969da", "stage2": "#2da44e"}
GRID = "#e6e9ed"


@dataclass(frozen=True)
class Curves:
    """What one stage's epochs brought."""

    lines: list[dict]
    """Those of metrics.jsonl."""
    tau: dict[int, float]
    """On unseen scenes, by epoch; where a checkpoint was kept."""

    def of(self, group: str, name: str) -> list[float]:
        """A number of every epoch; `group` is "train" or "held_out"."""
        return [line[group][name] for line in self.lines]

    @property
    def epochs(self) -> list[int]:
        return [line["epoch"] for line in self.lines]


def read_lines(folder: Path) -> list[dict]:
    """The epochs of a training's metrics.jsonl."""
    from vispec.train.metrics import METRICS_FILE, read_metrics

    path, lines = folder / METRICS_FILE, read_metrics(folder)
    if not path.is_file():
        raise UserError(f"{path}: no such file; rebuild.sh makes it")
    if not lines or any(line["held_out"] is None for line in lines):
        raise UserError(f"{path}: expected epochs with held-out samples")
    return lines


def checkpoints(folder: Path, lines: Sequence[dict]) -> dict[int, Path]:
    """The checkpoints that were kept, by epoch."""
    states = {line["epoch"]: folder / f"state_{line['epoch']}" for line in lines}
    return {epoch: path for epoch, path in states.items() if path.is_dir()}


def draw(curves: Mapping[str, Curves], path: Path) -> None:
    """Draw all curves and write them as PNG; the file appears whole or not at all."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('the figure needs matplotlib: pip install "vispec[demo]"') from None
    figure = Figure(figsize=(11.0, 3.5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4, width_ratios=[1, 1, 1.5, 1.5])
    for axes, stage in zip(panels, STAGES, strict=False):
        _losses(axes, stage, curves[stage])
    _accuracies(panels[2], curves)
    _taus(panels[3], curves)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#d0d7de")
        axes.tick_params(length=0, labelsize=8, labelcolor=INK)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def _losses(axes, stage: str, curves: Curves) -> None:
    for group, style in (("train", "--"), ("held_out", "-")):
        axes.plot(curves.epochs, curves.of(group, "loss"), style, color=COLOURS[stage], marker="o", markersize=3)
    axes.lines[0].set_label("training")
    axes.lines[1].set_label("held out")
    _name(axes, f"loss, {TITLES[stage]}")
    axes.set_xlabel("epoch", fontsize=8, color=INK)
    axes.set_xticks(curves.epochs)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _accuracies(axes, curves: Mapping[str, Curves]) -> None:
    """Top-1 on held-out samples, and on training samples, over the epochs of both stages."""
    for stage, places in _places(curves).items():
        for group, style in (("train", "--"), ("held_out", "-")):
            values = [100 * value for value in curves[stage].of(group, "top1")]
            axes.plot(places, values, style, color=COLOURS[stage], marker="o", markersize=3)
    _name(axes, "next token right, % of scored pairs")
    _mark_stages(axes, curves)


def _taus(axes, curves: Mapping[str, Curves]) -> None:
    """τ of every checkpoint, over the epochs of both stages."""
    for stage, places in _places(curves).items():
        measured = curves[stage].tau
        found = {p: measured[epoch] for p, epoch in zip(places, curves[stage].epochs, strict=True) if epoch in measured}
        axes.plot(found.keys(), found.values(), color=COLOURS[stage], marker="o", markersize=3)
        place, value = list(found.items())[-1]
        axes.annotate(
            f"{value:.2f}", (place, value), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=9,
            weight="bold", color=COLOURS[stage],
        )  # fmt: skip
    axes.set_ylim(0, 1.12 * max(max(of_stage.tau.values()) for of_stage in curves.values()))
    _name(axes, f"τ on unseen scenes, tree {TREE_NAME}")
    _mark_stages(axes, curves)


def _places(curves: Mapping[str, Curves]) -> dict[str, list[int]]:
    """Where the epochs of each stage lie on an axis that both share: stage 2 goes on after stage 1."""
    first = len(curves["stage1"].lines)
    return {"stage1": list(range(1, first + 1)), "stage2": [first + i + 1 for i in range(len(curves["stage2"].lines))]}


def _mark_stages(axes, curves: Mapping[str, Curves]) -> None:
    """Ticks that count each stage's own epochs, and the stages' names under them."""
    places = _places(curves)
    axes.set_xticks([place for stage in STAGES for place in places[stage]])
    axes.set_xticklabels([epoch for stage in STAGES for epoch in curves[stage].epochs])
    axes.axvline(places["stage1"][-1] + 0.5, color="#d0d7de", linewidth=0.8)
    for stage in STAGES:
        middle = (places[stage][0] + places[stage][-1]) / 2
        axes.text(
            middle, -0.09, TITLES[stage], transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8,
            color=COLOURS[stage],
        )  # fmt: skip


def _name(axes, title: str) -> None:
    axes.set_title(title, fontsize=9, color=INK, loc="left")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo.curves", description="Training curves of the embedded head.")
    add = parser.add_argument
    add("--work", type=Path, default=Path("out/rebuild"), help="folder of rebuild.sh (default: %(default)s)")
    add("--figure", type=Path, default=Path("figs/training.png"), help="(default: %(default)s)")
    add("--questions", type=count, default=tau.QUESTIONS, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    lines = {stage: read_lines(args.work / stage) for stage in STAGES}
    states = {stage: checkpoints(args.work / stage, lines[stage]) for stage in STAGES}
    for stage in STAGES:
        if not states[stage]:
            raise UserError(f"{args.work / stage}: no state_<epoch> there; rebuild.sh makes it")
    measured = args.work / "tau.json"
    folders = [str(path) for stage in STAGES for path in states[stage].values()]
    tau.main(
        [
            f"--model={args.work / 'target' / 'model'}", f"--questions={args.questions}", f"--json={measured}",
            f"--trees={TREE_NAME}", "--drafts", *folders,
        ]
    )  # fmt: skip
    heads = read_json(measured)["heads"]
    found = {
        stage: {epoch: heads[str(path)]["trees"][TREE_NAME]["tau"] for epoch, path in states[stage].items()}
        for stage in STAGES
    }
    draw({stage: Curves(lines[stage], found[stage]) for stage in STAGES}, args.figure)
    print(f"{args.figure} written")
    return 0


if __name__ == "__main__":
    run_cli(main)
