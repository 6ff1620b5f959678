"""ProLIP: of CLIP only the last projection of the image tower learns, held near where it was.

Fahes et al., "CLIP's Visual Embedding Projector is a Few-shot Cornucopia", arXiv:2410.05270. The
image tower ends in a matrix V (D, E), `visual.proj`, which takes the class token z (D,), after its
last LayerNorm, into the space that images and texts share:

    logits = s · norm(z·V)·norm(W)ᵀ                                      (K,)
    loss   = CE(logits) + λ · ‖V - V₀‖²        V₀ CLIP's own V; λ = 1/S, S the shots

V starts at V₀, that is at zero-shot CLIP, and the fewer the images, the closer it stays. z never
changes, so `encode` ends there and every step may be on all images at once: the paper takes 300, of
Adam with a large ε. Names that were not learned are met by the same V.

What recipe `paper` does differently: random crops show 8-100 % of an image, the published code's
50-100 %; S is the images of the largest class, should no class have as many as --shots.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from methods.base import Method, TrainingSettings
from methods.templates import TemplateSettings


@dataclass(frozen=True)
class ProLIPSettings(TrainingSettings, TemplateSettings):
    penalty: Annotated[float, "λ, how strongly V is held near V₀; below 0: 1/shots"] = -1.0


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
    title = "the image tower's last projection, held near where it was (ProLIP)"
    Settings = ProLIPSettings
    settings: ProLIPSettings
    recipes = {
        "default": OWN,
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
