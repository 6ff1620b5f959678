"""DePT: an extra linear head for the base classes, beside a prompt-learning method.

Zhang et al., "DePT: Decoupled Prompt Tuning", arXiv:2309.07439. During training, more and more of
the feature channels that image and text share become specific to the base classes, at the cost of
other classes. DePT gives this base-specific knowledge channels of its own. f (B, E) and W (K, E)
are the features of images and class names, not normalised, from the method it is combined with:

    sim = s · norm(f)·norm(W)ᵀ                               (B, K), as always
    lin = (γ_f·f + β_f)·Hᵀ + b                               (B, K); H (K, E), b (K,), all γ, β (E,)
    loss = 0.3 · CE(sim) + 0.7 · CE(lin)

CE(lin) is over as many texts as images: for each image also its class name, with γ_t·W + β_t in
place of γ_f·f + β_f. H starts at random, all γ at 1, all β at 0, and the head learns at 6.5 times
the learning rate. For the learned names the logits are 0.3 · sim + 0.7 · lin, for other names sim.

The paper does not mix learned and other names in one list, and these logits have no common scale.
We add a rule: sim decides how likely any of the learned names is, and the weighted sum decides
which of them. For a learned name k among the learned names L,

    logit_k = log Σ_{j in L} exp(sim_j) + log softmax_{L}(0.3 · sim + 0.7 · lin)_k

This adds the same value to all logits in L: among the learned names alone, the probabilities are as
published.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import BaseSettings, Method
from methods.learned_names import rows

SHARE = 0.7  # weight of lin in the loss and the logits
FASTER = 6.5  # the head's learning rate, as a multiple of --lr


@dataclass(frozen=True)
class DepthHeadSettings(BaseSettings):
    depth_head: Annotated[bool, "add DePT's head for the base classes (arXiv:2309.07439)"] = False


class ScaleAndShift(nn.Module):
    """γ·x + β for each channel: x (..., E) -> (..., E)."""

    def __init__(self, embed: int):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(embed)), nn.Parameter(torch.zeros(embed))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift


class WithDepthHead(Method):
    """A method with image and text features; `--depth-head` adds DePT's head."""

    def __init__(self, clip, classnames, template, settings):
        super().__init__(clip, classnames, template, settings)
        self.learned_names = list(classnames)
        self.head = nn.ModuleDict()  # empty without --depth-head
        self.logits_apart = not settings.depth_head
        if settings.depth_head:
            embed = clip.config.embed_dim
            for side in ("image", "text"):
                self.head[side] = ScaleAndShift(embed)
            self.head["linear"] = nn.Linear(embed, len(classnames))
            self.head.to(clip.device)
        self.lr_factors = {f"head.{name}": FASTER for name, _ in self.head.named_parameters()}

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image features x (B, E) -> f (B, E) and W (K, E), not normalised."""
        return self.image_features(x), self.class_features()

    def classify(self, x: Tensor) -> Tensor:
        """Image features x (B, E) -> logits (B, K)."""
        f, text = self.features(x)
        sim = self.clip.logits(f, text)
        row = rows(self.classnames, self.learned_names).to(sim.device)  # (K,)
        known = row >= 0
        if not self.head or not known.any():
            return sim
        sim = sim.float()  # of a CLIP in 16 bits; the head is float32
        both = (1 - SHARE) * sim[:, known] + SHARE * self.lin(f, "image")[:, row[known]]
        any_known = sim[:, known].logsumexp(dim=1, keepdim=True)  # (B, 1)
        return sim.masked_scatter(known, any_known + both.log_softmax(dim=1))

    def lin(self, x: Tensor, side: str) -> Tensor:
        """Features of images or texts x (B, E) -> the head's logits for learned names (B, K)."""
        with self.float32():
            return self.head["linear"](self.head[side](x.float()))

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Image features x (B, E), labels (B,) -> scalar."""
        return self.loss_of(*self.features(x), labels)

    def loss_of(self, f: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """The same, from the features f (B, E) and W (K, E)."""
        weights = self.class_weights
        loss = F.cross_entropy(self.clip.logits(f, text), labels, weights)
        if not self.head:
            return loss
        lin = torch.cat([self.lin(f, "image"), self.lin(text[labels], "text")])  # (2B, K)
        return (1 - SHARE) * loss + SHARE * F.cross_entropy(lin, labels.repeat(2), weights)
