"""Batches that shrink when a GPU runs out of memory."""

from collections.abc import Callable

import torch

from clip_min import UserError


class Batcher:
    """Calls a function on `size` rows at a time; halves `size` when GPU memory runs out."""

    def __init__(self, size: int):
        self.size = size
        self._said = False

    def __call__(self, work: Callable[..., list], *columns: list) -> list:
        """work(*columns) in batches; joins the results to a list as long as the columns."""
        done = []
        while len(done) < len(columns[0]):
            rows = slice(len(done), len(done) + self.size)
            try:
                done += work(*(column[rows] for column in columns))
                continue
            except torch.cuda.OutOfMemoryError:
                pass  # the memory of the failed call is free only after this block
            self._halve(min(self.size, len(columns[0]) - len(done)))
        return done

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise UserError(
                "out of GPU memory with a single image; free some, or give a smaller model (or, "
                "for the painter, --offload)"
            )
        self.size = tried // 2
        if not self._said:
            print(f"out of GPU memory with {tried} pictures at once; continuing with fewer")
            self._said = True
        torch.cuda.empty_cache()
