"""Frames of a video file, evenly spaced, for a prompt."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vispec.cli import UserError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

FRAMES = 16
"""Of a video; Qwen's towers read two at a time."""


@dataclass(frozen=True)
class Video:
    """Some frames of a video."""

    frames: np.ndarray
    """(T, H, W, 3) uint8, RGB."""
    places: list[int]
    """Which frames of the video these are."""
    total: int
    """Frames of the whole video."""
    rate: float
    """Its frames a second."""


def read_video(path: Path, frames: int = FRAMES) -> Video:
    """Frames in equal distances, or all where there are no more than so many.

    Raises:
        UserError: PyAV is missing, or the file is no video that it can read.
    """
    if find_spec("av") is None:
        raise UserError(f"{path}: videos are read by PyAV, which is not installed: pip install 'vispec[video]'")
    import av

    try:
        total = sum(1 for _ in _decode(path))  # what containers say of their length may be wrong
        places = np.unique(np.linspace(0, total - 1, min(frames, total)).round().astype(int)).tolist()
        kept = [frame.to_ndarray(format="rgb24") for i, frame in enumerate(_decode(path)) if i in places]
        with av.open(str(path)) as container:
            rate = float(container.streams.video[0].average_rate or 24)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a video ({type(error).__name__}: {error})") from None
    if not kept:
        raise UserError(f"{path}: there is no frame in this video")
    return Video(np.stack(kept), places, total, rate)


def video_arguments(processor: "ProcessorMixin", videos: list[Video]) -> dict:
    """What a processor is called with for the videos of a prompt; nothing where there are none."""
    if not videos:
        return {}
    if getattr(processor, "video_token", None) is None:
        raise UserError(f"the {type(processor).__name__} of the target takes no video")
    arguments = {"videos": [video.frames for video in videos]}
    if find_spec("transformers.video_processing_utils") is not None:  # transformers 5 would choose frames itself
        told = [
            {"total_num_frames": video.total, "fps": video.rate, "frames_indices": video.places} for video in videos
        ]
        return {**arguments, "video_metadata": told, "do_sample_frames": False}
    if "second_per_grid_ts" in processor.model_input_names:
        arguments["fps"] = [len(video.places) / video.total * video.rate for video in videos]
    return arguments


def _decode(path: Path) -> Iterator:
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        yield from container.decode(video=0)
