"""Timing several ways of doing one thing in one run: in turn, so that a machine that slows down
slows all of them, and by the median of the rounds.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def hardware() -> str:
    """The processor, its cores and the versions a figure depends on, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(":")[1].strip() if models else name
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()} / {name}"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


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


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, as a part of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def show(title: str, rows: list[dict], **summary) -> None:
    """Print rows as a table, then everything as one last line of JSON."""
    print(f"{title}\n{hardware()}\n")
    columns = list(rows[0])
    cells = [columns] + [[_cell(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *rest]))
    print("\n" + json.dumps({"rows": rows, **summary, "hardware": hardware()}))


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.2f}"
    return str(value)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
