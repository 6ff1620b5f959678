"""What was learned as plain weights, which need no method: of a whole CLIP, or of a classifier.

    merged_clip    a CLIP with the corrections added to its weights (LoRA), or simply with its new
                   weights (full fine-tuning; two-stage's, whose classifier is written apart);
                   clip_min/formats.py writes it for other libraries
    classifier     one row for each class name: all that prompts come to, once they are learned,
                   or a linear head

Each refuses, and says why, where the form cannot hold what the method does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import CLIP, UserError
from clip_min.weights import mismatches
from methods.base import Method
from methods.cross_modal import CrossModal
from methods.linear_probe import LinearProbe
from methods.lora import GroupedLoRA
from methods.two_stage import TwoStage


def merged_clip(method: Method) -> CLIP:
    """The method's CLIP as a plain one, which gives its logits (two-stage's: those of names that
    its classifier has no row for); the method itself is used up.
    """
    clip = method.clip
    for module in list(clip.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, GroupedLoRA):
                layer.merge()
                setattr(module, name, layer.base)
    with torch.device("meta"):  # names and shapes alone
        plain = CLIP(clip.config).state_dict()
    apart = ["classifier"] if isinstance(method, TwoStage) else []
    learned = [name for name in method.adapter_state() if name not in apart]
    outside = [name for name in learned if not name.startswith("clip.")]
    if outside or mismatches(clip.state_dict(), plain):
        raise UserError(
            f"{type(method).__name__} is more than a CLIP with other weights: it learns "
            f"{(outside or ['parts of its own'])[0]}; --format classifier may hold it"
        )
    return clip


@torch.no_grad()
def classifier(method: Method) -> dict[str, Tensor]:
    """weight (K, E), a row for each class name, with what makes logits of it for a feature f (E,):

        logit_scale ()     logits = s · norm(f) · weightᵀ
        bias (K,)          logits = f · weightᵀ + bias               a linear probe's, of f as it is

    That this is so for any image is not taken for granted but tried, on random ones.
    """
    clip, dice = method.clip, torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, *2 * [clip.config.image_size], generator=dice)
    with method.inference():
        if isinstance(method, LinearProbe):
            tensors: dict[str, Tensor] = {"weight": method.head.weight, "bias": method.head.bias}
        else:
            if isinstance(method, CrossModal):
                rows: Tensor = method.head
            else:
                rows = F.normalize(method.class_features(), dim=-1)
            tensors = {"weight": rows, "logit_scale": clip.logit_scale.exp()}
        fits = tensors["weight"].dim() == 2 and torch.allclose(
            method(images), _logits(clip.encode_image(images), **tensors), rtol=1e-3, atol=1e-3
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
