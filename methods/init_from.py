"""Start from an adapter made elsewhere: `train.py --init-from PATH`.

    our own          a run folder: config.json and adapter.safetensors; any method's
    PEFT             a folder: adapter_config.json and adapter_model.safetensors, made on
                     `transformers.CLIPModel`
    CLIP-LoRA        a .pt file of github.com/MaxZanella/CLIP-LoRA: {"weights", "metadata"}
    loralib          a .pt or .safetensors file of `loralib.MergedLinear` tensors on OpenAI's names

All hold the same correction s·B·A. Ours and loralib's is fused as CLIP's projection is: the A of
each part stacked, and the B of each part stacked; the others keep q, k and v apart:

    ours   in_proj.lora_A (G·R, D)          in_proj.lora_B (G·D, R)          for G parts
    PEFT   q_proj.lora_A.weight (R, D), …   q_proj.lora_B.weight (D, R), …

Shapes do not tell everything: neither s nor which parts a stack holds. Where the file does, it is
compared with the settings of the method that is to go on, which must be the same.
"""

import re
import typing
from pathlib import Path

import torch
from torch import Tensor

from clip_min import UserError
from clip_min.files import read_adapter, read_json, read_safetensors
from clip_min.pickled import read_pickled
from clip_min.typed import expect
from methods.base import Method
from methods.linear_probe import LinearProbe
from methods.lora import LoRA, block_numbers
from methods.support import WithSupport

# Settings that say what tensors mean, beyond their shapes.
MEANING = ("image_rank", "image_alpha", "text_rank", "text_alpha", "parts", "towers", "blocks")
MEANING += ("scaling", "n_ctx", "position", "class_specific", "first_block", "ratio", "activation")
# What is read of PEFT's adapter_config.json.
PEFT = {
    "peft_type": str | None,
    "lora_alpha": float | None,
    "alpha_pattern": dict[str, float],
    "use_rslora": bool | None,
}
# PEFT's ways to start a LoRA that leave the frozen weights as they are.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
OUR_TOWER = {"image": "clip.visual.transformer", "text": "clip.transformer"}

# tower, block, part (of q, k, v, o) -> its A (R, D) and B (D, R)
Corrections = dict[tuple[str, int, str], tuple[Tensor, Tensor]]


def load_into(method: Method, path: Path, fingerprint: str) -> None:
    """Put the adapter at `path` into `method`, as if it had been learned here.

    fingerprint: that of the CLIP under `method`, before it was given new parts.
    """
    try:
        if isinstance(method, LinearProbe | WithSupport):
            raise UserError(
                f"{path}: {type(method).__name__} takes all it learns from the training images, "
                "wherever it starts; drop the flag, or test that run with eval.py"
            )
        state, settings = read(path, method, fingerprint)
        differ = [k for k in MEANING if k in settings and not _same(method, k, settings[k])]
        if differ:
            flags = " ".join(_flag(key, settings[key]) for key in differ)
            raise UserError(f"{path}: was made with other settings than these; give {flags}")
        try:
            method.load_adapter(state)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    except UserError as error:
        raise UserError(f"--init-from {error}") from None


def _flag(key: str, value) -> str:
    """What to type for a setting: --image-rank 4, --class-specific, --no-class-specific."""
    key = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{key}" if value else f"--no-{key}"
    return f"--{key} {value}"


def read(path: Path, method: Method, fingerprint: str) -> tuple[dict[str, Tensor], dict]:
    """Whichever of the four kinds it is -> tensors under our names, settings as far as known."""
    if path.is_file():
        return read_file(path, _needs_lora(method, path))
    if (path / "adapter_config.json").is_file():
        return read_peft(path, _needs_lora(method, path))
    if path.is_dir():
        return read_run(path, method, fingerprint)
    raise UserError(f"{path}: there is no such folder or file")


def _needs_lora(method: Method, path: Path) -> LoRA:
    if not isinstance(method, LoRA):
        raise UserError(
            f"{path}: is a LoRA adapter, and {type(method).__name__} learns something "
            "else; use --method lora, or give a run of the same method"
        )
    return method


def _same(method: Method, key: str, value) -> bool:
    """Whether a setting of the method means the same as `value`, however it is written."""
    if not hasattr(method.settings, key):
        return True  # the tensors' names and shapes will tell
    mine = getattr(method.settings, key)
    if key == "parts":
        return set(mine) == set(value)
    if key == "blocks":
        depth = max(_depths(method).values())
        return all(
            block_numbers(mine, depth, tower) == block_numbers(value, depth, tower)
            for tower in OUR_TOWER
        )
    return mine == value


def _depths(method: Method) -> dict[str, int]:
    """Blocks of each tower."""
    clip = method.clip
    return {
        "text": len(clip.transformer.resblocks),
        "image": len(clip.visual.transformer.resblocks),
    }


