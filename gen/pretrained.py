"""A captioner or painter by name: a folder, or a repository of the hub, also its @REVISION."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from clip_min import UserError
from clip_min.hub import REPOSITORY


def locate(flag: str, name: str, download: Callable[[str, str | None], str]) -> tuple[str, str]:
    """-> (folder, revision); download(repository, revision) uses the hub's cache or the hub.

    The revision of a repository is its commit; of a folder, a hash of the beginnings of its files.
    """
    if Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        return str(folder), _hash(folder)
    if not REPOSITORY.fullmatch(name):
        raise UserError(
            f"{flag} {name}: expected a folder, or OWNER/NAME or OWNER/NAME@REVISION of the hub"
        )
    try:
        repository, _, revision = name.partition("@")
        folder = download(repository, revision or None)
    except Exception as error:  # missing, refused, cut off, disk full: types of four libraries
        raise UserError(
            f"{flag} {name}: neither a folder nor in the hub's cache, and it could not be "
            f"downloaded ({type(error).__name__}: {str(error)[:200]}); connect to the internet "
            "once to download it, or give its folder"
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
    """Turn off progress bars of loading, the warning for each truncated prompt, and bitsandbytes'
    warning at its import that it has no fast kernels for CPUs.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before the next lines import it
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
