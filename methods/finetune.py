"""Full fine-tuning: all of CLIP's weights, or a chosen part of them.

The most flexible method and, with few images, the easiest to overfit: every weight of both towers
moves, with a small learning rate, float32 master weights and clipped gradients, to lower

    class        CE over s · norm(f)·norm(W)ᵀ, (B, K): B images by the prompts of all K classes, or
    contrastive  CE over rows and columns of s · norm(f)·norm(W[labels])ᵀ, (B, B): B images by the
                 B prompts of their classes, as in pretraining (contrastive.py); proposed by Goyal
                 et al., "Finetune Like You Pretrain", arXiv:2212.00638

What may move is chosen by `--train`: both towers, one of them, or the last N blocks of each with
what comes after them. The adapter it saves is all of these weights.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from clip_min import UserError
from methods.base import DEFAULT, Method, TrainingSettings
from methods.contrastive import contrastive_loss
from methods.templates import PromptSettings


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings, PromptSettings):
    train: Annotated[str, "weights that learn: both, image, text (towers) or last-N (blocks)"] = (
        "both"
    )
    objective: Annotated[
        Literal["class", "contrastive"], "cross-entropy over classes, or pairs"
    ] = "class"
    plain_pairs: Annotated[bool, "contrastive: only an image's own caption is right"] = False


OWN = {"lr": 1e-5, "clip_norm": 5.0}


class Finetune(Method):
    title = "all of CLIP's weights, or the last blocks'"
    Settings = FinetuneSettings
    recipes = {
        "default": {**OWN, **DEFAULT},
        "contrastive": {**OWN, **DEFAULT, "objective": "contrastive"},
        "demo": {**OWN, "lr": 3e-4},
    }
    demo_model = {"lr": 3e-4}

    def __init__(self, clip, classnames, template, settings: FinetuneSettings):
        super().__init__(clip, classnames, template, settings)
        train_weights(self.clip, trained_names(clip, settings.train))
        self.text_learns = settings.train != "image"
        if settings.train in ("both", "image"):
            self.first_block = 0
        elif settings.train != "text":
            self.first_block = clip.config.vision_layers - int(settings.train.split("-")[1])

    def zero_shot_state(self) -> dict[str, Tensor]:
        """The lent CLIP's weights."""
        names = self.adapter_state()
        return {name: self.lent[0].get_parameter(name.removeprefix("clip.")) for name in names}

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Encoded images x (B, …), labels (B,) -> scalar."""
        if self.clip.logit_scale.requires_grad:  # as in CLIP's pretraining: s <= 100
            with torch.no_grad():
                self.clip.logit_scale.clamp_(max=math.log(100))
        if self.settings.objective == "class":
            return super().loss(x, labels)
        captions = self.class_features()[labels]  # (K, E) -> (B, E)
        pairs = self.clip.logits(self.image_features(x), captions)  # (B, B)
        return contrastive_loss(pairs, labels, self.settings.plain_pairs)


def train_weights(clip, names: list[str]) -> None:
    """Let these weights of a method's own CLIP learn, in float32; the lent one's stay."""
    clip.float()
    for name in names:
        weight = clip.get_parameter(name)
        weight.data = weight.data.clone()
        weight.requires_grad_()


def trained_names(clip, part: str) -> list[str]:
    """The parameters of CLIP that `part` ("both", "image", "text", "last-2") names."""
    names = [name for name, _ in clip.named_parameters()]
    if part == "both":
        return names
    if part in ("image", "text"):
        image = [name for name in names if name.startswith("visual.")]
        return image if part == "image" else [n for n in names if n not in image + ["logit_scale"]]
    depth = min(len(clip.transformer.resblocks), len(clip.visual.transformer.resblocks))
    last = part.removeprefix("last-")
    if last == part or not last.isdecimal() or len(last) > 4 or not 1 <= int(last) <= depth:
        raise UserError(
            f"--train {part}: expected both, image, text, or last-1 to last-{depth} (blocks)"
        )
    chosen = ["visual.ln_post", "visual.proj", "ln_final", "text_projection"]
    for tower, transformer in {"visual.": clip.visual.transformer, "": clip.transformer}.items():
        blocks = len(transformer.resblocks)
        chosen += [f"{tower}transformer.resblocks.{blocks - 1 - i}" for i in range(int(last))]
    return [name for name in names if any(name == c or name.startswith(f"{c}.") for c in chosen)]
