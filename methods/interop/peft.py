"""LoRA to PEFT and back: adapter_config.json and adapter_model.safetensors in a folder.

`peft` applies it to `transformers.CLIPModel`, where queries, keys and values are layers of their
own: the corrections of our fused projection are split there and stacked here (see fused.py).
"""

import re
from pathlib import Path

from torch import Tensor

from clip_min import UserError
from clip_min.files import read_json, read_safetensors
from clip_min.typed import expect
from methods.base import Method
from methods.interop.fused import fuse
from methods.lora import GroupedLoRA, LoRA

TO_HUGGING_FACE = {
    "clip.visual.transformer": "vision_model",
    "clip.transformer": "text_model",
}
# What is read of PEFT's adapter_config.json.
PEFT = {
    "peft_type": str | None,
    "lora_alpha": float | None,
    "alpha_pattern": dict[str, float],
    "use_rslora": bool | None,
}
# PEFT's ways to start a LoRA that leave the frozen weights as they are.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def to_peft(method: Method) -> tuple[dict[str, Tensor], dict]:
    """A LoRA -> the tensors of adapter_model.safetensors, and adapter_config.json.

    Our one fused projection is three there, so a stack A (G·R, D), B (G·D, R) becomes G pairs
    A (R, D), B (D, R). The second tower's rank and α stand in patterns. Every module is named in
    full, so that no other one is meant by accident.
    """
    if not isinstance(method, LoRA):
        raise UserError(f"PEFT's adapter is a LoRA's, and {type(method).__name__} is none")
    tensors, ranks, alphas = {}, {}, {}
    for name, layer in method.named_modules():
        if not isinstance(layer, GroupedLoRA):
            continue
        tower, _, place = name.partition(".resblocks.")
        block, _, projection = place.split(".")  # "3.attn.in_proj"
        letters = ["qkv"[part] for part in layer.parts] if projection == "in_proj" else ["out"]
        pairs = zip(layer.lora_A.split(layer.rank), layer.lora_B.chunk(len(letters)), strict=True)
        for letter, (a, b) in zip(letters, pairs, strict=True):
            module = f"{TO_HUGGING_FACE[tower]}.encoder.layers.{block}.self_attn.{letter}_proj"
            tensors[f"base_model.model.{module}.lora_A.weight"] = a  # (R, D)
            tensors[f"base_model.model.{module}.lora_B.weight"] = b  # (D, R)
            s = method.settings
            ranks[module] = layer.rank
            alphas[module] = s.image_alpha if "visual" in tower else s.text_alpha
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": method.settings.scaling == "sqrt",  # α/√R
        "lora_dropout": method.settings.dropout,
        "bias": "none",
        "target_modules": list(ranks),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "inference_mode": True,
    }
    return tensors, config


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
    modules: dict[tuple, str] = {}
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
        found.setdefault(key, {})[letter] = tensor
        modules[key] = module
    alphas = {}
    for key, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise UserError(f"{path}: {modules[key]} has only one of lora_A and lora_B")
        alphas[key] = _by_pattern(path, config["alpha_pattern"], modules[key], config["lora_alpha"])
    pairs = {key: (pair["A"], pair["B"]) for key, pair in found.items()}
    state, settings = fuse(path, pairs, method)
    for tower in {key[0] for key in pairs}:
        values = {alpha for key, alpha in alphas.items() if key[0] == tower}
        if len(values) > 1 or (alpha := values.pop()) is None:
            raise UserError(f"{path}: the {tower} tower has no single lora_alpha, as it has here")
        settings[f"{tower}_alpha"] = float(alpha)
    return state, settings | {"scaling": "sqrt" if config["use_rslora"] else "rank"}


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
