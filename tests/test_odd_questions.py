"""Questions that a target's processor or a file cannot take as they are."""

import json

import benchmark_rows
import pytest
from tiny_models import GOLDEN

from vispec.evaluation import gen_baseline_answer_gqa

TARGET = str(GOLDEN / "llava_next" / "target")


@pytest.mark.parametrize("word", ["<image>", "<placeholder>"])
def test_a_question_with_a_word_of_the_processor_is_left_out(tmp_path, word, capsys):
    """And one with half of a surrogate pair is answered, as its id too is written."""
    rows = [benchmark_rows.row("gqa", i) for i in range(3)]
    rows[1]["text"] = f"What is {word}?"
    rows[2] |= {"text": "What is \ud83d?", "question_id": "\ud83d"}
    benchmark_rows.write_rows("gqa", tmp_path, rows)
    for row in rows:
        benchmark_rows.save_image(tmp_path / "images" / row["image"])
    flags = ["--base-model-path", TARGET, "--data-folder", str(tmp_path), "--answer-file", str(tmp_path / "a")]
    flags += ["--temperature", "0", "--max-new-token", "4"]
    for _ in range(2):  # also when it goes on
        assert gen_baseline_answer_gqa.main(flags) == 0
        assert {line["question_id"] for line in map(json.loads, (tmp_path / "a").read_text().splitlines())} == {
            "200",
            "\ud83d",
        }
    assert f"question 201 is left out: the text holds {word}" in capsys.readouterr().err
