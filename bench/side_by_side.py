"""Time several ways of doing the same thing in one run: in turn, so that a slower machine affects
all of them, with the median over rounds.
"""

import json
import platform
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import torch

# The clone: only clip_min is installed, so benches import this file before other packages.
sys.path.insert(0, str(Path(__file__).parent.parent))


def hardware(threads: int | None = None) -> str:
    """The processor, the threads (if not given, this process's) and the versions that a figure
    depends on, in one line.
    """
    from clip_min.fast import processor

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(":")[1].strip() if models else name
    vendor, family, model = processor()
    if vendor:
        name += f" ({vendor}, family {family}, model {model})"
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()} / {name}"
    threads = threads or torch.get_num_threads()
    many = "threads" if threads > 1 else "thread"
    return f"{name}, {threads} {many}, torch {torch.__version__}"


def seconds(ways: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each way over `rounds`, after one uncounted call of each."""
    times = {name: [] for name in ways}
    for round in range(rounds + 1):
        for name, way in ways.items():
            _wait()
            started = time.perf_counter()
            way()
            _wait()
            if round:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def products(size: int = 4096) -> dict[str, Callable]:
    """A large float32 matrix product, computed by PyTorch and by our linear layers."""
    from clip_min.fast import linear

    a, b = torch.randn(2, size, size)
    return {"product": lambda: a @ b, "our product": lambda: linear(a, b)}


def plain(way: Callable) -> Callable:
    """The same, with F.linear in our linear layers."""

    def run():
        with unittest.mock.patch("clip_min.fast.convolves", return_value=False):
            return way()

    return run


def first_step_mb(step: Callable) -> float:
    """MB by which a first call raises the peak of this process's resident memory; only on Linux."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    step()
    return (_status("VmHWM") - before) * 1024 / 1e6


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))  # KiB


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a fraction of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def show(title: str, rows: list[dict], threads: int | None = None, **summary) -> None:
    """Print rows as a table, then everything as a last line of JSON. threads: as in `hardware`."""
    print(f"{title}\n{hardware(threads)}\n")
    print(markdown(rows))
    print("\n" + json.dumps({"rows": rows, **summary, "hardware": hardware(threads)}))


def markdown(rows: list[dict]) -> str:
    """An aligned Markdown table; a column "x std" is written into x, after ±."""
    columns = [c for c in rows[0] if c.removesuffix(" std") not in rows[0] or c[-4:] != " std"]
    cells = [columns] + [[_cell(row[c], row.get(f"{c} std")) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]])
    lines = []
    for first, *rest in cells:
        numbers = [cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True)]
        lines.append(" | ".join(["", first.ljust(widths[0]), *numbers, ""]).strip())
    return "\n".join(lines)


def _cell(value, spread=None) -> str:
    if spread is not None:
        return f"{value:.2f} ± {spread:.2f}"
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
