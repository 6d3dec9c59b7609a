"""The report on a folder of answer files: hand computation, intervals, holes, refusals, formats, the figure."""

import csv
import io
import json
import random
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from answer_files import choice, write
from PIL import Image

from vispec import embedded
from vispec.evaluation import chart, speed
from vispec.evaluation.answer_file import meta_path
from vispec.evaluation.benchmarks import BENCHMARKS
from vispec.evaluation.comparison import DRAWS, SEED, average, compare, estimates, wall_speed
from vispec.evaluation.measure import Answer
from vispec.evaluation.published import AVERAGE, BENCHMARK_TITLES, published
from vispec.evaluation.report import title
from vispec.evaluation.results import read_results

LLAVA = "llava-hf/llava-v1.6-vicuna-7b-hf"
PUBLISHED = ("llava-v1.6-vicuna-7b-hf", "llava-v1.6-vicuna-13b-hf", "Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-7B-Instruct")


def arm(folder: Path, benchmark: str, method: str, answers: dict, temperature: float = 0.0, **settings) -> Path:
    path = folder / benchmark / f"{method}-temperature-{temperature}.jsonl"
    common = {"benchmark": benchmark, "method": method, "base_model": LLAVA, "temperature": temperature}
    return write(path, answers, **{**common, "device": "a GPU", **settings})


def baseline_answers(seconds: float) -> dict:
    """Two questions of 5 tokens, 1 s of prefill and `seconds` of decoding each."""
    return {name: [choice([1, 2, 3, 4, 5], 1 + seconds, seconds)] for name in (1, 2)}


