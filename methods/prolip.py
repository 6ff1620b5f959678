"""ProLIP: only the image tower's last projection learns, and stays near its pretrained value.

Fahes et al., "CLIP's Visual Embedding Projector is a Few-shot Cornucopia", arXiv:2410.05270. The
image tower ends in a matrix V (D, E), `visual.proj`, which takes the class token z (D,), after its
last LayerNorm, into the space that images and texts share:

    logits = s · norm(z·V)·norm(W)ᵀ                                      (K,)
    loss   = CE(logits) + λ · ‖V - V₀‖²        V₀ CLIP's own V; λ = 1/S, S the shots

V starts at V₀, which is zero-shot CLIP; with fewer images it stays closer. z never changes, so
`encode` returns z, and every step can use all images at once. The paper takes 300 steps of Adam
with a large ε. New names use the same V.

Recipe `paper` is the published experiment without validation (lr 1e-5, λ = 1/S), also used for base
to novel. In another experiment the authors choose lr and λ from 49 pairs, on S validation images of
each class. What the recipe does differently: random crops show 8-100 % of an image, those of the
published code 50-100 %; V is float32 instead of float16, in which Adam's steps may be longer, as
small squared gradients are rounded to 0; S is the number of images of the largest class, if no
class has --shots.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from methods.base import Method, TrainingSettings
from methods.templates import TemplateSettings


@dataclass(frozen=True)
class ProLIPSettings(TrainingSettings, TemplateSettings):
    penalty: Annotated[float, "λ, weight of ‖V - V₀‖²; below 0: 1/shots"] = -1.0


OWN = {
    "lr": 1e-5,
    "eps": 1e-4,
    "weight_decay": 0.0,  # AdamW without it is Adam
    "batch_size": 1_000_000,  # all images
    "epochs": 300,
    "schedule": "step",
    "validations": 10,
    "patience": 0,
    "keep": "latest-best",
}


class ProLIP(Method):
    title = "the image tower's last projection, held near its pretrained value (ProLIP)"
    Settings = ProLIPSettings
    settings: ProLIPSettings
    recipes = {
        "default": {**OWN, "epochs": 1000, "validations": 40},
        "paper": {**OWN, "augment": "crop-flip", "keep": "last"},
        "demo": {**OWN, "lr": 1e-3},
    }
    demo_model = {"lr": 1e-3}

    def __init__(self, clip, classnames, template, settings: ProLIPSettings):
        super().__init__(clip, classnames, template, settings)
        self.clip.visual.proj = nn.Parameter(clip.visual.proj.detach().float().clone())
        self.penalty = max(settings.penalty, 0.0)

    @property
    def encoder(self) -> tuple | None:
        kind = super().encoder
        return kind and (*kind, "before the projection")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, n, n), normalised -> z (B, D)."""
        tower = self.clip.visual
        x = tower.transformer(tower.begin(images, 0), read=slice(0, 1))  # (B, 1, D)
        return tower.ln_post(x[:, 0]).to(tower.proj.dtype)

    def image_features(self, x: Tensor) -> Tensor:
        """x (B, D), as `encode` gives it -> features (B, E), not normalised."""
        return x @ self.clip.visual.proj

    def zero_shot_state(self) -> dict[str, Tensor]:
        """V₀."""
        return {"clip.visual.proj": self.lent[0].visual.proj}

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """x (B, D), as `encode` gives it, labels (B,) -> scalar."""
        moved = self.clip.visual.proj - self.lent[0].visual.proj.detach()
        return super().loss(x, labels) + self.penalty * moved.square().sum()

    def fit(self, train, val, descend) -> None:
        if self.settings.penalty < 0:
            self.penalty = 1 / train.shots
        descend(self, train, val)
