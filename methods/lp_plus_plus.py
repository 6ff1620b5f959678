"""LP++: a linear probe whose rows are a prototype from images plus a share of the class's name.

Huang et al., "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP", arXiv:2404.02285. With f
(E,) an image's feature and t_k (E,) a class's text feature, both on the unit sphere,

    logit_k = f·(w_k + α_k·t_k)                             w (K, E) prototypes, α (K,) blends

without a temperature: α_k has its place, and w = 0, α_k = s is zero-shot CLIP. Both learn by
cross-entropy on the features of all N training images at once. With y one-hot and p = softmax,

    ∂loss/∂w_k = Σ_i (p_ik - y_ik)·f_i / N                  ∂loss/∂α_k = t_k · ∂loss/∂w_k

No learning rate is searched, for how much the loss bends is known beforehand: in the logit of one
class by p(1 - p), at most 1/4. So a parabola that bends by 1/η lies above the loss and touches it
where we are, and a gradient step of length η leads to its lowest point (majorize, minimize):

    η_w = 4N / λmax(Σ_i f_i·f_iᵀ)                           η_α = 4N / max_k Σ_i (f_i·t_k)²

That is for one class alone. All rows of w learn at once, for which the loss bends up to twice as
much: then the step leads to where the parabola is as high as before, so the loss still cannot rise.
After every ten such steps on w comes one on α. Then validation is looked at: what is kept is the
best on it, of equally good ones the latest.

w starts at the mean feature of each class; α at one number for all classes, between 0 and s: that
of the lowest loss. It hardly moves from there. Since w alone could become any classifier, names act
through where descent begins and how soon it ends.

The paper's abstract and its authors' code were at hand, not its proofs: what bends how much was
derived here. That code takes the same η_w, but adds momentum of 0.9, under which the loss may rise;
a 16th of this η_α, along the sum of all gradients since the start; a bias for each class; one
random crop of each image. It validates after every step. Its w starts at the sum of a class's
features, its α at 250 times the mean cosine of an image and its name (`--start published`), made
for OpenAI's models: where all cosines are larger, names drown the images, and where they are
negative, names count backwards.
"""

from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import Method
from methods.templates import TemplateSettings

ROUND = 10  # steps on w before one on α
HALVINGS = 30  # of the interval in which the first α lies
ROOM = 2**24  # logits in memory at once: 64 MB


@dataclass(frozen=True)
class LPPlusPlusSettings(TemplateSettings):
    steps: Annotated[int, "gradient steps on w"] = 300
    start: Annotated[
        Literal["fitted", "published"],
        "α at first: of the lowest loss, or 250 times the mean cosine of an image and its name",
    ] = "fitted"
    limits = {"steps": (1, inf)}


class LPPlusPlus(Method):
    title = "a linear probe, each row blended with the class name (LP++)"
    Settings = LPPlusPlusSettings
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
        """α stands where others have a temperature."""
        return {"weight": self.rows(), "logit_scale": torch.ones(())}

    @torch.no_grad()
    def fit(self, train, val, descend) -> None:
        """Descend along w and α in turn; keep what is best on validation."""
        f, labels = F.normalize(train.encoded(self).float(), dim=-1), train.labels  # (N, E), (N,)
        self.begin(f, labels)
        eta_w, eta_alpha = step_sizes(f, self.names)
        best = (-1.0, 0)
        for step in range(1, self.settings.steps + 1):
            self.w -= eta_w * self.gradient(f, labels)
            if step % ROUND == 0:
                self.alpha -= eta_alpha * self.blend_gradient(f, labels)
            if step % ROUND == 0 or step == self.settings.steps:
                now = self.accuracy(val), step
                if now > best:  # of equally good ones the later step
                    best, kept = now, (self.w.clone(), self.alpha.clone())
        self.w.copy_(kept[0])
        self.alpha.copy_(kept[1])
        print(f"step {best[1]} of {self.settings.steps}: {100 * best[0]:.2f} % on validation")

    @torch.no_grad()
    def begin(self, f: Tensor, labels: Tensor) -> None:
        """f (N, E), labels (N,): set w and α to what they start from."""
        count = labels.bincount(minlength=len(self.w)).clamp(min=1)  # a class may have no image
        self.w.copy_(torch.zeros_like(self.w).index_add(0, labels, f) / count[:, None])
        if self.settings.start == "published":
            self.alpha.fill_(250 * (f * self.names[labels]).sum(dim=1).mean())
            return
        low, high = 0.0, self.clip.logit_scale.exp().item()
        for _ in range(HALVINGS):  # the loss is convex: its slope over α changes sign once
            self.alpha.fill_((low + high) / 2)
            if self.blend_gradient(f, labels).sum() > 0:
                high = (low + high) / 2
            else:
                low = (low + high) / 2

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
        """The share of validation images that are named right."""
        parts = zip(self.parts(val.encoded(self)), self.parts(val.labels), strict=True)
        right = sum((self.classify(x).argmax(dim=1) == labels).sum() for x, labels in parts)
        return right.item() / len(val.labels)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """As many images (N, …) at a time as there is room for their logits."""
        return x.split(max(1, ROOM // len(self.w)))


def step_sizes(f: Tensor, names: Tensor) -> tuple[float, float]:
    """f (N, E), names (K, E), all on the unit sphere -> η_w, η_α."""
    squares = torch.stack([(f @ t).square().sum() for t in names])  # Σ_i (f_i·t_k)² (K,)
    longest = torch.linalg.eigvalsh(f.T @ f)[-1]
    return (4 * len(f) / longest).item(), (4 * len(f) / squares.max()).item()
