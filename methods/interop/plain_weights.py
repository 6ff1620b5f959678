"""Turn a trained method into plain weights: a whole CLIP, or a classifier matrix.

    merged_clip    a CLIP with the corrections added to its weights (LoRA), or with its new weights
                   (full fine-tuning; two-stage, whose classifier is written separately);
                   clip_min/formats.py writes it for other libraries
    classifier     a row for each class name: the text features of learned prompts, or a linear head

A UserError says why, if a method cannot be written in this form.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import CLIP, UserError
from clip_min.weights import mismatches
from methods.base import Method
from methods.lora import GroupedLoRA
from methods.two_stage import TwoStage


def merged_clip(method: Method) -> CLIP:
    """The method's CLIP as a plain CLIP with the same logits (for two-stage: the logits of names
    without a row in its classifier). The method cannot be used afterwards.
    """
    clip = method.clip
    for module in list(clip.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, GroupedLoRA):
                layer.merge()
                setattr(module, name, layer.base)
    with torch.device("meta"):  # only names and shapes
        plain = CLIP(clip.config).state_dict()
    apart = ["classifier"] if isinstance(method, TwoStage) else []
    learned = [name for name in method.adapter_state() if name not in apart]
    outside = [name for name in learned if not name.startswith("clip.")]
    if outside or mismatches(clip.state_dict(), plain):
        raise UserError(
            f"{type(method).__name__} is more than a CLIP with other weights: it learns "
            f"{(outside or ['parts of its own'])[0]}; try --format classifier"
        )
    return clip


@torch.no_grad()
def classifier(method: Method) -> dict[str, Tensor]:
    """The method's `matrix`: weight (K, E), a row for each class name, and logit_scale or bias.

    The logits of this matrix are compared with the method's on random images.
    """
    clip, rng = method.clip, torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, *2 * [clip.config.image_size], generator=rng)
    with method.inference():
        tensors = method.matrix()
        fits = tensors["weight"].dim() == 2 and torch.allclose(
            method(images), _logits(clip.encode_image(images), **tensors), rtol=1e-3, atol=1e-3
        )
    if not fits:
        raise UserError(
            f"{type(method).__name__} has no classifier matrix: its logits are not a product of "
            "CLIP's image features with a row for each class (CoCoOp's prompts, for example, "
            "depend on the image); choose another --format"
        )
    return tensors


def _logits(f: Tensor, weight: Tensor, logit_scale=None, bias=None) -> Tensor:
    """The formulas of `Method.matrix`: f (B, E) -> (B, K)."""
    if bias is not None:
        return f @ weight.T + bias
    return logit_scale * F.normalize(f, dim=-1) @ weight.T