def read_run(path: Path, method: Method, fingerprint: str) -> tuple[dict[str, Tensor], dict]:
    """A folder that train.py left -> its learned tensors and settings."""
    hint = "expected a run of train.py or a PEFT adapter"
    kind = {"fingerprint": str, "settings": dict, "model": str}
    config = read_json(path / "config.json", hint, kind)
    made, settings = config["fingerprint"], dict(config["settings"])
    hints = typing.get_type_hints(type(method.settings))
    known = {key: hints[key] for key in MEANING if key in hints and key in settings}
    expect(settings, known, f"{path}/config.json", "settings")
    if made != fingerprint:
        raise UserError(
            f"{path}: was trained on {config['model']} with fingerprint {made}, "
            f"but the model here has {fingerprint}; give the right one with --model"
        )
    unused = {"image": "text_", "text": "image_"}.get(settings.get("towers"), "no such setting")
    settings = {key: value for key, value in settings.items() if not key.startswith(unused)}
    return read_adapter(path / "adapter.safetensors", config), settings


def read_peft(path: Path, method: LoRA) -> tuple[dict[str, Tensor], dict]:
    """A PEFT adapter of `transformers.CLIPModel` -> our tensors, and the settings they imply."""
    config = read_json(path / "adapter_config.json", "a PEFT adapter has one")
    config = dict.fromkeys(PEFT) | config
    config["alpha_pattern"] = config["alpha_pattern"] or {}
    expect(config, PEFT, f"{path}/adapter_config.json")
    if config["peft_type"] != "LORA":
        raise UserError(f"{path}: is PEFT's {config['peft_type']}, expected LORA")
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise UserError(
            f"{path}: started by {start}, for which PEFT changes the frozen weights: it corrects "
            "others than CLIP's; save it from PEFT with path_initial_model_for_weight_conversion"
        )
    found: dict[tuple, dict[str, Tensor]] = {}
    for name, tensor in read_safetensors(path / "adapter_model.safetensors")[0].items():
        match = re.fullmatch(
            r"base_model\.model\.((vision|text)_model\.encoder\.layers\.(\d{1,4})\.self_attn\."
            r"(q|k|v|out)_proj)\.lora_([AB])\.weight",
            name,
        )
        if match is None:
            raise UserError(
                f"{path}: {name} is no LoRA tensor of an attention projection of CLIPModel, which "
                "are all that --method lora learns"
            )
        module, tower, block, part, letter = match.groups()
        key = ("image" if tower == "vision" else "text", int(block), part[0])
        found.setdefault(key, {"module": module})[letter] = tensor
    alphas = {}
    for (tower, block, part), pair in found.items():
        if pair.keys() != {"module", "A", "B"}:
            raise UserError(f"{path}: {pair['module']} has only one of lora_A and lora_B")
        alphas[tower, block, part] = _by_pattern(
            path, config["alpha_pattern"], pair["module"], config["lora_alpha"]
        )
    pairs = {key: (pair["A"], pair["B"]) for key, pair in found.items()}
    state, settings = _fuse(path, pairs, method)
    for tower in {key[0] for key in pairs}:
        values = {alpha for key, alpha in alphas.items() if key[0] == tower}
        if len(values) > 1 or (alpha := values.pop()) is None:
            raise UserError(f"{path}: the {tower} tower has no single lora_alpha, as it has here")
        settings[f"{tower}_alpha"] = float(alpha)
    return state, settings | {"scaling": "sqrt" if config["use_rslora"] else "rank"}


def read_file(path: Path, method: LoRA) -> tuple[dict[str, Tensor], dict]:
    """A file of CLIP-LoRA, or of loralib's tensors -> our tensors, the settings they imply."""
    if path.suffix == ".safetensors":
        return _read_loralib(path, read_safetensors(path)[0], method)
    content = read_pickled(path)
    if isinstance(content, dict) and {"weights", "metadata"} <= content.keys():
        return _read_clip_lora(path, content, method)
    return _read_loralib(path, content, method)


# CLIP-LoRA's --position, in towers of 12 blocks and, until September 2024, in all.
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


# In ViT-L/14's 24 image blocks since then; before, "all" were 21 of them.
CLIP_LORA_BLOCKS_24 = {"all": range(24), "half-up": range(12, 24), "half-bottom": range(12)}


