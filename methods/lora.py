"""LoRA on CLIP's attention: a small correction to the projections of every block.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685; on CLIP with few
images: Zanella and Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models" (CLIP-LoRA),
arXiv:2405.18541; with a rank for each tower: da Costa et al. (DISEF), arXiv:2312.03046.

A frozen projection y = x·Wᵀ of width D gains a product of two thin matrices,

    y = x·Wᵀ + s · drop(x)·Aᵀ·Bᵀ        A (R, D), B (D, R), R << D
                                        s = α/R here, not CLIP's logit scale

A starts at random and B at zero, so training starts at exactly zero-shot CLIP. CLIP fuses queries,
keys and values in one W of 3D rows. The correction is *grouped*: each chosen part has its own A and
B, which are stacked, and its product is added only to the rows of that part:

    W  (3D, D)    q | k | v             parts "qv":  A (2R, D),  B (2D, R)
    Δ  (3D, D)    s·B_q·A_q | 0 | s·B_v·A_v

What we do differently: the published code of both papers forms B·A (D x D) for every projection in
every step and multiplies x by it. Here x·Aᵀ is multiplied by Bᵀ, which gives the same result with
less than 2R/D of the multiplications. `merge` forms B·A once, for evaluation or export. Dropout is
equal in distribution, but masks are shared: prompts that share a token (PromptTree) drop the same
inputs of it, and q, k and v share a mask unless `--dropout-masks each` is given. CLIP-LoRA's code
draws one for each. Its template is "a photo of a {}." on every data set: give it as `--template` if
a data set has another default. CLIP-LoRA's and DISEF's code compute in float16.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from clip_min import UserError
from clip_min.fast import linear
from clip_min.model import Attention
from methods.base import DEFAULT, Method, TrainingSettings
from methods.templates import PromptSettings


class GroupedLoRA(nn.Module):
    """A frozen linear layer with a low-rank correction of some parts of its output.

    The output of `base` has `of` parts of D rows each; `parts` are those that learn (of 3: 0 is q,
    1 is k, 2 is v). lora_A (G·R, D_in) and lora_B (G·D, R) for G parts are laid out as in
    `loralib.MergedLinear`. Dropout acts only on the input of the correction; `masks`: "shared" by
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
        width = base.out_features // of  # D
        # In float32 even if the model is not: 16 bits would round small gradient steps away.
        a = torch.empty(len(parts) * rank, base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as nn.Linear starts its weight
        b = torch.zeros(len(parts) * width, rank)
        device = base.weight.device  # drawn on the CPU: a seed gives the same A on every device
        self.lora_A, self.lora_B = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))
        # The frozen weight, kept while the correction is merged into it.
        self._unmerged: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # (..., of·D)
        if self._unmerged is not None:  # then base.weight contains the correction
            return y
        down = self.lora_A.to(x.dtype)  # (G·R, D_in)
        if self.masks == "each":
            lows = [linear(self.dropout(x), a) for a in down.split(self.rank)]  # G x (..., R)
        else:
            lows = linear(self.dropout(x), down).split(self.rank, dim=-1)  # the same, at once
        rows = (self.scale * self.lora_B).to(x.dtype).chunk(len(self.parts))  # G x (D, R)
        # Parts without a correction pass through unchanged; nothing is computed for them.
        pieces = list(y.chunk(self.of, dim=-1))  # of x (..., D)
        for part, low, row in zip(self.parts, lows, rows, strict=True):
            pieces[part] = pieces[part] + linear(low, row)  # (..., D)
        return torch.cat(pieces, dim=-1)  # (..., of·D)

    def delta(self) -> Tensor:
        """The correction as a matrix of the base weight's shape; zero where no part learns."""
        delta = torch.zeros_like(self.base.weight, dtype=torch.float32)
        blocks = delta.chunk(self.of)  # views of D rows
        pairs = zip(self.lora_A.split(self.rank), self.lora_B.chunk(len(self.parts)), strict=True)
        for part, (a, b) in zip(self.parts, pairs, strict=True):
            blocks[part].copy_(self.scale * b @ a)  # (D, R) (R, D_in) -> (D, D_in)
        return delta

    @torch.no_grad()
    def merge(self) -> None:
        """Add the correction to the frozen weight, so that the layer costs no more than before."""
        assert self._unmerged is None, "merged twice"
        # A new tensor takes the weight's place: other methods may share the frozen one.
        frozen = self._unmerged = self.base.weight.data
        self.base.weight.data = (frozen + self.delta()).to(frozen.dtype)

    def unmerge(self) -> None:
        """Restore the frozen weight, to the bit."""
        assert self._unmerged is not None, "not merged"
        self.base.weight.data, self._unmerged = self._unmerged, None


