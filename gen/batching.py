"""Work in batches that shrink where a GPU runs out of memory."""

from collections.abc import Callable

import torch

from clip_min import UserError


class Batcher:
    """Calls work on `size` rows at a time; out of GPU memory, on half as many from then on."""

    def __init__(self, size: int):
        self.size = size
        self._said = False

    def __call__(self, work: Callable[..., list], *columns: list) -> list:
        """work(*columns), a list as long as the columns, put together from batches."""
        done = []
        while len(done) < len(columns[0]):
            rows = slice(len(done), len(done) + self.size)
            try:
                done += work(*(column[rows] for column in columns))
                continue
            except torch.cuda.OutOfMemoryError:
                pass  # only past this line is the memory that the failed call held free
            self._halve(min(self.size, len(columns[0]) - len(done)))
        return done

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise UserError(
                "out of GPU memory with a single picture; free some, or pass --offload or smaller "
                "models"
            )
        self.size = tried // 2
        if not self._said:
            print(f"out of GPU memory with {tried} pictures at once; going on with fewer")
            self._said = True
        torch.cuda.empty_cache()
