"""What was learned, in forms that other software applies: weights, a PEFT adapter, a classifier.

    merged_clip    a CLIP with the corrections added to its weights (LoRA), or simply with its new
                   weights (full fine-tuning); clip_min/formats.py writes it for other libraries
    to_peft        LoRA's thin matrices, for `peft` on `transformers.CLIPModel`
    classifier     one row for each class name: all that prompts come to, once they are learned,
                   or a linear head

Each refuses, and says why, where the form cannot hold what the method does.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import CLIP, UserError
from clip_min.weights import mismatches
from methods.base import Method
from methods.cross_modal import CrossModal
from methods.grouped_lora import GroupedLoRA
from methods.linear_probe import LinearProbe
from methods.lora import LoRA

TO_HUGGING_FACE = {
    "clip.visual.transformer": "vision_model",
    "clip.transformer": "text_model",
}


def merged_clip(method: Method) -> CLIP:
    """The method's CLIP as a plain one, which gives its logits; the method itself is used up."""
    clip = method.clip
    for module in list(clip.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, GroupedLoRA):
                layer.merge()
                setattr(module, name, layer.base)
    with torch.device("meta"):  # names and shapes alone
        plain = CLIP(clip.config).state_dict()
    outside = [name for name in method.adapter_state() if not name.startswith("clip.")]
    if outside or mismatches(clip.state_dict(), plain):
        raise UserError(
            f"{type(method).__name__} is more than a CLIP with other weights: it learns "
            f"{(outside or ['parts of its own'])[0]}; --format classifier may hold it"
        )
    return clip


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
        path = r"(clip.*transformer)\.resblocks\.(\d+)\.attn\.(in|out)_proj"
        tower, block, projection = re.fullmatch(path, name).groups()
        letters = ["qkv"[part] for part in layer.parts] if projection == "in" else ["out"]
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


@torch.no_grad()
def classifier(method: Method) -> dict[str, Tensor]:
    """weight (K, E), a row for each class name, with what makes logits of it for a feature f (E,):

        logit_scale ()     logits = s · norm(f) · weightᵀ
        bias (K,)          logits = f · weightᵀ + bias               a linear probe's, of f as it is

    That this is so for any image is not taken for granted but tried, on random ones.
    """
    clip, dice = method.clip, torch.Generator().manual_seed(0)
    if method.input == "features":
        x = features = torch.randn(4, clip.config.embed_dim, generator=dice)
    else:
        x = torch.randn(4, 3, *2 * [clip.config.image_size], generator=dice)
    with method.inference():
        if isinstance(method, LinearProbe):
            tensors = {"weight": method.head.weight, "bias": method.head.bias}
        else:
            learned = isinstance(method, CrossModal)
            rows = method.head if learned else F.normalize(method.class_features(), dim=-1)
            tensors = {"weight": rows, "logit_scale": clip.logit_scale.exp()}
        if method.input != "features":
            features = clip.encode_image(x)
        fits = tensors["weight"].dim() == 2 and torch.allclose(
            method(x), _logits(features, **tensors), rtol=1e-3, atol=1e-3
        )
    if not fits:
        raise UserError(
            f"{type(method).__name__} has no classifier matrix: its logits are not those of "
            "CLIP's image features with one row for each class (CoCoOp's prompts, for one, "
            "depend on the image)"
        )
    return tensors


def _logits(f: Tensor, weight: Tensor, logit_scale=None, bias=None) -> Tensor:
    """The formulas of `classifier`: f (B, E) -> (B, K)."""
    if bias is not None:
        return f @ weight.T + bias
    return logit_scale * F.normalize(f, dim=-1) @ weight.T
