"""GDA: a Gaussian over image features for each class, added to zero-shot CLIP without training.

Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", arXiv:2402.04087.
x_1 … x_n (n, E) are the features of the training images and f (E,) that of a test image, all on the
unit sphere. If all classes have the same covariance Σ around their means μ_k, Bayes' rule is linear
in f:

    Σ    = Σ_i (x_i - μ_of(i))(x_i - μ_of(i))ᵀ / (n - 1)         covariance within classes (E, E)
    P    = E · [(n - 1)·Σ + tr(Σ)·I]⁻¹                           its inverse, shrunk, as n is small
    w_k  = P·(μ_k - μ)        b_k = -½ (μ_kᵀPμ_k - μᵀPμ)          μ the mean of all μ_k

    logits = s · f·norm(W)ᵀ + α · (f·w_k + b_k)                  (K,)

f·w_k + b_k is the log of the ratio of two likelihoods of f: under class k, and under a Gaussian in
the middle of all classes. The paper has no μ, which adds the same value to all logits of an image.
We need it for classes without training images: they have no Gaussian and add 0, so that among novel
names GDA is zero-shot CLIP, to the bit. With `--novel neighbours` a new class gets a Gaussian as in
the paper: its mean is over the 64 training images nearest to its text feature and 16 copies of the
text feature; its P is computed from the 64 around the text feature, and averaged over new classes.

α is chosen on validation (the published code uses the test set for ImageNet). Other differences
from the published code: random crops show 8-100 % of an image, there 50-100 %; its base-to-novel
experiment inverts the mean of the classes' own Σ_k without tr(Σ), while the paper, and the code
elsewhere, use Σ as above. If no class has two images, each image is its class's mean, and Σ is the
covariance around μ.
"""

import contextlib
from dataclasses import dataclass
from math import ceil, inf
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import Augment
from methods.support import WithSupport
from methods.templates import TemplateSettings
from methods.tip_adapter import ROOM, SEARCHED

ALPHAS = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0]
NEAREST, COPIES = 64, 16  # for a new class: training images, and copies of its text feature


@dataclass(frozen=True)
class GDASettings(TemplateSettings):
    alpha: Annotated[float, "α, weight of the Gaussians; below 0: choose on validation"] = -1.0
    augment: Annotated[
        Augment, "none: features of CLIP's own crop; else of random views, as in other methods"
    ] = "none"
    views: Annotated[int, "random views of each image"] = 10
    novel: Annotated[
        Literal["zero-shot", "neighbours"],
        "classes without images: zero-shot CLIP, or a Gaussian of the images nearest to the name",
    ] = "zero-shot"
    limits = {"views": (1, inf)}


class GDA(WithSupport):
    title = "a Gaussian for each class beside its name (training-free)"
    Settings = GDASettings
    settings: GDASettings
    recipes = {"default": {}, "paper": {"augment": "crop-flip", "novel": "neighbours"}}
    _kept = None  # the result of `gaussians`, stored during `inference`

    def __init__(self, clip, classnames, template, settings):
        super().__init__(clip, classnames, template, settings)
        self.alpha = torch.tensor(max(settings.alpha, 0.0), device=clip.device)
        self.logits_apart = settings.novel == "zero-shot"  # else new classes share P

    def set_classes(self, classnames: list[str]) -> None:
        super().set_classes(classnames)
        self._kept = None

    @contextlib.contextmanager
    def inference(self):
        """As in the base class; the Gaussians are also computed only once."""
        with super().inference():
            self._kept = self.gaussians()
            try:
                yield
            finally:
                self._kept = None

    def classify(self, x: Tensor) -> Tensor:
        """Image features x (B, E) -> logits (B, K)."""
        return super().classify(x) + self.alpha * self.ratios(x)

    def ratios(self, x: Tensor) -> Tensor:
        """Image features x (B, E), normalised or not -> f·w_k + b_k (B, K)."""
        w, b = self._kept or self.gaussians()
        with self.float32():
            return F.normalize(x.float(), dim=-1) @ w.T + b

    @torch.no_grad()
    def gaussians(self) -> tuple[Tensor, Tensor]:
        """w (K, E) and b (K,), 0 where a class has no Gaussian."""
        of, asked = self._places()
        x = self.support.double()  # (n, E)
        places = len(self.learned_names) + 1  # the last stands for names without images
        count = x.new_zeros(places).index_add(0, of, x.new_ones(len(of)))
        means = x.new_zeros(places, x.shape[1]).index_add(0, of, x)
        means = means / count.clamp(min=1)[:, None]  # (learned + 1, E)
        middle = means.sum(dim=0) / (count > 0).sum().clamp(min=1)  # μ (E,)

        def line(means: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:  # (C, E) -> w, b
            w = (means - middle) @ precision
            return w, -(w * (means + middle)).sum(dim=1) / 2

        known = count[asked] > 0  # (K,)
        spread = torch.where(count.max() > 1, x - means[of], x - middle)
        w, b = line(means[asked], shrunk(spread))
        w, b = known[:, None] * w, known * b  # 0 where a class has no images
        if self.settings.novel == "neighbours" and len(x) and not known.all():
            text = F.normalize(self.class_features().double(), dim=-1)[~known]
            nearest = (text @ x.T).topk(min(NEAREST, len(x))).indices
            sums = torch.stack([x[some].sum(dim=0) for some in nearest])
            precision = x.new_zeros(x.shape[1], x.shape[1])  # (E, E)
            for some, t in zip(nearest, text, strict=True):
                precision += shrunk(x[some] - t)
            means = (sums + COPIES * text) / (nearest.shape[1] + COPIES)
            w[~known], b[~known] = line(means, precision / len(text))
        return w.float(), b.float()

    def fit(self, train, val, descend) -> None:
        self.remember(train, self.settings.views, self.settings.augment, apart=True)
        if self.settings.alpha < 0:
            self.search(val)

    @torch.no_grad()
    def search(self, val) -> None:
        """Set α to the best value on validation; of equally good ones, to the smallest."""
        every = ceil(len(val.labels) / SEARCHED)  # all would cost the square of the classes
        features, labels = val.encoded(self)[::every], val.labels[::every]
        right = dict.fromkeys(ALPHAS, 0)
        with self.inference():
            for part in torch.arange(len(labels)).split(max(1, ROOM // len(self.classnames))):
                x = features[part]
                zero_shot, ratios = super().classify(x), self.ratios(x)  # (V, K)
                for alpha in ALPHAS:
                    guesses = (zero_shot + alpha * ratios).argmax(dim=1)
                    right[alpha] += int((guesses == labels[part]).sum())
        best = max(ALPHAS, key=right.__getitem__)  # of equal values, max returns the first
        self.alpha.fill_(best)
        print(f"α {best:g}: {100 * right[best] / len(labels):.2f} % on validation")

    def adapter_state(self) -> dict[str, Tensor]:
        return {**super().adapter_state(), "alpha": self.alpha}


def shrunk(x: Tensor) -> Tensor:
    """Deviations from a mean, x (n, E) -> P (E, E), the shrunk inverse of their covariance."""
    scatter = x.T @ x  # (n - 1)·Σ
    trace = scatter.trace() / max(1, len(x) - 1)
    eye = torch.eye(len(scatter), dtype=x.dtype, device=x.device)
    return len(scatter) * torch.linalg.pinv(scatter + trace * eye, hermitian=True)
