"""A captioner or painter by name: a folder, or a repository of the Hugging Face hub."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from clip_min import UserError


def locate(flag: str, name: str, download: Callable[[str], str]) -> tuple[str, str]:
    """-> (folder, revision); `download` fetches a repository, or finds it in the hub's cache.

    The revision of a repository is its commit; that of a folder a hash of its files' beginnings.
    """
    if Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        return str(folder), _hash(folder)
    try:
        folder = download(name)
    except Exception as error:  # not there, refused, cut off, no room: types of four libraries
        raise UserError(
            f"{flag} {name}: neither a folder nor in the hub's cache, and it could not be "
            f"downloaded ({type(error).__name__}: {str(error)[:200]}); connect once to download "
            "it, or give the folder it lies in"
        ) from None
    return folder, Path(folder).name


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def quiet() -> None:
    """No progress bars over the loading of weights, nor a warning for each prompt that is cut."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
