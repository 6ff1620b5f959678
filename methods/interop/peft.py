"""Convert a LoRA to PEFT's format and back: adapter_config.json and adapter_model.safetensors.

`peft` applies it to `transformers.CLIPModel`, where queries, keys and values are separate layers.
The corrections of our fused projection are split for PEFT, and stacked when read (see fused.py).
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
# The keys that are read from PEFT's adapter_config.json.
PEFT = {
    "peft_type": str | None,
    "lora_alpha": float | None,
    "alpha_pattern": dict[str, float],
    "use_rslora": bool | None,
}
# PEFT's initialisations of a LoRA that do not change the frozen weights.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def to_peft(method: Method) -> tuple[dict[str, Tensor], dict]:
    """A LoRA -> the tensors of adapter_model.safetensors, and adapter_config.json.

    Our fused projection is three layers there, so a stack A (G·R, D), B (G·D, R) becomes G pairs
    A (R, D), B (D, R). Patterns hold the second tower's rank and α. Modules have their full names,
    so that none is matched by accident.
    """
    if not isinstance(method, LoRA):
        raise UserError(f"--format peft needs a LoRA, and {type(method).__name__} is none")
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
            f"{path}: was initialised by {start}, for which PEFT changes the frozen weights, so it "
            "does not fit CLIP's; save it with PEFT's path_initial_model_for_weight_conversion"
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
                f"{path}: {name} is not a LoRA tensor of an attention projection of CLIPModel, and "
                "--method lora learns no others"
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
            raise UserError(f"{path}: the {tower} tower has no single lora_alpha; expected one")
        settings[f"{tower}_alpha"] = float(alpha)
    return state, settings | {"scaling": "sqrt" if config["use_rslora"] else "rank"}


# Some regular expressions take years: those with nested or many repetitions.
SLOW = re.compile(r"\)[*+?{]|\{|([*+?].*){3}", re.DOTALL)


def _by_pattern(path: Path, patterns: dict[str, float], module: str, default: float | None):
    """PEFT's rule: the value of the first pattern that matches the end of the module's name."""
    for pattern, value in patterns.items():
        try:
            if len(pattern) > 300 or SLOW.search(pattern):
                raise ValueError("too many repetitions")
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{path}/adapter_config.json: alpha_pattern {pattern[:100]!r} cannot be used "
                f"({error}); give the full names of modules"
            ) from None
    return default
