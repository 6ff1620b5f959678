"""Projection heads: two learned square layers after each frozen tower.

A baseline without a paper of its own: CLIP stays frozen, and its shared space is rearranged,

    f' = U₂ φ(U₁ norm(f))      W' = V₂ φ(V₁ norm(W))      U, V (E, E), with biases

by class cross-entropy or by CLIP's contrastive loss. With φ the identity (the default) the layers
start as identities, so training starts at zero-shot CLIP; with relu they start at random, and what
pretraining knew of the space has to be learned again from the few images.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import DEFAULT, Method, TrainingSettings
from methods.contrastive import contrastive_loss
from methods.templates import TemplateSettings


@dataclass(frozen=True)
class ProjectionSettings(TrainingSettings, TemplateSettings):
    objective: Annotated[
        Literal["class", "contrastive"], "cross-entropy over classes, or pairs"
    ] = "class"
    plain_pairs: Annotated[bool, "contrastive: only an image's own caption is right"] = False
    activation: Annotated[Literal["none", "relu"], "φ, between the two layers"] = "none"


OWN = {"optimizer": "sgd", "lr": 1e-3, "epochs": 50, "patience": 10}


class Projection(Method):
    title = "two square layers after each frozen tower"
    Settings = ProjectionSettings
    recipes = {"default": {**OWN, **DEFAULT, "min_steps": 3000}, "demo": {**OWN, "lr": 1e-2}}
    demo_model = {"lr": 1e-2}

    def __init__(self, clip, classnames, template, settings: ProjectionSettings):
        super().__init__(clip, classnames, template, settings)
        self.image_layers = self._layers().to(clip.device)
        self.text_layers = self._layers().to(clip.device)

    def _layers(self) -> nn.Sequential:
        embed = self.clip.config.embed_dim
        layers = nn.Sequential(nn.Linear(embed, embed), nn.Identity(), nn.Linear(embed, embed))
        if self.settings.activation == "relu":
            layers[1] = nn.ReLU()
        else:
            for layer in (layers[0], layers[2]):
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)
        return layers

    @property
    def loss_is_mean(self) -> bool:
        """Not over pairs."""
        return self.settings.objective == "class"

    def zero_shot_state(self) -> dict[str, Tensor] | None:
        """Identities, if φ is one; to float rounding, since they are normalised twice."""
        if self.settings.activation == "relu":
            return None
        return {
            name: torch.eye(*t.shape) if t.dim() == 2 else torch.zeros(t.shape)
            for name, t in self.adapter_state().items()
        }

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x as in `classify` -> image features (B, E) and class features (K, E), both projected."""
        images = F.normalize(x.float(), dim=-1)
        texts = F.normalize(self.class_features().float(), dim=-1)
        return self.image_layers(images), self.text_layers(texts)

    def classify(self, x: Tensor) -> Tensor:
        """Image features x (B, E) -> logits (B, K)."""
        return self.clip.logits(*self.project(x))

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """x as in `classify`, labels (B,) -> scalar: cross-entropy over classes, or over pairs."""
        if self.settings.objective == "class":
            return super().loss(x, labels)
        images, texts = self.project(x)
        pairs = self.clip.logits(images, texts[labels])  # (B, B)
        return contrastive_loss(pairs, labels, self.settings.plain_pairs)
