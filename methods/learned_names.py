"""Which of the classes that were learned a class asked for is, by its name."""

import torch
from torch import Tensor


def rows(asked: list[str], learned: list[str]) -> Tensor:
    """The number of each name asked for (K,) among those learned, -1 if it is not: names match
    exactly, and two classes of one name in their order.

    ["fern", "rose"], ["rose", "daisy"] -> [-1, 0]
    """
    left: dict[str, list[int]] = {}
    for number, name in enumerate(learned):
        left.setdefault(name, []).append(number)
    return torch.tensor([left[name].pop(0) if left.get(name) else -1 for name in asked])