def vispec_answers(seconds: float, accepted: list[int], ids=(1, 2, 3, 4, 5)) -> dict:
    return {name: [choice(list(ids), 1 + seconds, seconds, accepted)] for name in (1, 2)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """ViSpec is 2 times faster on gqa and 1.5 times on sqa; EAGLE-2 has gqa only, Medusa mme, without a baseline."""
    arm(tmp_path, "gqa", "baseline", baseline_answers(3.0))
    arm(tmp_path, "gqa", "vispec", vispec_answers(1.0, [3, 0]), tree=[30, 3, 8], spec_model="head")
    arm(
        tmp_path, "gqa", "eagle2", vispec_answers(3.0, [1, 1], ids=[1, 2, 3, 4, 9]), tree=[30, 3, 8], spec_model="eagle"
    )
    arm(tmp_path, "sqa", "baseline", baseline_answers(2.0))
    arm(tmp_path, "sqa", "vispec", vispec_answers(1.0, [2, 0, 0]), tree=[30, 3, 8], spec_model="head")
    arm(tmp_path, "mme", "medusa", vispec_answers(1.0, [1, 1]), tree=[30, 3, 8], spec_model="medusa")
    return tmp_path


def report(folder: Path, capsys, *argv: str) -> str:
    assert speed.main(["--results", str(folder), *argv]) == 0
    return capsys.readouterr().out


def test_cells_and_averages_by_hand(folder):
    (table,) = read_results(folder).tables
    assert [row.method for row in table.rows] == ["medusa", "eagle2", "vispec"] and table.target == LLAVA.split("/")[1]
    vispec = table.rows[2]
    gqa, sqa = vispec.cells["gqa"], vispec.cells["sqa"]
    # 4 s against 2 s, 3 s against 2 s; without prefill 3 against 1, 2 against 1
    assert gqa.comparison.speedup == pytest.approx(2.0) and sqa.comparison.speedup == pytest.approx(1.5)
    assert vispec.average("speedup").value == pytest.approx(1.75) and vispec.benchmarks == 2
    assert vispec.average("decode_speedup").value == pytest.approx(2.5)
    assert gqa.comparison.tau == 1.5 and vispec.average("tau").value == pytest.approx((3 / 2 + 2 / 3) / 2)
    # gqa: a round takes 1/2 s, a step 3/4 s
    assert gqa.round_in_steps == pytest.approx(2 / 3)
    assert vispec.histogram == {0: 6, 2: 2, 3: 2}
    assert table.baseline["gqa"].tokens_per_second == pytest.approx(5 / 4)
    assert table.baseline_average == pytest.approx((5 / 4 + 5 / 3) / 2)
    assert table.rows[1].cells["gqa"].comparison.identical_questions == 0


def test_answers_of_chosen_trees(tmp_path, capsys):
    """`--tree auto`: on gqa a part of the steps has no draft, on sqa none has one."""
    for benchmark in ("gqa", "sqa"):
        arm(tmp_path, benchmark, "baseline", baseline_answers(4.0))
    ids = [1, 2, 3, 4, 5]
    gqa = {1: [choice(ids, 3.0, 2.0, accepted=[3])], 2: [choice(ids, 4.0, 3.0, accepted=[1], plain_steps=2)]}
    arm(tmp_path, "gqa", "vispec", gqa, tree="auto")
    sqa = {name: [choice(ids, 5.0, 4.0, accepted=[], plain_steps=4)] for name in (1, 2)}
    arm(tmp_path, "sqa", "vispec", sqa, tree="auto")
    (table,) = read_results(tmp_path).tables
    (row,) = table.rows
    cell = row.cells["gqa"]
    # a step takes 1 s; the round of question 1 tells what a round takes
    assert (cell.comparison.rounds, cell.comparison.plain_steps, cell.round_in_steps) == (2, 2, 2.0)
    assert row.cells["sqa"].estimates["tau"].interval is None and row.cells["sqa"].round_in_steps is None
    assert row.average("tau").value == 2.0 and row.histogram == {1: 1, 3: 1}
    printed = report(tmp_path, capsys)
    assert "\nViSpec: tree auto, chosen while it answers.\n" in printed
    (line,) = [line for line in printed.splitlines() if re.match(r"\|\s+\| plain steps", line)]
    assert line.count(" 50.0 % ") == 1 and line.count(" 100.0 % ") == 1
    found = json.loads(report(tmp_path, capsys, "--format", "json"))["tables"][0]["methods"][0]["benchmarks"]
    assert (found["gqa"]["plain_steps"], found["sqa"]["plain_steps"]) == (2, 8)
    assert found["sqa"]["tau"] == {"value": None, "interval": None} and found["sqa"]["accepted_rounds"] == {}
    rows = {row["benchmark"]: row for row in csv.DictReader(io.StringIO(report(tmp_path, capsys, "--format", "csv")))}
    assert rows["sqa"]["tau"] == "" and rows["sqa"]["plain_steps"] == "8"
    (tmp_path / "gqa" / "vispec-temperature-0.0.jsonl").unlink()
    (tmp_path / "gqa" / "vispec-temperature-0.0.jsonl.meta.json").unlink()
    assert "Share of rounds" not in report(tmp_path, capsys, "--figure", str(tmp_path / "x.png"))


def test_equal_questions_have_an_interval_of_one_point(folder):
    (table,) = read_results(folder).tables
    for estimate in (table.rows[2].cells["gqa"].estimates["speedup"], table.rows[2].average("speedup")):
        assert estimate.interval == pytest.approx((estimate.value, estimate.value))


def random_arms(questions: int) -> tuple[list, list]:
    random.seed(3)
    arms: tuple[list, list] = ([], [])
    for _ in range(questions):
        tokens = random.randint(1, 30)  # one token: nothing is decoded and there is no round
        for index, found in enumerate(arms):
            decode = 0.0 if tokens == 1 else tokens * random.uniform(0.5, 1.5)
            lengths = [random.randint(0, 4) for _ in range(tokens // 3)] if index else []
            found.append([Answer([1] * tokens, tokens - 2, 1 + decode, decode, lengths)])
    return arms


def test_draws_are_those_of_a_slow_computation():
    arms = random_arms(8)
    comparison = compare(*arms)
    found = estimates(comparison, *arms, stream=5)
    drawn = np.random.default_rng([SEED, 5]).integers(8, size=(DRAWS, 8))
    for draw in range(0, DRAWS, 20):
        one = compare(*([answers[question] for question in drawn[draw]] for answers in arms))
        for name, estimate in found.items():
            assert estimate.draws[draw] == pytest.approx(getattr(one, name))
    for name, estimate in found.items():
        low, high = estimate.interval
        assert low < estimate.value == getattr(comparison, name) < high


def test_interval_is_near_that_of_other_draws():
    arms = random_arms(40)
    comparison = compare(*arms)
    found = estimates(comparison, *arms, stream=0)["speedup"]
    random.seed(9)
    speeds = [[wall_speed(answers) for answers in one] for one in arms]
    ratios = []
    for _ in range(4000):
        drawn = random.choices(range(40), k=40)
        plain, ours = (sum(one[question] for question in drawn) for one in speeds)
        ratios.append(ours / plain)
    ratios.sort()
    low, high = found.interval
    assert low == pytest.approx(ratios[100], abs=0.1 * (high - low))
    assert high == pytest.approx(ratios[3900], abs=0.1 * (high - low))


def test_one_question_has_no_interval():
    one = [[Answer([1, 2], 0, 2.0, 1.0, [1])]]
    found = estimates(compare(one, one), one, one, stream=0)
    assert found["speedup"].value == 1.0 and found["speedup"].interval is None
    assert average(list(found.values())).interval is None and average([]).value is None


def test_missing_arms_are_holes_with_notices(folder, capsys):
    speed.main(["--results", str(folder)])
    printed = capsys.readouterr()
    ours = map(_cells, printed.out.split("Published")[0].splitlines())
    lines = {tuple(cells[:2]): cells[2:] for cells in ours if len(cells) == 11}
    assert lines["Medusa", "speedup"] == ["—"] * 9
    assert lines["EAGLE-2", "speedup"] == ["—"] * 6 + ["1.00", "—", "1.00 (1)"]
    assert lines["ViSpec", "speedup"] == ["1.50", *["—"] * 5, "2.00", "—", "1.75 (2)"]
    assert lines["baseline", "tokens/s"] == ["1.67", *["—"] * 5, "1.25", "—", "1.46 (2)"]
    # ViSpec says the same on both benchmarks, EAGLE-2 something else on its one
    assert printed.out.count(" 100.0 %") == 2 and printed.out.count(" 0.0 %") == 1
    notices = printed.err
    assert "temperature 0, vispec: no answers to mmvet, textvqa, mme, coco_caption, vizwiz, seed_bench" in notices
    assert f"(expected {folder}/{{mmvet,textvqa,mme,coco_caption,vizwiz,seed_bench}}/vispec-temperature-0.0" in notices
    assert f"{folder}/mme/medusa-temperature-0.0.jsonl: no baseline to compare with" in notices


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_names_of_target_and_draft_head(tmp_path, capsys):
    common = {"base_model": str(embedded.TARGET), "spec_model": str(embedded.DRAFT), "tree": [12, 3, 4]}
    arm(tmp_path, "gqa", "vispec", vispec_answers(1.0, [3]), **common)
    printed = report(tmp_path, capsys)
    assert "## the embedded target, temperature 0\n" in printed and "draft head weights/draft, tree 12/3/4" in printed
    assert str(embedded.WEIGHTS) not in printed


def test_markdown_tables_are_rectangular_and_aligned(folder, capsys):
    for table in report(folder, capsys).split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({(len(line), line.count("|")) for line in lines}) <= 1
        assert not lines or set(lines[1]) <= set("|-: ")


def test_a_method_of_another_temperature_is_a_hole(folder, capsys):
    arm(folder, "gqa", "baseline", baseline_answers(3.0), temperature=1.0)
    first, second = read_results(folder).tables
    assert (first.temperature, second.temperature) == (0.0, 1.0)
    assert [row.benchmarks for row in second.rows] == [0, 0, 0] and second.rows[2].histogram == {}
    assert "temperature 1, vispec: no answers" in "\n".join(read_results(folder).notices)
    assert "identical" not in report(folder, capsys).split("temperature 1\n")[1].split("speedup: mean")[0]


def test_questions_of_one_arm_and_unfinished_files(folder):
    arm(folder, "gqa", "baseline", {1: [choice([1, 2], 4.0, 3.0)], 7: [choice([1], 1.0, 0.0)]})
    arm(folder, "vizwiz", "vispec", {}, tree=[30, 3, 8], spec_model="head")
    (folder / "loose.jsonl").write_text("{}\n")
    results = read_results(folder)
    cell = results.tables[0].rows[2].cells["gqa"]
    assert cell.comparison.questions == 1 and cell.estimates["tau"].interval is None
    notices = "\n".join(results.notices)
    assert "vispec-temperature-0.0.jsonl: 2 question(s) that only one arm has answered" in notices
    assert "vizwiz/vispec-temperature-0.0.jsonl is not counted: it has no answer yet" in notices
    assert "loose.jsonl is not counted: no loose.jsonl.meta.json beside it" in notices


def test_questions_that_were_left_out_are_counted(folder, capsys):
    for method in ("baseline", "vispec"):
        path = folder / "gqa" / f"{method}-temperature-0.0.jsonl"
        meta = json.loads(meta_path(path).read_text())
        # the second one has been answered since
        meta["left_out"] = [{"question_id": name, "reason": "no picture"} for name in (8, 1, 9)]
        meta_path(path).write_text(json.dumps(meta))
    assert f"{path}: 2 question(s) left out, the first one is question 8: no picture" in read_results(folder).notices
    lines = [_cells(line) for line in report(folder, capsys).splitlines() if "| left out" in line]
    assert len(lines) == 2 and all(line[2:] == ["—"] * 6 + ["2", "—", ""] for line in lines)
    files = json.loads(report(folder, capsys, "--format", "json"))["tables"][0]["files"]
    assert sum(len(file["left_out"]) for file in files) == 4
    pair = [str(path.with_name(f"{method}-temperature-0.0.jsonl")) for method in ("baseline", "vispec")]
    assert speed.main(["--baseline", pair[0], "--spec", pair[1]]) == 0
    assert capsys.readouterr().err.count("2 question(s) left out") == 2


def test_no_common_question_is_a_hole(folder):
    arm(folder, "sqa", "baseline", {"other": [choice([1, 2], 4.0, 3.0)]})
    assert read_results(folder).tables[0].rows[2].cells["sqa"] is None


def test_two_files_of_one_cell_are_refused(folder):
    path = arm(folder / "again", "gqa", "vispec", vispec_answers(1.0, [3]))
    with pytest.raises(ValueError, match="two files answer gqa by vispec at temperature 0.0") as error:
        read_results(folder)
    assert str(path) in str(error.value) and f"{folder}/gqa/vispec" in str(error.value)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"dtype": "float16"}, "cannot stand in one table: dtype is"),
        ({"max_new_tokens": 8}, "cannot stand in one table: max_new_tokens is"),
        ({"data": "elsewhere"}, "the arms cannot be compared: data is"),
        ({"tree": [8, 3, 3]}, "cannot stand in one row: tree is"),
    ],
)
def test_answers_with_other_settings_are_refused(folder, change, line):
    arm(folder, "sqa", "vispec", vispec_answers(1.0, [2]), **{"tree": [30, 3, 8], "spec_model": "head", **change})
    with pytest.raises(ValueError, match=line):
        read_results(folder)


