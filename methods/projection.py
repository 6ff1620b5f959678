"""Projection heads: learned layers after each tower. The towers are frozen, or learn as well.

A baseline without a paper of its own. It changes CLIP's shared space by two square layers after
each tower (`--head square`),

    f' = U₂ φ(U₁ norm(f))      W' = V₂ φ(V₁ norm(W))      U, V (E, E), with biases

or by a layer of multi-head attention between each tower's last block and its projection
(`--head attention`), which lets the output token attend once more to all tokens x (T, D),

    x_r + O · attention(LN(x))_r        r: an image's class token, or a text's [end], which sees
                                        only the tokens before it;  O (D, D) starts at 0

The loss is cross-entropy over classes, or CLIP's contrastive loss. With φ the identity (the
default) the square layers start as identities, so that training starts at zero-shot CLIP; with
attention it does as well. With relu the layers start at random, and the few images must teach again
what pretraining knew about the space. With `--tower-lr` above 0 all weights of both towers learn as
well, at that rate.
"""

from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_min import UserError
from clip_min.model import Attention
from methods.base import DEFAULT, Method, TrainingSettings
from methods.contrastive import check_objective, contrastive_loss
from methods.finetune import train_weights, trained_names
from methods.templates import TemplateSettings


@dataclass(frozen=True)
class ProjectionSettings(TrainingSettings, TemplateSettings):
    head: Annotated[
        Literal["square", "attention"], "two square layers, or a layer of attention over the tokens"
    ] = "square"
    tower_lr: Annotated[float, "peak learning rate of both towers' weights; 0: frozen"] = 0.0
    objective: Annotated[
        Literal["class", "contrastive"], "cross-entropy over classes, or pairs"
    ] = "class"
    plain_pairs: Annotated[bool, "contrastive: count only an image's own caption as right"] = False
    activation: Annotated[Literal["none", "relu"], "φ, between the two layers"] = "none"
    limits = {**TrainingSettings.limits, "tower_lr": (0, inf)}

    def __post_init__(self):
        super().__post_init__()
        if self.tower_lr and not self.lr:
            raise UserError(f"--tower-lr {self.tower_lr}: needs --lr above 0, also in --grid")
        if self.head == "attention" and self.activation != "none":
            raise UserError(f"--activation {self.activation}: only works with --head square")
        check_objective(self)


OWN = {"optimizer": "sgd", "lr": 1e-3, "epochs": 50, "patience": 10}


class AttentionHead(nn.Module):
    """A layer of attention, appended to a tower's blocks and called like them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        nn.init.xavier_uniform_(self.attn.in_proj.weight)
        for zero in (self.attn.in_proj.bias, self.attn.out_proj.weight, self.attn.out_proj.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, mask: Tensor | None = None, read=None) -> Tensor:
        """x (B, T, D) -> (B, read, D), the tokens `read` (an index of T; None: all)."""
        return (x if read is None else x[:, read]) + self.attn(self.ln(x), mask, read)


class Projection(Method):
    title = "learned layers after each tower"
    Settings = ProjectionSettings
    settings: ProjectionSettings
    recipes = {
        "default": {**OWN, **DEFAULT, "min_steps": 9000},
        "attention": {**DEFAULT, "head": "attention", "lr": 1e-3},
        "towers": {**DEFAULT, "lr": 1e-3, "tower_lr": 1e-5},
        "demo": {**OWN, "lr": 1e-2},
    }
    demo_model = {"lr": 1e-2}

    def __init__(self, clip, classnames, template, settings: ProjectionSettings):
        super().__init__(clip, classnames, template, settings)
        c = clip.config
        self.loss_is_mean = settings.objective == "class"  # the loss over pairs is not
        if settings.tower_lr:
            train_weights(self.clip, [*trained_names(clip, "image"), *trained_names(clip, "text")])
            self.first_block, self.text_learns = 0, True
        if settings.head == "square":
            self.image_layers = self._layers().to(clip.device)
            self.text_layers = self._layers().to(clip.device)
            return
        if not settings.tower_lr:
            self.first_block, self.text_learns = c.vision_layers, True  # after the last block
        for transformer, width, heads in (
            (self.clip.visual.transformer, c.vision_width, c.vision_heads),
            (self.clip.transformer, c.text_width, c.text_heads),
        ):
            transformer.resblocks.append(AttentionHead(width, heads).to(clip.device))

    @property
    def lr_factors(self) -> dict[str, float]:  # type: ignore[override]  # --grid may change lr
        """CLIP's own weights learn at --tower-lr."""
        factor = self.settings.tower_lr / self.settings.lr if self.settings.tower_lr else 1.0
        own = {f"clip.{name}" for name, _ in self.lent[0].named_parameters()}
        return dict.fromkeys(own & self.adapter_state().keys(), factor)

    def _layers(self) -> nn.Sequential:
        embed = self.clip.config.embed_dim
        first, second = nn.Linear(embed, embed), nn.Linear(embed, embed)
        if self.settings.activation == "relu":
            return nn.Sequential(first, nn.ReLU(), second)
        for layer in (first, second):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(first, nn.Identity(), second)

    def zero_shot_state(self) -> dict[str, Tensor] | None:
        """CLIP's weights, and O = 0 or identities; None with relu. With identities, logits equal
        zero-shot CLIP's to float rounding, since features are normalised twice.
        """
        if self.settings.activation == "relu":
            return None
        start: dict[str, Tensor] = {}
        for name, tensor in self.adapter_state().items():
            if name in self.lr_factors:
                start[name] = self.lent[0].get_parameter(name.removeprefix("clip."))
            elif self.settings.head == "square" and tensor.dim() == 2:
                start[name] = torch.eye(*tensor.shape)
            elif self.settings.head == "square" or "out_proj" in name:
                start[name] = torch.zeros(tensor.shape)
        return start

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded images x (B, …) -> projected features of images (B, E) and classes (K, E)."""
        images, texts = self.image_features(x).float(), self.class_features().float()
        if self.settings.head == "attention":  # it is part of the towers
            return images, texts
        images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
        return self.image_layers(images), self.text_layers(texts)

    def classify(self, x: Tensor) -> Tensor:
        """Encoded images x (B, …) -> logits (B, K)."""
        return self.clip.logits(*self.project(x))

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """x as in `classify`, labels (B,) -> scalar: cross-entropy over classes or over pairs."""
        if self.settings.objective == "class":
            return super().loss(x, labels)
        images, texts = self.project(x)
        pairs = self.clip.logits(images, texts[labels])  # (B, B)
        return contrastive_loss(pairs, labels, self.settings.plain_pairs)
