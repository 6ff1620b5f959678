"""Stack a LoRA's separate q, k, v corrections into the tensors of our fused projections.

    ours   in_proj.lora_A (G·R, D)          in_proj.lora_B (G·D, R)          for G parts
    PEFT   q_proj.lora_A.weight (R, D), …   q_proj.lora_B.weight (D, R), …

Both hold the same s·B·A. In our CLIP the projection of queries, keys and values is one layer, so
the A of all parts that learn are stacked, and so are the B. PEFT and CLIP-LoRA keep the parts
separate.
"""

from pathlib import Path

import torch
from torch import Tensor

from clip_min import UserError
from methods.base import Method

OUR_TOWER = {"image": "clip.visual.transformer", "text": "clip.transformer"}

# tower, block, part (of q, k, v, o) -> its A (R, D) and B (D, R)
Corrections = dict[tuple[str, int, str], tuple[Tensor, Tensor]]


def tower_depths(method: Method) -> dict[str, int]:
    """The number of blocks in each tower."""
    clip = method.clip
    return {
        "text": len(clip.transformer.resblocks),
        "image": len(clip.visual.transformer.resblocks),
    }


def fuse(path: Path, pairs: Corrections, method: Method) -> tuple[dict[str, Tensor], dict]:
    """Corrections of single parts -> our stacked tensors, and the settings these imply."""
    check_matrices(path, {f"{key} {i}": t for key, p in pairs.items() for i, t in enumerate(p)})
    towers = sorted({tower for tower, _, _ in pairs})
    blocks = {t: sorted({b for tower, b, _ in pairs if tower == t}) for t in towers}
    parts = "".join(p for p in "qkvo" if any(part == p for _, _, part in pairs))
    depths = tower_depths(method)
    numbers = [  # image before text, as --blocks has them
        "all" if found == list(range(depths[t])) else ",".join(map(str, found))
        for t, found in blocks.items()
    ]
    if not pairs:
        raise UserError(f"{path}: holds no corrections; give a LoRA with some")
    settings: dict = {"parts": parts, "towers": "both" if len(towers) == 2 else towers[0]}
    settings["blocks"] = "/".join(dict.fromkeys(numbers))  # written once, if both are equal
    state = {}
    for tower in towers:
        rank = {len(a) for (t, _, _), (a, _) in pairs.items() if t == tower}
        if len(rank) > 1:
            raise UserError(f"{path}: the {tower} tower has ranks {sorted(rank)}; expected one")
        settings[f"{tower}_rank"] = rank.pop()
        for block in blocks[tower]:
            missing = [part for part in parts if (tower, block, part) not in pairs]
            if missing:
                raise UserError(
                    f"{path}: block {block} of the {tower} tower has no {missing[0]}_proj, which "
                    "other blocks have; expected the same parts in all blocks"
                )
            where = f"{OUR_TOWER[tower]}.resblocks.{block}.attn"
            for projection, letters in (("in_proj", parts.replace("o", "")), ("out_proj", "o")):
                stack = [pairs[tower, block, p] for p in letters if p in parts]
                if len({(a.shape, b.shape) for a, b in stack}) > 1:
                    raise UserError(
                        f"{path}: the parts of block {block}, {tower} tower, differ in shape; "
                        "expected equal shapes"
                    )
                if stack:
                    state[f"{where}.{projection}.lora_A"] = torch.cat([a for a, _ in stack])
                    state[f"{where}.{projection}.lora_B"] = torch.cat([b for _, b in stack])
    return state, settings


def check_matrices(path: Path, found: dict[str, Tensor]) -> None:
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or not tensor.numel():
            raise UserError(f"{path}: {name} is not a matrix; expected LoRA's A and B")
