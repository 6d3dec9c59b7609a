"""Folders of samples that are trained on together: of one target, and no sample twice."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from vispec.ge_data.run_folder import read_manifest
from vispec.ge_data.sample_file import read_note


def check_folders(paths: Sequence[Path], stored: bool) -> None:
    """Refuse sample files that do not belong together.

    Args:
        paths: of all samples.
        stored: the files' features are trained on, so that their dtype counts too.

    Raises:
        ValueError: folders of different targets, or a sample that is in two folders; names both.
    """
    manifests = {folder: read_manifest(folder) for folder in sorted({path.parent for path in paths})}
    _check_targets(manifests, ("revision", "dtype") if stored else ("revision",))
    _check_overlap(paths, manifests)


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