def _clip_lora_places(
    towers: list[str], position: str, depths: dict[str, int], layers: int
) -> list[tuple[str, int]]:
    """Tower and block of each layer in a file; of their two tables the one that has so many."""
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

    Their code multiplies by α/√R, whatever the paper writes.
    """
    try:
        weights, metadata = content["weights"], content["metadata"]
        towers = {"both": ["text", "image"], "text": ["text"], "vision": ["image"]}
        places = _clip_lora_places(
            towers[metadata["encoder"]], metadata["position"], _depths(method), len(weights)
        )
        if len(places) != len(weights):
            raise UserError(
                f"{path}: holds {len(weights)} layers, but encoder "
                f"{metadata['encoder']}, position {metadata['position']} are {len(places)} of this "
                "model's; give the model it was made for with --model"
            )
        pairs = {
            (tower, block, {"proj": "o"}.get(name, name[0])): (pair["w_lora_A"], pair["w_lora_B"])
            for i, (tower, block) in enumerate(places)
            for name, pair in weights[f"layer_{i}"].items()
        }
        alpha = metadata["alpha"]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a file of CLIP-LoRA ({error!r:.200})") from None
    expect(alpha, float, str(path), "metadata.alpha")
    state, settings = _fuse(path, pairs, method)
    alphas = {f"{tower}_alpha": float(alpha) for tower in {key[0] for key in pairs}}
    return state, settings | alphas | {"scaling": "sqrt"}


def _read_loralib(path: Path, content, method: LoRA) -> tuple[dict[str, Tensor], dict]:
    """Names such as visual.transformer.resblocks.0.attn.in_proj.lora_A, after any prefix; DISEF's
    own code calls the projections qkv and proj. α and the parts are not told: the flags' count.
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
                f"{path}: {name} is no LoRA tensor of an attention projection, which "
                "are all that --method lora learns"
            )
    if not state:
        raise UserError(
            f"{path}: no tensor …transformer.resblocks.N.attn.in_proj.lora_A as "
            "loralib names it, and not CLIP-LoRA's weights and metadata"
        )
    _check_matrices(path, state)
    ranks = {}
    for tower, prefix in OUR_TOWER.items():
        found = [t.shape[-1] for n, t in state.items() if n.startswith(prefix) and n[-1] == "B"]
        ranks |= {f"{tower}_rank": found[0]} if found else {}
    return state, ranks


def _fuse(path: Path, pairs: Corrections, method: LoRA) -> tuple[dict[str, Tensor], dict]:
    """Corrections of single parts -> our stacked tensors, and the settings they imply."""
    _check_matrices(path, {f"{key} {i}": t for key, p in pairs.items() for i, t in enumerate(p)})
    towers = sorted({tower for tower, _, _ in pairs})
    blocks = {t: sorted({b for tower, b, _ in pairs if tower == t}) for t in towers}
    parts = "".join(p for p in "qkvo" if any(part == p for _, _, part in pairs))
    depths = _depths(method)
    numbers = {  # image before text, as --blocks has them
        "all" if found == list(range(depths[t])) else ",".join(map(str, found)): None
        for t, found in blocks.items()
    }
    if not pairs:
        raise UserError(f"{path}: corrects nothing")
    settings = {"parts": parts, "towers": "both" if len(towers) == 2 else towers[0]}
    settings["blocks"] = "/".join(numbers)
    state = {}
    for tower in towers:
        rank = {len(a) for (t, _, _), (a, _) in pairs.items() if t == tower}
        if len(rank) > 1:
            raise UserError(f"{path}: the {tower} tower has ranks {sorted(rank)}; here it has one")
        settings[f"{tower}_rank"] = rank.pop()
        for block in blocks[tower]:
            missing = [part for part in parts if (tower, block, part) not in pairs]
            if missing:
                raise UserError(
                    f"{path}: block {block} of the {tower} tower has no {missing[0]}_proj, which "
                    "others have; here all blocks learn the same parts"
                )
            where = f"{OUR_TOWER[tower]}.resblocks.{block}.attn"
            for projection, letters in (("in_proj", parts.replace("o", "")), ("out_proj", "o")):
                stack = [pairs[tower, block, p] for p in letters if p in parts]
                if len({(a.shape, b.shape) for a, b in stack}) > 1:
                    raise UserError(
                        f"{path}: parts of block {block}, {tower} tower, differ in shape"
                    )
                if stack:
                    state[f"{where}.{projection}.lora_A"] = torch.cat([a for a, _ in stack])
                    state[f"{where}.{projection}.lora_B"] = torch.cat([b for _, b in stack])
    return state, settings


def _check_matrices(path: Path, found: dict[str, Tensor]) -> None:
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or not tensor.numel():
            raise UserError(f"{path}: {name} is no matrix, as both of a LoRA's tensors are")


# Some regular expressions take years: those that repeat what repeats, or repeat much.
SLOW = re.compile(r"\)[*+?{]|\{|([*+?].*){3}", re.DOTALL)


def _by_pattern(path: Path, patterns: dict[str, float], module: str, default: float | None):
    """PEFT's rule: the value of the first pattern that the end of the module's name matches."""
    for pattern, value in patterns.items():
        try:
            if len(pattern) > 300 or SLOW.search(pattern):
                raise ValueError("it repeats too much")
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{path}/adapter_config.json: alpha_pattern {pattern[:100]!r} cannot be taken "
                f"({error}); write the names of modules in full"
            ) from None
    return default
