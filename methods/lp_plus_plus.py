"""LP++: a linear probe whose rows are a prototype from images plus a multiple of the text feature.

Huang et al., "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP", arXiv:2404.02285. With f
(E,) an image's feature and t_k (E,) a class's text feature, both on the unit sphere,

    logit_k = f·(w_k + α_k·t_k)                             w (K, E) prototypes, α (K,) blends

There is no temperature: α_k has its role, and w = 0, α_k = s is zero-shot CLIP. Both learn by
cross-entropy on the features of all N training images at once. With y one-hot and p = softmax,

    ∂loss/∂w_k = Σ_i (p_ik - y_ik)·f_i / N                  ∂loss/∂α_k = t_k · ∂loss/∂w_k

No learning rate has to be searched, since the curvature of the loss is bounded: in the logit of one
class it is p(1 - p), at most 1/4. A parabola with curvature 1/η therefore lies above the loss and
touches it at the current point, and a gradient step of length η leads to its minimum
(majorise-minimise):

    η_w = 4N / λmax(Σ_i f_i·f_iᵀ)                           η_α = 4N / max_k Σ_i (f_i·t_k)²

This bound is for one class. All rows of w learn at once, for which the curvature is up to twice as
large. A step then leads to a point where the parabola is as high as before, so the loss still
cannot rise. After every ten steps on w there is one on α, and then a validation. The result is the
best checkpoint on validation; of equally good ones, the latest.

w starts at the mean feature of each class, α at the same number for all classes, between 0 and s:
the one with the lowest loss. It hardly moves from there. Since w alone could become any classifier,
the names matter only through the start and the small number of steps.

The paper's abstract and the authors' code were available, but not its proofs: the bounds were
derived here. The published code uses the same η_w, but adds momentum of 0.9, with which the loss
may rise; a 16th of this η_α, along the sum of all gradients since the start; a bias for each class;
and one random crop of each image. It validates after every step. Its w starts at the sum of a
class's features, its α at 250 times the mean cosine of an image and its name (`--start published`),
which suits OpenAI's models. If all cosines are larger, the names outweigh the images; if they are
negative, names count against their class.
"""

from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import Method
from methods.templates import TemplateSettings

ROUND = 10  # steps on w before a step on α
HALVINGS = 30  # of the interval that contains the first α
ROOM = 2**24  # logits in memory at once: 64 MB


@dataclass(frozen=True)
class LPPlusPlusSettings(TemplateSettings):
    steps: Annotated[int, "gradient steps on w"] = 300
    start: Annotated[
        Literal["fitted", "published"],
        "start of α: lowest loss, or 250 times the mean cosine of an image and its name",
    ] = "fitted"
    limits = {"steps": (1, inf)}


class LPPlusPlus(Method):
    title = "a linear probe, each row blended with the class name (LP++)"
    Settings = LPPlusPlusSettings
    settings: LPPlusPlusSettings
    names_unseen = False
    starts_over = True

    def __init__(self, clip, classnames, template, settings: LPPlusPlusSettings):
        super().__init__(clip, classnames, template, settings)
        shape = len(classnames), clip.config.embed_dim
        self.w = nn.Parameter(torch.zeros(shape, device=clip.device))  # (K, E)
        scale = clip.logit_scale.detach().float().exp()
        self.alpha = nn.Parameter(scale.expand(len(classnames)).clone())  # (K,)

    @property
    def names(self) -> Tensor:
        """t (K, E)."""
        return F.normalize(self.class_features().float(), dim=-1)

    def rows(self) -> Tensor:
        """w_k + α_k·t_k (K, E)."""
        return self.w + self.alpha[:, None] * self.names

    def classify(self, x: Tensor) -> Tensor:
        """Image features x (B, E) -> logits (B, K)."""
        with self.float32():
            return F.normalize(x.float(), dim=-1) @ self.rows().T

    def matrix(self) -> dict[str, Tensor]:
        """Without a scale, since α has the role of a temperature."""
        return {"weight": self.rows(), "logit_scale": torch.ones(())}

    @torch.no_grad()
    def fit(self, train, val, descend) -> None:
        """Alternate steps on w and α; keep the best checkpoint on validation."""
        f, labels = F.normalize(train.encoded(self).float(), dim=-1), train.labels  # (N, E), (N,)
        self.begin(f, labels)
        eta_w, eta_alpha = step_sizes(f, self.names)
        best = (-1.0, 0)
        for step in range(1, self.settings.steps + 1):
            self.w.sub_(eta_w * self.gradient(f, labels))
            if step % ROUND == 0:
                self.alpha.sub_(eta_alpha * self.blend_gradient(f, labels))
            if step % ROUND == 0 or step == self.settings.steps:
                now = self.accuracy(val), step
                if now > best:  # of equally good ones the later step
                    best, kept = now, (self.w.clone(), self.alpha.clone())
        self.w.copy_(kept[0])
        self.alpha.copy_(kept[1])
        print(f"step {best[1]} of {self.settings.steps}: {100 * best[0]:.2f} % on validation")

    @torch.no_grad()
    def begin(self, f: Tensor, labels: Tensor) -> None:
        """f (N, E), labels (N,): set the start of w and α."""
        count = labels.bincount(minlength=len(self.w)).clamp(min=1)  # a class may have no image
        self.w.copy_(torch.zeros_like(self.w).index_add(0, labels, f) / count[:, None])
        if self.settings.start == "published":
            self.alpha.fill_(250 * (f * self.names[labels]).sum(dim=1).mean())
            return
        low, high = 0.0, self.clip.logit_scale.exp().item()
        for _ in range(HALVINGS):  # the loss is convex: its slope over α changes sign once
            middle = (low + high) / 2
            self.alpha.fill_(middle)
            rises = self.blend_gradient(f, labels).sum() > 0
            low, high = (low, middle) if rises else (middle, high)

    @torch.no_grad()
    def gradient(self, f: Tensor, labels: Tensor) -> Tensor:
        """f (N, E), labels (N,) -> ∂loss/∂w (K, E)."""
        total = torch.zeros_like(self.w)
        for some, right in zip(self.parts(f), self.parts(labels), strict=True):
            miss = self.classify(some).softmax(dim=-1)  # p (n, K)
            miss -= F.one_hot(right, len(self.w))  # p - y
            total += miss.T @ some
        return total / len(f)

    def blend_gradient(self, f: Tensor, labels: Tensor) -> Tensor:
        """f (N, E), labels (N,) -> ∂loss/∂α (K,)."""
        return (self.names * self.gradient(f, labels)).sum(dim=1)

    def accuracy(self, val) -> float:
        """The accuracy on validation images, from 0 to 1."""
        parts = zip(self.parts(val.encoded(self)), self.parts(val.labels), strict=True)
        right = [(self.classify(x).argmax(dim=1) == labels).sum() for x, labels in parts]
        return torch.stack(right).sum().item() / len(val.labels)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split images (N, …) into parts whose logits fit into `ROOM`."""
        return x.split(max(1, ROOM // len(self.w)))


def step_sizes(f: Tensor, names: Tensor) -> tuple[float, float]:
    """f (N, E), names (K, E), all on the unit sphere -> η_w, η_α."""
    squares = torch.stack([(f @ t).square().sum() for t in names])  # Σ_i (f_i·t_k)² (K,)
    longest = torch.linalg.eigvalsh(f.T @ f)[-1]
    return (4 * len(f) / longest).item(), (4 * len(f) / squares.max()).item()
