"""Features in files, mapped into memory: those that are asked for are read, and no others."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mapped:
    """Features of n pictures, as a list of where they lie; all are of one CLIP.

    tables: tensors (N_t, E), mapped into memory, which may hold other rows, too.
    """

    tables: tuple[Tensor, ...]
    table: Tensor  # (n,) int64: which of them
    row: Tensor  # (n,) int64, of that one
    place: str  # the folder, for messages
    model: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.row)

    @property
    def nbytes(self) -> int:
        """What `read` gives."""
        return len(self) * self.tables[0][:1].nbytes if len(self) else 0

    def __getitem__(self, chosen: Tensor) -> "Mapped":
        """Those of the pictures with the numbers `chosen` (m,)."""
        where = self.table[chosen], self.row[chosen]
        return Mapped(self.tables, *where, self.place, self.model, self.fingerprint)

    def joined(self, other: "Mapped") -> "Mapped":
        """These, and then others."""
        table = torch.cat([self.table, len(self.tables) + other.table])
        row = torch.cat([self.row, other.row])
        tables = self.tables + other.tables
        return Mapped(tables, table, row, self.place, self.model, self.fingerprint)

    def read(self) -> Tensor:
        """(n, E), in memory."""
        found = self.tables[0].new_empty(len(self), self.tables[0].shape[1])
        order = self.table.argsort(stable=True)  # each table is looked at once
        numbers, counts = self.table[order].unique_consecutive(return_counts=True)
        for k, part in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
            found[part] = self.tables[k][self.row[part]]
        return found