def test_folders_without_answers_and_settings_without_a_method(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        read_results(tmp_path / "x")
    with pytest.raises(ValueError, match="found no answer file"):
        read_results(tmp_path)
    write(tmp_path / "a.jsonl", {})
    with pytest.raises(ValueError, match=r"a.jsonl.meta.json: expected settings .* no method, base_model"):
        read_results(tmp_path)


def test_csv_and_json_say_the_same(folder, capsys):
    rows = list(csv.DictReader(io.StringIO(report(folder, capsys, "--format", "csv"))))
    assert len(rows) == 4 * 9  # baseline and three methods, eight benchmarks and the average
    by_cell = {(row["method"], row["benchmark"]): row for row in rows}
    found = json.loads(report(folder, capsys, "--format", "json"))
    (table,) = found["tables"]
    assert found["provenance"]["versions"] and len(table["files"]) == 6
    for method in table["methods"]:
        for benchmark, cell in [*method["benchmarks"].items(), (AVERAGE, method[AVERAGE])]:
            row = by_cell[method["method"], benchmark]
            for measure in ("speedup", "decode_speedup", "tau"):
                value = cell[measure] if cell else {"value": None, "interval": None}
                expected = [value["value"], *(value["interval"] or (None, None))]
                assert [_float(row[measure + end]) for end in ("", "_low", "_high")] == expected
    gqa = by_cell["vispec", "gqa"]
    assert [gqa[f"accepted_{n}"] for n in range(4)] == ["2", "0", "0", "2"] and gqa["published_speedup"] == "2.22"
    assert by_cell["baseline", "gqa"]["questions"] == "2" and by_cell["vispec", "mmvet"]["questions"] == ""


def _float(text: str) -> float | None:
    return float(text) if text else None


def test_the_published_table(folder, capsys):
    assert (*BENCHMARK_TITLES, "mmspec") == tuple(BENCHMARKS)
    for model, temperature, method, pair in (
        (LLAVA, 0.0, "vispec", (2.58, 2.98)),
        ("/models/llava-v1.6-vicuna-13b-hf", 1.0, "eagle2", (1.79, 1.47)),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 0.0, "medusa", (1.11, 0.60)),
    ):
        assert published(model, temperature)[method][AVERAGE] == pair
    assert published("Qwen/Qwen2.5-VL-3B-Instruct", 0.0)["vispec"]["vizwiz"] == (1.71, 2.22)
    for name in PUBLISHED:
        columns = published(name, 0.0)["vispec"]
        for index in (0, 1):
            mean = sum(columns[benchmark][index] for benchmark in BENCHMARK_TITLES) / 8
            assert columns[AVERAGE][index] == pytest.approx(mean, abs=0.0101)
    assert published("llava-hf/llava-1.5-7b-hf", 0.0) == {} == published(LLAVA, 0.5)
    printed = report(folder, capsys)
    assert "Published, not measured here" in printed
    arm(folder / "own", "gqa", "baseline", baseline_answers(3.0), base_model="/my/model")
    assert "Published" not in report(folder / "own", capsys)


