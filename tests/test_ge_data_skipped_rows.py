"""Rows that cannot be used are left out with their reasons, and the others become samples."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tiny_rows import (
    TARGETS,
    generate,
    manifest_of,
    turn,
    write_rows,
)

from vispec.ge_data import jobs
from vispec.ge_data.conversations import SkipRow
from vispec.ge_data.jobs import ImageJob, Settings
from vispec.ge_data.sources import Rows, load_image, shuffled
from vispec.model.loading import load_target
from vispec.model.target import Target


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"), images=8)


def test_bad_conversations_are_counted_and_listed(tmp_path, capsys):
    good = [turn("human", "what?"), turn("gpt", "a dog.")]
    bad = {
        "no conversation": [],
        "malformed turn": [turn("human", 3), turn("gpt", "a")],
        "broken unicode": [turn("human", "a \ud83d"), turn("gpt", "b")],
        "roles do not alternate": [*good, turn("gpt", "b")],
        "no human turn": [turn("gpt", "a")],
        "no answer": [turn("human", "a")],
        "no answer within the length limit": [turn("human", "a" * 300), turn("gpt", "b")],
        "image tag in a text conversation": [turn("human", "<image> a"), turn("gpt", "b")],
    }
    rows = [{"id": reason, "conversations": turns} for reason, turns in [*bad.items(), ("good", good), *bad.items()]]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    assert generate("text", "llava", tmp_path, out, "--store", "tokens", "--max-len", "250") == 0
    order = [row["id"] for row in (shuffled(rows)[i] for i in range(len(rows)))]
    skipped = manifest_of(out)["skipped"]
    assert skipped.keys() == bad.keys()
    for reason, entry in skipped.items():
        assert entry == {"count": 2, "rows": [i for i, found in enumerate(order) if found == reason]}
    assert manifest_of(out)["samples"] == 1
    assert "skipped, no human turn: 2 (rows " in capsys.readouterr().out


@pytest.fixture(scope="module")
def target():
    return Target(load_target(TARGETS["llava"]))


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(TARGETS["llava"])


@pytest.mark.parametrize("store", ["tokens", "pairs"])
def test_malformed_rows_end_no_run(tmp_path, store):
    """Whatever stands in a row's place is skipped, and the rows beside it become samples."""
    good = [turn("human", "what?"), turn("gpt", "a dog.")]
    turns = [None, "what?", 3, {"from": "human"}, [None, None], ["human", "gpt"], [{"from": "human"}], [{"value": "a"}]]
    turns += [[turn("human", value), good[1]] for value in (None, 3, ["a"], {"a": 1})]
    turns += [[{"from": ["human"], "value": "a"}, good[1]], [{"value": "a"}, good[1], *good[:1]]]
    rows = [{"conversations": value} for value in turns] + [None, [], "row", 3, {}]
    rows += [{"conversations": [turn("human", ""), good[1]]}, {"conversations": good}]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    assert generate("text", "llava", tmp_path, tmp_path / "out", "--store", store) == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["samples"] == 2
    assert sum(entry["count"] for entry in manifest["skipped"].values()) == len(rows) - 2


def reasons(target, processor, rows, family="llava", **settings):
    job = ImageJob(target, processor, rows.folder, Settings(family, max_new_tokens=4, **settings))
    return {index: str(found) for index, found in job.samples(rows.at(range(len(rows))), range(len(rows)))}


