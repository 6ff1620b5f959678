"""Find requested classes among the learned ones, by name."""

import torch
from torch import Tensor


def rows(asked: list[str], learned: list[str]) -> Tensor:
    """`places` as a tensor (K,)."""
    return torch.tensor(places(asked, learned))


def places(asked: list[str], learned: list[str]) -> list[int]:
    """The index of each requested name among the learned names, or -1. Names match exactly; two
    classes with the same name match in their order.

    ["fern", "rose"], ["rose", "daisy"] -> [-1, 0]
    """
    left: dict[str, list[int]] = {}
    for number, name in enumerate(learned):
        left.setdefault(name, []).append(number)
    return [left[name].pop(0) if left.get(name) else -1 for name in asked]
