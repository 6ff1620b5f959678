"""Batches are halved where memory ends, nothing is lost or done twice, and it is said once."""

import pytest
import torch

from clip_min import UserError
from gen.batching import Batcher


class Gpu:
    """Doubles numbers, at most `room` at once."""

    def __init__(self, room: int):
        self.room, self.sizes, self.done = room, [], []

    def __call__(self, numbers: list[int], more: list[str]) -> list[int]:
        assert len(numbers) == len(more)
        self.sizes.append(len(numbers))
        if len(numbers) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.done += numbers
        return [2 * n for n in numbers]


@pytest.mark.parametrize("room", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("count", [0, 1, 5, 8, 21])
def test_all_rows_are_done_once_and_in_order(room, count, capsys):
    gpu, batcher = Gpu(room), Batcher(8)
    rows = list(range(count))
    assert batcher(gpu, rows, [str(n) for n in rows]) == [2 * n for n in rows]
    assert gpu.done == rows
    assert capsys.readouterr().out.count("out of GPU memory") == (min(count, 8) > room)


def test_the_smaller_size_stays(capsys):
    gpu, batcher = Gpu(3), Batcher(8)
    batcher(gpu, list(range(8)), [""] * 8)
    assert gpu.sizes == [8, 4, 2, 2, 2, 2]
    batcher(gpu, list(range(4)), [""] * 4)
    assert gpu.sizes[6:] == [2, 2]
    assert batcher.size == 2
    assert capsys.readouterr().out.count("\n") == 1


def test_a_single_picture_too_large_is_the_users_to_solve():
    with pytest.raises(UserError, match="--offload"):
        Batcher(4)(Gpu(0), [1, 2], ["", ""])


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError):
        Batcher(4)(lambda numbers: [1 // n for n in numbers], [0])
