"""Questions about video files: which frames are read, what processors are told of them, and what is said otherwise."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from vispec import generate, video
from vispec.prompts import build_inputs, load_processor, user_turn
from vispec.video import Video, read_video, video_arguments

GOLDEN = Path(__file__).parent / "golden"
TEMPLATES = json.loads((GOLDEN / "published_chat_templates.json").read_text())
QWEN = GOLDEN / "qwen2_5_vl" / "target"

needs_torchvision = pytest.mark.skipif(
    transformers.__version__ >= "5" and importlib.util.find_spec("torchvision") is None,
    reason="Qwen's processor wants torchvision under transformers 5",
)


def write_video(path: Path, frames: int, rate: int = 10) -> Path:
    """A video whose frames become brighter by an equal step each."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            picture = Image.new("RGB", (64, 48), (5 * i, 5 * i, 5 * i))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def shown(frames: int = 4) -> Video:
    pixels = np.random.default_rng(0).integers(0, 255, (frames, 28, 42, 3), dtype=np.uint8)
    return Video(pixels, list(range(0, 2 * frames, 2)), 2 * frames, 8.0)


@pytest.mark.parametrize(("total", "places"), [(45, [0, 15, 29, 44]), (3, [0, 1, 2]), (1, [0])])
def test_frames_are_evenly_spaced(total, places, tmp_path):
    found = read_video(write_video(tmp_path / "x.mp4", total), frames=4)
    assert (found.places, found.total, found.rate) == (places, total, 10.0)
    assert found.frames.shape == (len(places), 48, 64, 3) and found.frames.dtype == np.uint8
    assert np.abs(found.frames.mean((1, 2, 3)) - 5 * np.array(places)).max() < 6


def test_files_that_are_no_video(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "x.mp4").write_bytes(b"no video")
    for path, message in ((tmp_path / "none.mp4", "none.mp4: no such file"), (tmp_path / "x.mp4", "as a video")):
        with pytest.raises(ValueError, match=message) as caught:
            read_video(path)
        assert "\n" not in str(caught.value)


def test_the_package_that_reads_videos_is_named(monkeypatch):
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"x.mp4: videos are read by PyAV, .* pip install 'vispec\[video\]'"):
        read_video(Path("x.mp4"))


@needs_torchvision
def test_qwen_is_told_when_each_frame_was():
    processor = load_processor(str(QWEN))
    processor.chat_template = TEMPLATES["Qwen/Qwen2.5-VL-3B-Instruct"]
    picture = Image.new("RGB", (42, 28))
    inputs = build_inputs(processor, [user_turn("what?", shown(), picture, shown(6))])
    grids = inputs["video_grid_thw"].tolist()
    assert [grid[0] for grid in grids] == [2, 3], "two frames at a time"
    tokens = (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")).sum()
    assert tokens == sum(t * h * w // 4 for t, h, w in grids)
    assert inputs["second_per_grid_ts"].tolist() == [0.5, 0.5], "every second of 8 frames"


def test_targets_that_take_no_video():
    processor = load_processor(str(GOLDEN / "llava_next" / "target"))
    assert video_arguments(processor, []) == {}
    with pytest.raises(ValueError, match="^the LlavaNextProcessor of the target takes no video$"):
        build_inputs(processor, [user_turn("what?", shown())])


@needs_torchvision
def test_a_question_about_a_video(tmp_path, monkeypatch, capsys):
    path = write_video(tmp_path / "x.mp4", 20)
    load = generate.load_processor

    def with_template(base):
        processor = load(base)
        processor.chat_template = TEMPLATES["Qwen/Qwen2.5-VL-3B-Instruct"]
        return processor

    monkeypatch.setattr(generate, "load_processor", with_template)
    pair = ["--base-model-path", str(QWEN), "--spec-model-path", str(GOLDEN / "qwen2_5_vl" / "draft_vispec")]
    assert generate.main([*pair, "--video", str(path), "--max-new-tokens", "8", "--compare", "what happens?"]) == 0
    assert "outputs identical: yes" in capsys.readouterr().out