@dataclass(frozen=True)
class LoRASettings(TrainingSettings, PromptSettings):
    image_rank: Annotated[int, "R in the image tower"] = 64
    image_alpha: Annotated[float, "α in the image tower"] = 32.0
    text_rank: Annotated[int, "R in the text tower"] = 16
    text_alpha: Annotated[float, "α in the text tower"] = 32.0
    dropout: Annotated[float, "dropout on the input of the correction"] = 0.1
    dropout_masks: Annotated[
        Literal["shared", "each"], "one dropout mask for q, k and v together, or one for each"
    ] = "shared"
    parts: Annotated[str, "projections that learn: letters of q, k, v, o (output)"] = "qv"
    towers: Annotated[Literal["both", "image", "text"], "towers that learn"] = "both"
    blocks: Annotated[
        str, "blocks that learn: all, or numbers as in 0-5 or 9,10,11; image/text as in 12-23/all"
    ] = "all"
    scaling: Annotated[Literal["rank", "sqrt"], "s: α/R (rank) or α/√R (sqrt)"] = "rank"

    limits = {
        **TrainingSettings.limits,
        "image_rank": (1, math.inf),
        "text_rank": (1, math.inf),
        "dropout": (0, 1),
    }


DEMO_MODEL = {"lr": 2e-3, "image_rank": 16, "image_alpha": 16.0, "text_alpha": 16.0}


class LoRA(Method):
    title = "low-rank corrections to attention in both towers (CLIP-LoRA)"
    Settings = LoRASettings
    settings: LoRASettings
    recipes = {
        "default": DEFAULT,
        # Grouped LoRA on q and v, as in DISEF: the defaults above. The notebook's "patience 3"
        # stops at the fourth epoch without improvement.
        "notebook": {"patience": 4},
        "paper": {  # CLIP-LoRA's; its released code uses α/√R, the paper writes α/R
            "image_rank": 2,
            "image_alpha": 1.0,
            "text_rank": 2,
            "text_alpha": 1.0,
            "dropout": 0.25,
            "dropout_masks": "each",
            "parts": "qkv",
            "scaling": "sqrt",
            "steps_per_shot": 500,
            "schedule": "step",
            "min_lr": 1e-6,
            "patience": 0,
            "keep": "last",
            "augment": "crop-flip",
        },
        "demo": DEMO_MODEL,
    }
    demo_model = DEMO_MODEL

    def __init__(self, clip, classnames, template, settings: LoRASettings):
        super().__init__(clip, classnames, template, settings)
        parts = settings.parts
        if not parts or set(parts) - set("qkvo") or len(set(parts)) < len(parts):
            raise UserError(f"--parts {parts!r}: expected different letters of q, k, v, o; try qv")
        # q, k and v are parts of one layer, in_proj; o is a layer of its own, out_proj.
        fused = tuple(sorted("qkv".index(letter) for letter in parts if letter != "o"))
        towers = {
            "image": (self.clip.visual.transformer, settings.image_rank, settings.image_alpha),
            "text": (self.clip.transformer, settings.text_rank, settings.text_alpha),
        }
        for tower, (transformer, rank, alpha) in towers.items():
            if settings.towers not in ("both", tower):
                continue
            numbers = block_numbers(settings.blocks, len(transformer.resblocks), tower)
            scale = alpha / (rank if settings.scaling == "rank" else math.sqrt(rank))  # s
            layer = functools.partial(GroupedLoRA, rank=rank, scale=scale, dropout=settings.dropout)
            attentions = [m for m in transformer.modules() if isinstance(m, Attention)]
            width = attentions[0].out_proj.in_features  # D
            if rank > width:
                raise UserError(
                    f"--{tower}-rank {rank}: expected 1 to {width}, the width of the {tower} "
                    "tower; a larger matrix would add nothing"
                )
            for attention in (attentions[i] for i in numbers):  # each block has one
                if fused:
                    masks = settings.dropout_masks
                    corrected = layer(attention.in_proj, parts=fused, of=3, masks=masks)
                    attention.add_module("in_proj", corrected)
                if "o" in parts:
                    attention.add_module("out_proj", layer(attention.out_proj))
            if tower == "image":  # the blocks before are frozen, and computed once for an image
                self.first_block = numbers[0]
        self.text_learns = settings.towers != "image"

    def zero_shot_state(self) -> dict[str, Tensor]:
        """All B at 0 (see wise_ft.py)."""
        learned = self.adapter_state().items()
        return {name: torch.zeros_like(b) for name, b in learned if name.endswith("lora_B")}

    def layers(self) -> list[GroupedLoRA]:
        return [layer for layer in self.modules() if isinstance(layer, GroupedLoRA)]

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """As in the base class, with all corrections merged."""
        for layer in self.layers():
            layer.merge()
        try:
            with super().inference():
                yield
        finally:
            for layer in self.layers():
                layer.unmerge()


def block_numbers(text: str, depth: int, tower: str = "image") -> list[int]:
    """The blocks that `--blocks` names: "all" -> 0 … depth-1, "0-2,5" -> [0, 1, 2, 5].

    In "0-2/all", the first part is for the image tower, the second for the text tower.
    """
    if text.count("/") == 1:
        text = text.split("/")[tower == "text"]
    if text == "all":
        return list(range(depth))
    try:
        ends = [[int(number) for number in piece.split("-", 1)] for piece in text.split(",")]
        # A range beyond the last block is cut short; one number too many is enough for the error.
        numbers = sorted({n for end in ends for n in range(end[0], min(end[-1], depth) + 1)})
    except ValueError:
        numbers = []
    if not numbers or numbers[-1] >= depth:
        raise UserError(
            f"--blocks {text!r}: expected all, or numbers below {depth}, the depth of the {tower} "
            "tower, such as 0-2 or 1,3"
        )
    return numbers
