"""The files beside the embedded weights against what the demo renders."""

import pytest
from PIL import ImageChops

from vispec import embedded
from vispec.cli import UserError
from vispec.demo import ship_questions
from vispec.demo.runner import questions
from vispec.prompts import image_file


def same(picture, other) -> bool:
    return picture.size == other.size and ImageChops.difference(picture, other).getbbox() is None


def test_the_shipped_questions_are_those_of_the_demo():
    rendered = questions(ship_questions.SHIPPED)
    shipped = embedded.questions()
    assert [text for _, text in shipped] == [asked.text for asked in rendered]
    assert all(same(image_file(path)(), asked.image) for (path, _), asked in zip(shipped, rendered, strict=True))
    assert len({path.read_bytes() for path, _ in shipped}) == len(shipped)
    assert not same(rendered[0].image, rendered[1].image)


def test_the_command_writes_what_is_read(tmp_path, monkeypatch):
    shipped = embedded.questions()
    folder = tmp_path / "questions"
    monkeypatch.setattr(embedded, "QUESTIONS", folder)
    with pytest.raises(UserError, match=r"python -m vispec\.demo\.ship_questions"):
        embedded.questions()
    assert ship_questions.main(["--out", str(folder)]) == 0
    assert [text for _, text in embedded.questions()] == [text for _, text in shipped]
    for (path, _), (other, _) in zip(embedded.questions(), shipped, strict=True):
        assert path.parent == folder and same(image_file(path)(), image_file(other)())
