"""MMSpec: conversations in which each arm reads its own answers, what becomes of odd items, the report by topic."""

import csv
import io
import json
from pathlib import Path

import benchmark_rows
import pytest
from answer_files import choice, write

from vispec.evaluation import answerer, run_all, speed
from vispec.evaluation.answer_file import answers_of
from vispec.evaluation.benchmarks import BENCHMARKS, Question
from vispec.evaluation.benchmarks.mmspec import TOPICS
from vispec.evaluation.loading import Models
from vispec.evaluation.measure import Generation
from vispec.evaluation.results import ALL_TOPICS, read_results
from vispec.evaluation.runner import Plan
from vispec.model import decoding

FAMILY = Path(__file__).parent / "golden" / "llava_next"
TARGET, VISPEC = (str(FAMILY / name) for name in ("target", "draft_vispec"))


def write_mmspec(folder: Path, rows: list[dict], pictures=None) -> Path:
    (folder / "MMSpec" / "test").mkdir(parents=True)
    benchmark_rows.write_rows("mmspec", folder / "MMSpec" / "test", rows)
    for row in rows if pictures is None else pictures:
        benchmark_rows.save_image(folder / "MMSpec" / "test" / "images" / row["image"])
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_conversation_goes_on_with_the_arms_own_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answerer, "WARM_UPS", 1)
    talk = benchmark_rows.mmspec_row(1, "What is it?", "Why?", "And then?", topic=TOPICS[-1])
    gone = benchmark_rows.mmspec_row(2, "Who?")
    long = benchmark_rows.mmspec_row(3, "What?", "far " * 3000)
    alone = benchmark_rows.mmspec_row(4, "Where?", topic="charts of another release")
    data = write_mmspec(tmp_path / "data", [talk, gone, long, alone], [talk, long, alone])
    seen = []
    build = answerer.build_inputs
    monkeypatch.setattr(
        answerer, "build_inputs", lambda processor, turns: seen.append(turns) or build(processor, turns)
    )
    flags = ["--base-model-path", TARGET, "--spec-model-path", f"vispec={VISPEC}", "--data-root", str(data)]
    flags += ["--benchmarks", "mmspec", "--methods", "vispec", "--max-new-token", "5", "--out", str(tmp_path / "out")]
    assert run_all.main(flags) == 0
    said = capsys.readouterr()
    assert "lossless: 2 of 2 questions" in said.out and "question 2 is left out: " in said.err
    assert "question 3 is left out: the prompt has" in said.err
    folder = tmp_path / "out" / "mmspec"
    plain, ours = (lines(folder / f"{arm}-temperature-0.0.jsonl") for arm in ("baseline", "vispec"))
    assert [line["question_id"] for line in ours] == [1, 4] and ours[0]["topic"] == TOPICS[-1]
    (spoken,), (same,) = ours[0]["choices"], plain[0]["choices"]
    assert spoken["output_ids"] == same["output_ids"] and len(spoken["turns"]) == len(spoken["rounds"]) == 3
    assert sum(spoken["rounds"]) == len(spoken["acceptance_length"])
    last = max((turns for turns in seen if turns[0].items[1] == "What is it?"), key=len)
    assert [turn.role for turn in last] == ["user", "assistant"] * 2 + ["user"]
    assert [turn.items[0] for turn in last if turn.role == "assistant"] == spoken["turns"][:2]
    answers = answers_of(ours[0])
    assert [len(answer.acceptance_lengths) for answer in answers] == spoken["rounds"]
    assert all(answer.plain_steps == 0 for answer in answers)

    (row, _) = lines(folder / "vispec-temperature-0.0.mmspec-rows")
    assert list(row) == ["question_id", "topic", "category", "answer_id", "model_id", "choices", "tstamp"]
    assert row["choices"][0] == {name: spoken[name] for name in row["choices"][0]}
    assert row["choices"][0].keys() == {"index", "turns", "idxs", "new_tokens", "wall_time", "acceptance_length"}

    # goes on where it stopped: one line is lost
    path = folder / "vispec-temperature-0.0.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    assert run_all.main([*flags, "--dry-run"]) == 0 and "vispec       1 of 4 answered" in capsys.readouterr().out
    assert run_all.main(flags) == 0
    assert [line["choices"][0]["output_ids"] for line in lines(path)] == [
        line["choices"][0]["output_ids"] for line in plain
    ]

    assert speed.main(["--results", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "MMSpec (arXiv 2603.14989) by topic" in said.out and "charts of another release" in said.out
    assert "no answers to" not in said.err


def test_each_arm_reads_on_what_it_has_read_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answerer, "WARM_UPS", 1)
    reused, read = [], decoding.read_prompt
    monkeypatch.setattr(
        decoding, "read_prompt", lambda *given: reused.append((prompt := read(*given)).reused) or prompt
    )
    rows = [benchmark_rows.mmspec_row(number, "What is it?", "Why?", "And then?") for number in (1, 2)]
    data = write_mmspec(tmp_path / "data", rows)
    flags = ["--base-model-path", TARGET, "--spec-model-path", f"vispec={VISPEC}", "--data-root", str(data)]
    flags += ["--benchmarks", "mmspec", "--methods", "vispec", "--max-new-token", "5", "--out"]
    whole, kept = tmp_path / "whole", tmp_path / "kept"
    assert run_all.main([*flags, str(whole)]) == 0 and not any(reused)
    reused.clear()
    assert run_all.main([*flags, str(kept), "--prefix-cache", "9000"]) == 0
    # behind a warm-up of each arm: two conversations about one picture, by two arms, of three turns each
    assert [count > 0 for count in reused[2:]] == 4 * [False, True, True]
    for arm in ("baseline", "vispec"):
        files = [folder / "mmspec" / f"{arm}-temperature-0.0.jsonl" for folder in (whole, kept)]
        same, found = ([line["choices"][0]["output_ids"] for line in lines(path)] for path in files)
        assert same == found
    assert speed.main(["--results", str(kept)]) == 0
    assert " by topic, which no average above counts, turns read on (--prefix-cache 9000):" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was made with prefix_cache 9000, found 99;"):
        run_all.main([*flags, str(kept), "--prefix-cache", "99"])
    with pytest.raises(ValueError, match="--prefix-cache: generate, .* reads every turn whole"):
        run_all.main([*flags, str(kept), "--prefix-cache", "9000", "--methods", "generate"])


def test_where_no_turn_follows_another_no_prompts_are_kept(tmp_path):
    alone = Plan(BENCHMARKS["gqa"], {}, [Question(1, ())], "data", slice(None), Generation(0.0, 5))
    with pytest.raises(ValueError, match="--prefix-cache: gqa has no conversations"):
        alone.add(Models(TARGET, prefix_cache=9), "baseline", tmp_path / "answers.jsonl", "")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"turns": []}, "turns is \\[\\]"),
        ({"turns": ["a", 3]}, "turns is \\['a', 3\\]"),
        ({"turns": "a"}, "turns is 'a'"),
        ({"topic": 3}, "topic is 3"),
        ({"id": 1.5}, "question_id is 1.5"),
        ({"image": None}, "image is None"),
    ],
)
def test_an_item_that_is_not_as_published_is_named(changes, named, tmp_path):
    rows = [benchmark_rows.mmspec_row(1, "a"), benchmark_rows.mmspec_row(2, "a") | changes]
    folder = write_mmspec(tmp_path, rows, pictures=[]) / "MMSpec"
    for place in (folder, folder / "test"):
        with pytest.raises(ValueError, match=rf"mmspec: .*mmspec.jsonl, row 2: expected the fields id, .*{named}"):
            BENCHMARKS["mmspec"].questions(str(place))


