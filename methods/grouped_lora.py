"""The layer LoRA is made of: a frozen linear layer with a low-rank correction on some of its rows.

The equation and the shapes are explained in lora.py, which puts this layer into CLIP's attention.
"""

import math

import torch
from torch import Tensor, nn

from clip_min.fast import linear


class GroupedLoRA(nn.Module):
    """A frozen linear layer with a low-rank correction on some of its equal parts.

    base: output of `of` stacked parts of D rows each; `parts`: which of them learn (of 3: 0 is q,
    1 is k, 2 is v). lora_A (G·R, D_in) and lora_B (G·D, R) for G parts, laid out as in
    `loralib.MergedLinear`. Dropout acts on the input of the correction alone; `masks`: "shared" by
    the parts, or one for "each", drawn in their order.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        parts: tuple[int, ...] = (0,),
        of: int = 1,
        masks: str = "shared",
    ):
        super().__init__()
        self.base = base
        self.parts, self.of, self.rank, self.scale = parts, of, rank, scale
        self.dropout, self.masks = nn.Dropout(dropout), masks
        like = {"device": base.weight.device, "dtype": torch.float32}
        width = base.out_features // of  # D
        self.lora_A = nn.Parameter(torch.empty(len(parts) * rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(len(parts) * width, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self._unmerged = None  # the frozen weight, kept while the correction is merged into it

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # (..., of·D)
        if self._unmerged is not None:
            return y
        down = self.lora_A.to(x.dtype)  # (G·R, D_in)
        if self.masks == "each":
            lows = [linear(self.dropout(x), a) for a in down.split(self.rank)]  # G x (..., R)
        else:
            lows = linear(self.dropout(x), down).split(self.rank, dim=-1)  # the same, at once
        rows = (self.scale * self.lora_B).to(x.dtype).chunk(len(self.parts))  # G x (D, R)
        pieces = list(y.chunk(self.of, dim=-1))  # of x (..., D)
        for part, low, row in zip(self.parts, lows, rows, strict=True):
            pieces[part] = pieces[part] + linear(low, row)  # (..., D)
        return torch.cat(pieces, dim=-1)  # (..., of·D)

    def delta(self) -> Tensor:
        """The correction as one matrix of the base weight's shape: zero rows where no part is."""
        delta = torch.zeros_like(self.base.weight, dtype=torch.float32)
        blocks = delta.chunk(self.of)  # views of D rows
        pairs = zip(self.lora_A.split(self.rank), self.lora_B.chunk(len(self.parts)), strict=True)
        for part, (a, b) in zip(self.parts, pairs, strict=True):
            blocks[part].copy_(self.scale * b @ a)  # (D, R) (R, D_in) -> (D, D_in)
        return delta

    @torch.no_grad()
    def merge(self) -> None:
        """Add the correction to the frozen weight: the layer then costs what it cost before."""
        assert self._unmerged is None, "merged twice"
        self._unmerged = self.base.weight.data
        self.base.weight.data = (self._unmerged + self.delta()).to(self._unmerged.dtype)

    def unmerge(self) -> None:
        """Put the frozen weight back, to the bit."""
        self.base.weight.data, self._unmerged = self._unmerged, None
