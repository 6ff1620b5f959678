"""CLIP-Adapter: a small network after a frozen tower, mixed with its input.

Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters", arXiv:2110.04544.
On the feature f (E,) of an image, not normalised,

    A(f) = relu(relu(f·W₁ᵀ)·W₂ᵀ)         W₁ (E/4, E), W₂ (E, E/4), no biases
    f'   = r·A(f) + (1 - r)·f            r = 0.2: most of CLIP's own feature stays

and the rest is zero-shot CLIP. A second adapter can change the text features W in the same way
(`--adapters both`, as in JCLIP), and r can be learned, as the sigmoid of a free number.

The published code trains with CoOp's settings, and so does `--recipe paper`.
"""

from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from clip_min import UserError
from methods.base import DEFAULT, TrainingSettings
from methods.coop import PUBLISHED
from methods.depth_head import DepthHeadSettings, WithDepthHead
from methods.templates import TemplateSettings


class Adapter(nn.Module):
    """x (..., E) -> r·A(x) + (1 - r)·x."""

    def __init__(self, embed: int, reduction: int, ratio: float, learn_ratio: bool):
        super().__init__()
        hidden = max(1, embed // reduction)
        self.layers = nn.Sequential(
            nn.Linear(embed, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, embed, bias=False),
            nn.ReLU(),
        )
        self.fixed = ratio
        self.free = nn.Parameter(torch.tensor(ratio).logit()) if learn_ratio else None

    @property
    def ratio(self) -> Tensor | float:
        """The mixing ratio r, fixed or learned."""
        return self.fixed if self.free is None else self.free.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.ratio * self.layers(x) + (1 - self.ratio) * x


@dataclass(frozen=True)
class ClipAdapterSettings(TrainingSettings, TemplateSettings, DepthHeadSettings):
    adapters: Annotated[Literal["image", "text", "both"], "features to adapt"] = "image"
    ratio: Annotated[float, "r, the share of the adapter's output; 0 is zero-shot CLIP"] = 0.2
    learn_ratio: Annotated[bool, "learn r, starting from --ratio"] = False
    reduction: Annotated[int, "E divided by the width between the two layers"] = 4
    limits = {**TrainingSettings.limits, "ratio": (0, 1), "reduction": (1, inf)}

    def __post_init__(self):
        super().__post_init__()
        if self.learn_ratio and not 0 < self.ratio < 1:
            raise UserError(f"--ratio {self.ratio}: --learn-ratio needs a start between 0 and 1")


OWN = {"lr": 1e-3, "epochs": 50, "patience": 10}


class ClipAdapter(WithDepthHead):  # classifies by `features`; --depth-head: depth_head.py
    title = "a small network after the image tower (CLIP-Adapter)"
    Settings = ClipAdapterSettings
    recipes = {
        "default": {**OWN, **DEFAULT, "min_steps": 3000},
        "paper": {**PUBLISHED, "epochs": 200},
        "jclip": {**OWN, "adapters": "both"},
        "demo": {**OWN, "lr": 3e-3, "ratio": 0.6},
    }
    demo_model = {"lr": 3e-3, "ratio": 0.6}

    def __init__(self, clip, classnames, template, settings: ClipAdapterSettings):
        super().__init__(clip, classnames, template, settings)
        sides = ["image", "text"] if settings.adapters == "both" else [settings.adapters]
        shape = (clip.config.embed_dim, settings.reduction, settings.ratio, settings.learn_ratio)
        self.adapters = nn.ModuleDict({side: Adapter(*shape) for side in sides}).to(clip.device)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image features x (B, E) -> adapted features of images (B, E) and classes (K, E)."""
        features = {"image": x, "text": self.class_features()}
        for side, adapter in self.adapters.items():
            features[side] = adapter(features[side].float())
        return features["image"], features["text"]