def test_the_page_on_slow_speedups_is_arithmetic():
    text = (Path(__file__).parent.parent / "docs" / "why-slower.md").read_text(encoding="utf-8")
    rows = [_cells(line) for line in text.splitlines() if line.startswith(("| LLaVA", "| Qwen"))]
    assert len(rows) == 4 * 3
    for index, (target, method, *cells) in enumerate(rows):
        name = PUBLISHED[index // 3]
        assert target.split()[-1].lower() in name.lower()
        for temperature, pair, cost in ((0.0, *cells[:2]), (1.0, *cells[2:])):
            theirs = {title(key): found for key, found in published(name, temperature).items()}
            speedup, tau = theirs[method][AVERAGE]
            assert pair == f"{speedup:.2f}, {tau:.2f}" and cost == f"{(tau + 1) / speedup:.2f}"
    examples = {cells[0]: cells[1:] for cells in map(_cells, text.splitlines()) if len(cells) == 5}
    tokens, speedups = examples["further tokens"], examples["speedup"]
    assert speedups == [f"{(25 + n) / (25 + n / 2.58):.2f}" for n in map(int, tokens)]


def test_the_readme_has_the_published_averages():
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    rows = [_cells(line) for line in re.findall(r"^\| \S+ \w+ \| [01] \|.* / .*", text, re.MULTILINE)]
    assert len(rows) == 4 * 2
    for index, (target, temperature, *cells) in enumerate(rows):
        name = PUBLISHED[index // 2]
        assert target.split()[-1].lower() in name.lower()
        pairs = [found[AVERAGE] for found in published(name, float(temperature)).values()]
        assert cells == [f"{speedup:.2f} / {tau:.2f}" for speedup, tau in pairs]


def test_the_commands_of_the_page_on_slow_speedups_exist(capsys):
    """Each of its lines, with flags that the command has; what is said of other commands' flags too."""
    text = (Path(__file__).parent.parent / "docs" / "why-slower.md").read_text(encoding="utf-8")
    lines = re.findall(r"python -m (vispec[\w.]+)([^`\n#]*)", text)
    assert {name for name, _ in lines} > {"vispec.generate", "vispec.evaluation.speed", "vispec.evaluation.bench"}
    for name, flags in [*lines, ("vispec.evaluation.bench", "--profile")]:
        with pytest.raises(SystemExit) as done:
            import_module(name).main(["--help"])
        shown = capsys.readouterr().out
        assert done.value.code == 0
        assert all(f"{flag} " in shown.replace("\n", " ") for flag in re.findall(r"--[\w-]+", flags)), (name, flags)
    with pytest.raises(SystemExit):
        import_module("vispec.evaluation.gen_spec_answer_gqa").main(["--help"])
    assert "-1 measures which tree" in " ".join(capsys.readouterr().out.split())


def test_figures(folder, tmp_path, capsys):
    arm(folder, "gqa", "baseline", baseline_answers(3.0), temperature=1.0)
    report(folder, capsys, "--figure", str(tmp_path / "lowest.png"))
    report(folder, capsys, "--figure", str(tmp_path / "t{T}.png"))
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["lowest.png", "t0.png", "t1.png"]
    for name in drawn:
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert picture.size == (round(chart.WIDTH * chart.DPI), round(chart.HEIGHT * chart.DPI))
    assert (tmp_path / "lowest.png").read_bytes() == (tmp_path / "t0.png").read_bytes()
    assert (tmp_path / "t0.png").read_bytes() != (tmp_path / "t1.png").read_bytes()


def test_figures_that_are_refused(folder, tmp_path, monkeypatch):
    arm(folder, "gqa", "baseline", baseline_answers(3.0), base_model="other")
    with pytest.raises(ValueError, match="--figure: found answers of 2 targets, expected one"):
        speed.main(["--results", str(folder), "--figure", str(tmp_path / "x.png")])
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs matplotlib"):
        speed.main(["--results", str(folder), "--figure", str(tmp_path / "x.png")])


def test_the_command(folder):
    command = [sys.executable, "-m", "vispec.evaluation.speed", "--results", str(folder), "--format", "csv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("base_model,")
