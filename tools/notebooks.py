"""Run the course's notebooks and write the outputs of their cells into them.

    python tools/notebooks.py [docs/course/NAME.ipynb …]     all of them, if none is named
    python tools/notebooks.py --check [...]                  run them, and write nothing

A notebook is the only copy of its lesson: edit it in Jupyter or as text, then run this. Cells run
in one namespace, as in Jupyter, which is not needed. Printed text becomes a cell's output, and each
figure that `plt.show()` shows becomes a PNG. An exception in a cell ends the run.
"""

import argparse
import base64
import contextlib
import functools
import io
import json
import os
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

COURSE = Path(__file__).resolve().parents[1] / "docs" / "course"
DPI = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, default=sorted(COURSE.glob("*.ipynb")))
    parser.add_argument("--check", action="store_true", help="write nothing")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    paths = [path.resolve() for path in flags.paths]
    os.chdir(COURSE)  # where Jupyter runs them
    for path in paths:
        started = time.perf_counter()
        notebook = json.loads(path.read_text(encoding="utf-8"))
        run(notebook, path.stem)
        if not flags.check:
            text = json.dumps(notebook, indent=1, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
        size, seconds = path.stat().st_size / 1e3, time.perf_counter() - started
        print(f"{path.name}: {seconds:.0f} s, {size:.0f} KB", flush=True)


def run(notebook: dict, name: str) -> None:
    """Run the code cells from top to bottom, and replace their outputs."""
    names: dict = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        outputs: list[dict] = []
        code = compile("".join(cell["source"]), f"{name}, cell {number}", "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            plt.show = functools.partial(show, outputs, printed)
            exec(code, names)
        keep_text(outputs, printed)
        cell.update(execution_count=number, outputs=outputs)


def show(outputs: list[dict], printed: io.StringIO) -> None:
    """Replaces `plt.show`: outputs the text printed so far, then the figures."""
    keep_text(outputs, printed)
    outputs.extend(map(picture, plt.get_fignums()))


def keep_text(outputs: list[dict], printed: io.StringIO) -> None:
    """Make an output of the text printed since the last one."""
    if text := printed.getvalue():
        lines = text.splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    printed.seek(0)
    printed.truncate()


def picture(number: int) -> dict:
    """Make an output of a figure, and close the figure."""
    figure, file = plt.figure(number), io.BytesIO()
    # Without the library's version in it, the same figure gives the same file.
    figure.savefig(file, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


if __name__ == "__main__":
    main()
