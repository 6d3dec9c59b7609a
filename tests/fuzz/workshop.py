"""What all cases share: a folder, a loaded pair, good files to break."""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from vispec import SpecModel, generate
from vispec.ge_data.sample_file import make_sample, write_sample
from vispec.model import loading, spec_model
from vispec.train import main_mtp, trainer

GOLDEN = Path(__file__).parents[1] / "golden"
TARGET, QWEN = GOLDEN / "llava_next" / "target", GOLDEN / "qwen2_5_vl" / "target"
DRAFT = GOLDEN / "llava_next" / "draft_vispec"
WIDTH, VOCABULARY = 64, 37
"""Of the recorded pair; the last id stands for an image and is in no text."""
REFUSED, ACCEPTED, EITHER = "refused", "accepted", "either"


@dataclass(frozen=True)
class Case:
    """One input."""

    told: str
    """What is wrong with it."""
    run: Callable[[], object]
    """The command, which returns its exit code; or a call."""
    right: str = EITHER
    names: tuple[str, ...] = ()
    """A refusal has one of them; empty: anything."""
    api: bool = False


class Workshop:
    """A folder for the files of a case, and what all cases share: a loaded target, good files to break."""

    def __init__(self, folder: Path):
        self.folder, self.shared = folder / "case", folder / "shared"
        self._patches = [
            # loading what is not broken takes longer than all else
            mock.patch.object(generate, "load_processor", _remembering(generate.load_processor)),
            mock.patch.object(loading, "load_target", _remembering(loading.load_target)),
            mock.patch.object(spec_model, "load_target", _remembering(spec_model.load_target)),
        ]

    def __enter__(self) -> "Workshop":
        for patch in self._patches:
            patch.start()
        self.model = SpecModel.from_pretrained(str(TARGET), str(DRAFT))
        _write_samples(self.shared / "samples")
        with open("/dev/null", "w") as nowhere, mock.patch("sys.stdout", nowhere), mock.patch("sys.stderr", nowhere):
            # a run that is killed when its second epoch is trained
            with mock.patch.object(trainer, "write_state", side_effect=(None, KeyboardInterrupt)):
                with contextlib.suppress(KeyboardInterrupt):
                    main_mtp.main(self.training(self.shared / "samples", self.shared / "cp"))
        return self

    def __exit__(self, *_) -> None:
        for patch in self._patches:
            patch.stop()

    def empty(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def put(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a link to a good file
        path.write_bytes(content)
        return path

    def links(self, source: Path, name: str) -> Path:
        """A folder of links to the files of a good one, of which some can be replaced by `put`."""
        folder = self.folder / name
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
        return folder

    def training(self, samples: Path, cpdir: Path, basepath: Path = TARGET) -> list[str]:
        flags = ["--basepath", str(basepath), "--configpath", str(DRAFT / "config.json"), "--num-epochs", "2"]
        return [*flags, "--tmpdir", str(samples), "--cpdir", str(cpdir), "--num-workers", "0"]


def _remembering(load: Callable) -> Callable:
    """A loader that loads a recorded model once."""
    found = {}

    def remembered(path, *args, **kwargs):
        key = f"{path} {args} {kwargs}"
        if not str(path).startswith(str(GOLDEN)):
            return load(path, *args, **kwargs)
        return found[key] if key in found else found.setdefault(key, load(path, *args, **kwargs))

    return remembered


def _write_samples(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for number, images in enumerate(([], [(2, 6)], [(1, 4), (5, 7)])):
        mask = torch.arange(12) > 7
        embeds, hidden = torch.randn(2, 12, WIDTH, generator=generator)
        ids = torch.randint(3, VOCABULARY, (12,), generator=generator)
        write_sample(folder / f"{number:08d}.safetensors", make_sample(ids, mask, images, embeds, hidden, "all"))