def test_bad_image_rows_have_reasons(data, target, processor, tmp_path):
    shutil.copy(data / "text.json", tmp_path / "text.png")
    question = [turn("human", "<image>\nname it")]
    outside = "image outside of the data folder (--allow-outside reads it)"
    cases = [
        ({"image": "0.png"}, "no human turn"),
        ({"image": "0.png", "conversations": [turn("gpt", "<image>")]}, "no human turn"),
        ({"image": "0.png", "conversations": [turn("human", None)]}, "no human turn"),
        ({"image": "0.png", "conversations": [turn("human", "name it")]}, "image tag missing"),
        ({"image": "0.png", "conversations": [turn("human", "<image><image>")]}, "more than one image tag"),
        ({"conversations": question}, "no image"),
        ({"image": "gone.png", "conversations": question}, "unreadable image"),
        ({"image": "text.png", "conversations": question}, "unreadable image"),
        ({"image": None, "conversations": question}, "no image"),
        ({"image": "", "conversations": question}, "unreadable image"),
        ({"image": "../a.png", "conversations": question}, outside),
        ({"image": "/a.png", "conversations": question}, outside),
        ({"image": "a\0.png", "conversations": question}, "unreadable image"),
        ({"image": "dot.png", "conversations": [turn("human", "<im<image>age>")]}, "more than one image tag"),
        ({"image": "dot.png", "conversations": [turn("human", "<image> \ud83d")]}, "broken unicode"),
        ({"image": "dot.png", "conversations": {"from": "human"}}, "no human turn"),
        ({"image": "dot.png", "conversations": [None, ["human"], {"value": "<image>"}]}, "no human turn"),
        (None, "no human turn"),
        ("row", "no human turn"),
    ]
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    rows = Rows([row for row, _ in cases], range(len(cases)), tmp_path)
    assert reasons(target, processor, rows) == {i: reason for i, (_, reason) in enumerate(cases)}


def test_images_outside_of_the_folder_where_that_is_asked_for(target, processor, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    rows = [
        {"image": name, "conversations": [turn("human", "<image>")]} for name in ("../dot.png", tmp_path / "dot.png")
    ]
    rows = Rows([{**row, "image": str(row["image"])} for row in rows], range(2), tmp_path / "data")
    (tmp_path / "data").mkdir()
    found = reasons(target, processor, rows, allow_outside=True)
    assert all(sample.startswith("Sample(") for sample in found.values())


def test_image_tokens_in_a_question_of_qwen_are_no_second_image(tmp_path, monkeypatch):
    from transformers import AutoProcessor

    Image.new("RGB", (56, 56)).save(tmp_path / "0.png")
    rows = [
        {"image": "0.png", "conversations": [turn("human", f"<image> {text}")]}
        for text in ("<|image_pad|>", "<|vision_start|><|video_pad|>")
    ]
    target = Target(load_target(TARGETS["qwen"]))
    limits = {"min_pixels": 784, "max_pixels": 7056}
    processor = AutoProcessor.from_pretrained(TARGETS["qwen"], **limits)
    found = reasons(target, processor, Rows(rows, range(2), tmp_path), "qwen")
    assert found == dict.fromkeys(range(2), "more than one image tag")
    Image.new("RGB", (1, 300)).save(tmp_path / "0.png")
    for token in (target.config.vision_start_token_id, target.config.image_token_id, target.config.video_token_id):
        monkeypatch.setattr(jobs, "generate_answers", lambda *_, token=token, **seeds: [torch.tensor([5, token])])
        Image.new("RGB", (56, 56)).save(tmp_path / "1.png")
        rows = [{"image": "1.png", "conversations": [turn("human", "<image>")]}]
        assert reasons(target, processor, Rows(rows, range(1), tmp_path), "qwen") == {0: "image tag in the answer"}
    rows = [{"image": "0.png", "conversations": [turn("human", "<image>")]}]
    narrow = reasons(target, processor, Rows(rows, range(1), tmp_path), "qwen")
    assert narrow == {0: "the processor refuses the image"}


def test_rows_without_room_or_answer_have_reasons(data, target, processor, monkeypatch):
    rows = load_image(str(data))
    rows.order = rows.order[:1]
    assert reasons(target, processor, rows, max_len=60) == {0: "prompt exceeds the length limit"}
    end = torch.tensor(target.eos_token_ids[:1])
    monkeypatch.setattr(jobs, "generate_answers", lambda *arguments, **seeds: [end])
    assert reasons(target, processor, rows) == {0: "empty answer"}
    media = torch.tensor([5, target.config.image_token_index, *end])
    monkeypatch.setattr(jobs, "generate_answers", lambda *arguments, **seeds: [media])
    assert reasons(target, processor, rows) == {0: "image tag in the answer"}
    monkeypatch.setattr(jobs, "generate_answers", lambda *arguments, **seeds: [end])
    job = ImageJob(target, processor, rows.folder, Settings("llava"))
    assert isinstance(next(job.samples(rows.at([0]), [0]))[1], SkipRow)
