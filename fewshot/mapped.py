"""Features in files that are mapped into memory: only requested rows are read."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mapped:
    """Features of n pictures, as a list of their places; all from the same CLIP.

    tables: tensors (N_t, E), mapped into memory, which may also hold other rows.
    """

    tables: tuple[Tensor, ...]
    table: Tensor  # (n,) int64: index of the table
    row: Tensor  # (n,) int64: row in it
    place: str  # the folder, for messages
    model: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.row)

    @property
    def nbytes(self) -> int:
        """Bytes of the result of `read`."""
        return len(self) * self.tables[0].shape[1] * self.tables[0].element_size()

    def __getitem__(self, chosen: Tensor) -> "Mapped":
        """The features of the pictures with the indices `chosen` (m,)."""
        where = self.table[chosen], self.row[chosen]
        return Mapped(self.tables, *where, self.place, self.model, self.fingerprint)

    def joined(self, other: "Mapped") -> "Mapped":
        """These features, followed by others."""
        table = torch.cat([self.table, len(self.tables) + other.table])
        row = torch.cat([self.row, other.row])
        tables = self.tables + other.tables
        return Mapped(tables, table, row, self.place, self.model, self.fingerprint)

    def read(self) -> Tensor:
        """(n, E), in memory."""
        found = self.tables[0].new_empty(len(self), self.tables[0].shape[1])
        order = self.table.argsort(stable=True)  # read each table once
        numbers, counts = self.table[order].unique_consecutive(return_counts=True)
        for k, part in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
            found[part] = self.tables[k][self.row[part]]
        return found
