"""List the functions of this project that train.py calls before its first backward pass.

    python tools/first_step.py [--method lora] [FLAGS OF train.py]

These are the functions that a reader meets between the command line and the first gradient: each
function once, in the order of its first call, with its file. The run leaves no files.
"""

import contextlib
import io
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402

import train  # noqa: E402


class Reached(BaseException):
    """Raised when the first backward pass begins."""


def called(argv: list[str]) -> list[tuple[str, str]]:
    """(file, function) of each function of ours that runs before the first backward pass."""
    found: dict[tuple[str, str], None] = {}  # a set that keeps the order

    def note(frame, event, _) -> None:
        file = frame.f_code.co_filename
        name = frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name
        inside = file.startswith(str(HERE)) and file != __file__
        if event == "call" and inside and not name.split(".")[-1].startswith("<"):
            found[str(Path(file).relative_to(HERE)), name] = None

    def stop(*_, **__) -> None:
        raise Reached

    backward, torch.Tensor.backward = torch.Tensor.backward, stop
    sys.setprofile(note)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Reached):
            train.main(argv)
    finally:
        sys.setprofile(None)
        torch.Tensor.backward = backward
    return list(found)


def main() -> None:
    given = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        method = [] if "--method" in given else ["--method", "lora"]
        found = called([*method, *given, "--out", folder, "--cache", "none"])
    for file, count in Counter(file for file, _ in found).items():
        print(f"{file}: {count}")
        for other, name in found:
            if other == file:
                print(f"    {name}")
    print(f"{len(found)} functions in {len({file for file, _ in found})} files")


if __name__ == "__main__":
    main()
