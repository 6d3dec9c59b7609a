"""Folders of samples that are trained on together: of one target, and no sample twice."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from vispec.ge_data.run_folder import read_manifest
from vispec.ge_data.sample_file import read_note

logger = logging.getLogger("vispec")


def check_folders(paths: Sequence[Path], stored: bool, basepath: str | None = None) -> None:
    """Refuse sample files that do not belong together; warn of unfinished ones, and of those of another target.

    Args:
        paths: of all samples.
        stored: the files' features are trained on, so that their dtype counts too.
        basepath: the target that training reads.

    Raises:
        ValueError: folders of different targets, or a sample that is in two folders; names both.
    """
    manifests = {folder: read_manifest(folder) for folder in sorted({path.parent for path in paths})}
    _check_targets(manifests, ("revision", "dtype") if stored else ("revision",))
    _check_overlap(paths, manifests)
    for folder, manifest in manifests.items():
        if not manifest.get("complete", True):
            logger.warning("--tmpdir %s: its data generation has not finished", folder)
    made_by = next((manifest["target"] for manifest in manifests.values() if "target" in manifest), None)
    if basepath is not None and made_by is not None:
        _compare_with(basepath, made_by)


def _compare_with(basepath: str, made_by: Mapping) -> None:
    """One line where the target of training is not that of the data; a commit and a folder cannot be compared."""
    from vispec.ge_data.target_identity import identify_target
    from vispec.weights_digest import FOLDER

    here, there = identify_target(basepath, "auto")["revision"] or "", made_by["revision"] or ""
    if here and there and here.startswith(FOLDER) == there.startswith(FOLDER) and here != there:
        logger.warning("--basepath %s (revision %s): the data was made by %s", basepath, here, _told(made_by))


def _check_targets(manifests: Mapping[Path, Mapping], names: Sequence[str]) -> None:
    """All manifests that say it have to agree."""
    first: dict[str, Path] = {}
    for folder, manifest in manifests.items():
        target = manifest.get("target", {})
        for name in names:
            if target.get(name) is None:
                continue
            other = first.setdefault(name, folder)
            if target[name] != manifests[other]["target"][name]:
                raise ValueError(
                    f"--tmpdir: {other} was made by {_told(manifests[other]['target'])}, {folder} by {_told(target)}; "
                    "choose folders of one target"
                )


def _told(target: Mapping) -> str:
    return f"{target['model']} (revision {target['revision']}, {target['dtype']})"


def _check_overlap(paths: Sequence[Path], manifests: Mapping[Path, Mapping]) -> None:
    """Files of one name are one sample where data of the same kind say the same of its row."""
    named = defaultdict(list)
    for path in paths:
        arguments = manifests[path.parent].get("arguments", {})
        named[path.name, arguments.get("stage")].append(path)
    for alike in named.values():
        found: dict[str, Path] = {}
        for path in alike if len(alike) > 1 else ():
            note = read_note(path)
            origin = [note.get("id"), note.get("image")]
            if origin == [None, None]:  # rows without a name: those of one data set
                origin = [manifests[path.parent].get("arguments", {}).get("data_folder")]
            other = found.setdefault(str(origin), path)
            if other is not path:
                raise ValueError(f"--tmpdir: {other} and {path} are the same sample; give each shard once")
