"""The files of a model, by their names in a folder or in a hub repository."""

from collections.abc import Mapping, Sequence
from pathlib import Path

CONFIG, SAFETENSORS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
INDEX, PICKLED_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SHARED_HUB_OPTIONS = ("token", "cache_dir", "local_files_only")
"""Arguments of a download that hold for every repository; the others below belong to one."""
HUB_OPTIONS = (*SHARED_HUB_OPTIONS, "revision", "subfolder")


def hub_options(options: Mapping, names: Sequence[str] = HUB_OPTIONS) -> dict:
    """Those arguments of a `from_pretrained` that say where the files of a model are."""
    return {name: options[name] for name in names if name in options}


def find_file(
    path: str,
    name: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path | None:
    """A file of a folder or of a hub repository, from the hub cache where it is there; None if they have no such file.

    Args:
        path, name: where, and the file's name.
        revision: branch, tag or commit of a hub repository; a local folder has none.
        subfolder: of the folder or repository.

    Raises:
        ValueError: there is no such folder or repository.
    """
    if Path(path).is_dir():
        file = Path(path, subfolder or "", name)
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    options = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
    options["local_files_only"] = local_files_only
    try:
        return Path(hf_hub_download(path, name, **options))
    except HFValidationError:
        raise ValueError(f"{path}: neither a folder nor a hub id") from None
    except LocalEntryNotFoundError:
        if _repository_is_cached(path, cache_dir):
            return None
        unreachable = "it is not in the hub cache" if local_files_only else "the hub cannot be reached for it"
        raise ValueError(f"{path}: no such folder, and {unreachable}") from None
    except EntryNotFoundError:
        return None
    except RevisionNotFoundError:
        raise ValueError(f"{path}: that hub repository has no revision {revision}") from None
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"{path}: neither a folder nor a hub repository ({type(error).__name__})") from None


def _repository_is_cached(repo_id: str, cache_dir: str | Path | None) -> bool:
    """Offline, a file that the hub cache lacks counts as missing only if the repository itself is cached."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo_id, repo_type="model")
    return Path(cache_dir or constants.HF_HUB_CACHE, folder, "snapshots").is_dir()
