"""Scenes, their splits, what is said about them, and the data files made from them."""

import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from vispec.cli import UserError
from vispec.demo import make_data
from vispec.demo.conversations import VICUNA_SYSTEM, chatml_pieces, training_conversation, vicuna_pieces
from vispec.demo.language import KINDS, answer
from vispec.demo.prompt_lookup import prompt_lookup_hits, prompt_lookup_share
from vispec.demo.questions import CAPTION_QUESTION, ask
from vispec.demo.scenes import (
    IMAGE_SIZE,
    SPLIT_BUCKETS,
    SPLIT_SEEDS,
    bucket_of,
    make_scene,
    render,
    scene_of,
)
from vispec.prompts import SYSTEM_TURN


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def test_seed_ranges_and_buckets_are_disjoint():
    ranges = sorted(SPLIT_SEEDS.values(), key=lambda r: r.start)
    assert all(a.stop <= b.start for a, b in zip(ranges, ranges[1:], strict=False))
    buckets = [b for bs in SPLIT_BUCKETS.values() for b in bs]
    assert sorted(buckets) == list(range(16))


def test_scenes_of_different_splits_differ():
    boards = {split: {scene_of(split, i).triples for i in range(3000)} for split in SPLIT_SEEDS}
    assert not boards["train"] & boards["draft"]
    assert not boards["train"] & boards["eval"]
    assert not boards["draft"] & boards["eval"]
    for split in SPLIT_SEEDS:
        for i in range(200):
            assert bucket_of(scene_of(split, i).things) in SPLIT_BUCKETS[split]


def test_a_seed_outside_all_ranges_is_refused():
    with pytest.raises(ValueError, match="15000000"):
        make_scene(15_000_000)


def test_scene_and_picture_follow_from_the_seed():
    for index in range(20):
        scene = scene_of("eval", index)
        assert scene == scene_of("eval", index)
        assert 2 <= len(scene.things) <= 6
        picture = render(scene)
        assert picture.size == (IMAGE_SIZE, IMAGE_SIZE) and picture.mode == "RGB"
        assert np.array_equal(picture, render(scene))


def test_answers_are_deterministic_and_of_the_right_length():
    lengths = []
    for index in range(200):
        scene = scene_of("train", index)
        for kind in KINDS:
            question = ask(kind, scene, random.Random(index))
            assert question == ask(kind, scene, random.Random(index))
            text = answer(scene, question)
            assert text == answer(scene, question)
            assert not re.search(r"[{}]|\.\.| {2}| [,.]|\ba [aeiou]", text), text
            lengths.append(len(words(text)))
    assert 50 <= min(lengths) and max(lengths) <= 230


def test_vocabulary_is_rich_and_answers_cannot_be_copied():
    vocabulary, pairs = set(), []
    for index in range(60):
        scene = scene_of("train", index)
        for kind in KINDS:
            question = ask(kind, scene, random.Random(index))
            reply = words(answer(scene, question))
            vocabulary.update(word.lower() for word in reply if word.isalpha())
            pairs.append((words(f"{SYSTEM_TURN} USER: {question.text} ASSISTANT:"), reply))
    assert len(vocabulary) >= 600
    assert prompt_lookup_share(pairs) < 1 / 3


def test_which_words_are_used_depends_on_the_picture():
    texts = {answer(scene_of("train", i), ask("describe", scene_of("train", i), random.Random(0))) for i in range(100)}
    assert len(texts) == 100


def brute_force_hits(prompt, reply):
    ids, hits = [*prompt, *reply], 0
    for t in range(len(prompt), len(ids)):
        best, guess = 1, None
        for end in range(t - 2, 0, -1):
            n = 0
            while n <= end and ids[end - n] == ids[t - 1 - n]:
                n += 1
            if n > best:
                best, guess = n, ids[end + 1]
        hits += guess == ids[t]
    return hits