def test_topics_are_rows_of_the_report(tmp_path, capsys):
    """A conversation of two turns: the first has a round and a plain step, the second a round."""
    talk = choice([1, 2, 3], 2.0, 1.0, [1], plain_steps=1)
    second = choice([4, 5, 6], 2.0, 1.0, [1])
    both = {name: talk[name] + second[name] for name in talk if name not in ("index", "acceptance_length")}
    ours = both | {"acceptance_length": [1, 1], "rounds": [1, 1]}
    plain = both | {"wall_time": [4.0, 4.0], "output_ids": [[1, 2, 3], [4, 5, 7]]}
    for arm, of_two in (("baseline", plain), ("vispec", ours)):
        settings = {"benchmark": "mmspec", "method": arm, "base_model": "b"}
        single = choice([1, 2], 2.0, 1.0, None if arm == "baseline" else [1])
        path = write(tmp_path / f"{arm}.jsonl", {1: [single], 2: [of_two]}, **settings)
        topics = ("text vqa", TOPICS[-1])
        told = [line | {"topic": topic} for line, topic in zip(lines(path), topics, strict=True)]
        path.write_text("".join(json.dumps(line) + "\n" for line in told))
    (table,) = read_results(tmp_path).tables
    cells = table.topics["vispec"]
    assert list(cells) == ["text vqa", TOPICS[-1], ALL_TOPICS]
    found = cells[TOPICS[-1]].comparison
    assert (found.speedup, found.tau, found.plain_steps, found.identical_questions) == (2.0, 1.0, 1, 0)
    assert cells[ALL_TOPICS].comparison.questions == 2 and cells["text vqa"].comparison.identical_questions == 1
    for kind in ("csv", "json"):
        assert speed.main(["--results", str(tmp_path), "--format", kind]) == 0
        text = capsys.readouterr().out
        if kind == "csv":
            rows = {row["topic"]: row for row in csv.DictReader(io.StringIO(text)) if row["topic"]}
            assert rows[TOPICS[-1]]["speedup"] == "2.0" and rows[TOPICS[-1]]["benchmark"] == "mmspec"
        else:
            assert json.loads(text)["tables"][0]["mmspec"]["vispec"][TOPICS[-1]]["tau"]["value"] == 1.0


@pytest.mark.parametrize("rounds", [[1], [1, 2], [2, -1], "1 1"])
def test_rounds_that_do_not_fit_are_named(rounds):
    one = choice([1, 2], 2.0, 1.0, [1])
    both = {name: 2 * one[name] for name in one if name != "index"} | {"rounds": rounds}
    with pytest.raises(ValueError, match="question 7: rounds: expected"):
        answers_of({"question_id": 7, "choices": [both]})
