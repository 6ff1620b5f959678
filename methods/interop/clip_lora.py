"""Read a LoRA from a file of CLIP-LoRA's code, or of loralib's tensors.

CLIP-LoRA   a .pt file: {"weights": separate parts and towers, "metadata"}
loralib     a .pt or .safetensors file: tensors fused as ours are, with OpenAI's names
"""

import re
from pathlib import Path

from torch import Tensor

from clip_min import UserError
from clip_min.files import read_safetensors
from clip_min.pickled import read_pickled
from clip_min.typed import expect
from methods.interop.fused import OUR_TOWER, check_matrices, fuse, tower_depths
from methods.lora import LoRA


def read_file(path: Path, method: LoRA) -> tuple[dict[str, Tensor], dict]:
    """A file of CLIP-LoRA, or of loralib's tensors -> our tensors, the settings they imply."""
    if path.suffix == ".safetensors":
        return _read_loralib(path, read_safetensors(path)[0], method)
    content = read_pickled(path)
    if isinstance(content, dict) and {"weights", "metadata"} <= content.keys():
        return _read_clip_lora(path, content, method)
    return _read_loralib(path, content, method)


# The blocks of CLIP-LoRA's --position, for towers of 12 blocks and, until September 2024, for all.
CLIP_LORA_BLOCKS = {
    "top": range(11, 12),
    "top1": range(11, 12),
    "top2": range(10, 12),
    "top3": range(9, 12),
    "bottom": range(4),
    "mid": range(4, 8),
    "up": range(8, 12),
    "half-up": range(6, 12),
    "half-bottom": range(6),
}


# For ViT-L/14's 24 image blocks since then; before, "all" meant 21 of them.
CLIP_LORA_BLOCKS_24 = {"all": range(24), "half-up": range(12, 24), "half-bottom": range(12)}


def _clip_lora_places(
    towers: list[str], position: str, depths: dict[str, int], layers: int
) -> list[tuple[str, int]]:
    """Tower and block of each layer in a file, by the table whose number of layers fits."""
    blocks = {
        tower: range(depths[tower]) if position == "all" else CLIP_LORA_BLOCKS[position]
        for tower in towers
    }
    if "image" in towers and depths["image"] == 24:
        new = {**blocks, "image": CLIP_LORA_BLOCKS_24.get(position, blocks["image"])}
        old = {**blocks, "image": range(21) if position == "all" else blocks["image"]}
        blocks = old if layers == sum(map(len, old.values())) else new
    return [(tower, block) for tower in towers for block in blocks[tower]]


def _read_clip_lora(path: Path, content: dict, method: LoRA) -> tuple[dict[str, Tensor], dict]:
    """weights: {"layer_i": {"q_proj": {"w_lora_A", "w_lora_B"}, …, "proj"}}, text blocks first.

    Their code multiplies by α/√R, although the paper writes α/R.
    """
    try:
        weights, metadata = content["weights"], content["metadata"]
        towers = {"both": ["text", "image"], "text": ["text"], "vision": ["image"]}
        places = _clip_lora_places(
            towers[metadata["encoder"]], metadata["position"], tower_depths(method), len(weights)
        )
        if len(places) != len(weights):
            raise UserError(
                f"{path}: holds {len(weights)} layers, but encoder {metadata['encoder']}, position "
                f"{metadata['position']} are {len(places)} layers of this model; give the model it "
                "was made for with --model"
            )
        pairs = {
            (tower, block, {"proj": "o"}.get(name, name[0])): (pair["w_lora_A"], pair["w_lora_B"])
            for i, (tower, block) in enumerate(places)
            for name, pair in weights[f"layer_{i}"].items()
        }
        alpha = metadata["alpha"]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a complete file of CLIP-LoRA ({error!r:.200})") from None
    expect(alpha, float, str(path), "metadata.alpha")
    state, settings = fuse(path, pairs, method)
    alphas = {f"{tower}_alpha": float(alpha) for tower in {key[0] for key in pairs}}
    return state, settings | alphas | {"scaling": "sqrt"}


def _read_loralib(path: Path, content, method: LoRA) -> tuple[dict[str, Tensor], dict]:
    """Names such as visual.transformer.resblocks.0.attn.in_proj.lora_A, after any prefix; DISEF's
    own code calls the projections qkv and proj. The file has neither α nor the parts, so the flags
    set them.
    """
    state = {}
    for name, tensor in content.items() if isinstance(content, dict) else ():
        match = re.fullmatch(
            r"(?:.*?\.)??((?:visual\.)?transformer\.resblocks\.\d+\.attn\.)"
            r"(?:(in_proj|qkv)|out_proj|proj)\.(lora_[AB])",
            str(name),
        )
        if match is not None and isinstance(tensor, Tensor):
            projection = "in_proj" if match[2] else "out_proj"
            state[f"clip.{match[1]}{projection}.{match[3]}"] = tensor
        elif "lora_" in str(name):
            raise UserError(
                f"{path}: {name} is not a LoRA tensor of an attention projection, and "
                "--method lora learns no others"
            )
    if not state:
        raise UserError(
            f"{path}: has no tensor of loralib (…transformer.resblocks.N.attn.in_proj.lora_A) and "
            "no weights and metadata of CLIP-LoRA; give a file of one of them"
        )
    check_matrices(path, state)
    ranks: dict[str, int] = {}
    for tower, prefix in OUR_TOWER.items():
        found = [t.shape[-1] for n, t in state.items() if n.startswith(prefix) and n[-1] == "B"]
        ranks |= {f"{tower}_rank": found[0]} if found else {}
    return state, ranks