def test_prompt_lookup_by_hand():
    assert prompt_lookup_hits([1, 2, 3], [1, 2, 3]) == 1  # after 1 2 comes 3
    assert prompt_lookup_hits([1, 2, 3, 1, 2, 4], [1, 2, 4]) == 1  # the most recent one
    assert prompt_lookup_hits([9, 1, 2, 3, 1, 2, 4], [9, 1, 2, 3]) == 2  # the longest one
    assert prompt_lookup_hits([1], [2, 3]) == 0


def test_prompt_lookup_against_brute_force():
    rng = random.Random(0)
    for _ in range(200):
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 12))]
        reply = [rng.randrange(3) for _ in range(rng.randint(1, 20))]
        assert prompt_lookup_hits(prompt, reply) == brute_force_hits(prompt, reply)


def test_training_conversations_have_the_prompt_forms():
    conversations = [training_conversation("train", i) for i in range(600)]
    text_only = [c for c in conversations if c.scene is None]
    assert 0.05 < len(text_only) / len(conversations) < 0.15
    assert all(vicuna_pieces(c)[0][0].startswith(VICUNA_SYSTEM + " USER: ") for c in text_only)
    assert all(chatml_pieces(c)[0][0].startswith("<|im_start|>system\nYou are a helpful assistant.") for c in text_only)
    prompts = [vicuna_pieces(c)[0][0] for c in conversations if c.scene is not None]
    assert sum(p.startswith(f"{SYSTEM_TURN} USER: <image>\n") for p in prompts) > 0.85 * len(prompts)
    assert f"{SYSTEM_TURN} USER: <image>\n{CAPTION_QUESTION} ASSISTANT:" in prompts
    assert sum("at least 1000 words. ASSISTANT:" in p for p in prompts) > 0.3 * len(prompts)
    assert any("with an explanation. ASSISTANT:" in p for p in prompts)


@pytest.mark.parametrize(("pieces_of", "end"), [(vicuna_pieces, "</s>"), (chatml_pieces, "<|im_end|>")])
def test_exactly_the_answers_are_scored(pieces_of, end):
    for index in range(100):
        conversation = training_conversation("train", index)
        pieces = pieces_of(conversation)
        assert [scored for _, scored in pieces] == [False, True, True] * len(conversation.turns)
        assert [text for text, _ in pieces[2::3]] == [end] * len(conversation.turns)


def test_make_data_writes_the_three_layouts(tmp_path):
    assert make_data.main(["--out", str(tmp_path), "--text", "12", "--images", "20", "--eval", "5", "--seed", "3"]) == 0
    talks = json.loads((tmp_path / "ShareGPT_V3/ShareGPT_V3_unfiltered_cleaned_split.json").read_text())
    assert len(talks) == 12
    for talk in talks:
        assert [m["from"] for m in talk["conversations"]] == ["human", "gpt"] * (len(talk["conversations"]) // 2)
    folder = tmp_path / "LLaVA-Pretrain"
    rows = json.loads((folder / "blip_laion_cc_sbu_558k.json").read_text())
    assert len(rows) == 20
    for row in rows:
        human, gpt = row["conversations"]
        assert human["from"] == "human" and human["value"].count("<image>") == 1
        assert gpt["from"] == "gpt" and gpt["value"]
        assert Image.open(folder / row["image"]).size == (IMAGE_SIZE, IMAGE_SIZE)
    coco = json.loads((tmp_path / "coco/dataset_coco.json").read_text())["images"]
    assert [row["imgid"] for row in coco] == list(range(5))
    for row in coco:
        assert row["split"] == "test" and row["cocoid"] in SPLIT_SEEDS["eval"]
        assert (tmp_path / "coco" / row["filepath"] / row["filename"]).exists()


def test_make_data_refuses_nonsense(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_data.main(["--out", str(tmp_path), "--text", "-1"])
    assert "--text" in capsys.readouterr().err
    with pytest.raises(UserError, match="eval"):
        make_data.main(["--out", str(tmp_path), "--eval", "9999999"])
