"""Free memory, and a check before the work that it is enough."""

import contextlib
from pathlib import Path

import torch

from clip_min.errors import UserError


def free_memory(device: torch.device | None = None) -> float:
    """The bytes of memory that this process can still take; infinity, if unknown.

    device: if it is a GPU, the free bytes there.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = float("inf")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line[:12] == "MemAvailable")
    with contextlib.suppress(OSError, ValueError):  # a container has its own limit, or "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = sum(int(stat.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
        free = min(free, limit - used + files)  # the page cache can be freed
    return free


def check_room(needed: float, free: float, what: str, todo: str) -> None:
    """UserError, if `needed` bytes exceed `free`; with texts as "9 classes take", "give fewer"."""
    if needed > free:
        raise UserError(
            f"{what} {needed / 1e9:,.1f} GB of memory, but {max(free, 0) / 1e9:,.1f} GB are free; "
            f"{todo}, or use a larger machine"
        )
