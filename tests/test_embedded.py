"""The files beside the embedded weights against what the demo renders."""

import pytest
from PIL import ImageChops

from vispec import SpecModel, embedded
from vispec.cli import UserError
from vispec.demo import ship_questions
from vispec.demo.runner import questions
from vispec.prompts import build_inputs, image_file, load_processor, user_turn


def same(picture, other) -> bool:
    return picture.size == other.size and ImageChops.difference(picture, other).getbbox() is None


def test_the_shipped_questions_are_those_of_the_demo():
    rendered = questions(ship_questions.SHIPPED)
    shipped = embedded.questions()
    assert [text for _, text in shipped] == [asked.text for asked in rendered]
    assert all(same(image_file(path)(), asked.image) for (path, _), asked in zip(shipped, rendered, strict=True))
    assert len({path.read_bytes() for path, _ in shipped}) == len(shipped)
    assert not same(rendered[0].image, rendered[1].image)


def test_the_small_one_drafts_for_the_target():
    """Without training for it, and in few bytes."""
    assert sum(path.stat().st_size for path in embedded.SMALL.iterdir()) < 2e6
    plain = SpecModel.from_pretrained(*embedded.require_weights(), torch_dtype="float32")
    model = SpecModel.from_pretrained(plain.target.model, str(embedded.SMALL), tree=embedded.TREE_NAME)
    picture, text = embedded.questions()[0]
    inputs = build_inputs(load_processor(str(embedded.TARGET)), [user_turn(text, image_file(picture))])
    options = {"max_new_tokens": 40, "do_sample": False}
    found = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert found.sequences.tolist() == plain.target.model.generate(**inputs, **options).tolist()
    assert found.tau > 1


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
