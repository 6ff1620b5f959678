"""Tip-Adapter: the training images as a memory that votes beside the class names.

Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification",
arXiv:2207.09519. The features of the N training images are keys (N, E), on the unit sphere; their
labels, one-hot, are values (N, K). With f an image's feature on the unit sphere,

    logits = s · f·norm(W)ᵀ + α · exp(-β (1 - f·keysᵀ)) · values                  (K,)

so every key votes for its class, and nearer keys have more weight: β sets how sharply the weight
falls with distance, α the weight of the votes against zero-shot CLIP. `tip_adapter` trains nothing;
`tip_adapter_f` also trains the keys. α and β are chosen from a grid by accuracy on validation (the
published code searches on the test set for ImageNet, and chooses the epoch of the trained keys on
the test set of every data set).

Classes without training images get no votes: among novel names Tip-Adapter is zero-shot CLIP.

What else we do differently: random crops show 8-100 % of an image, those of the published code
50-100 %; that code trains the keys with constants for α and β that depend on the data set, in
float16, and on EuroSAT for 100 epochs (`--epochs 100`).
"""

from dataclasses import dataclass
from math import ceil, inf
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import DEFAULT, Augment, TrainingSettings
from methods.support import WithSupport
from methods.templates import TemplateSettings

ALPHAS = [0.0] + [2.0 ** (i / 2) for i in range(-6, 21)]  # 0, 1/8 … 1024
BETAS = [2.0 ** (i / 2) for i in range(-4, 15)]  # 1/4 … 128
# Validation images that α and β are chosen on, at most. Each is compared with every key, so with a
# fixed number for each class the cost would grow with the square of the classes.
SEARCHED = 5_000
ROOM = 2**24  # numbers in a matrix of the search: 64 MB


@dataclass(frozen=True)
class TipAdapterSettings(TemplateSettings):
    alpha: Annotated[float, "α, weight of the votes; below 0: choose on validation"] = -1.0
    beta: Annotated[float, "β, sharpness of the votes; below 0: choose on validation"] = -1.0
    augment: Annotated[
        Augment, "none: keys of CLIP's own crop; else of random views, as in other methods"
    ] = "none"
    views: Annotated[int, "random views of an image, whose mean is its key"] = 10
    limits = {"views": (1, inf)}


class TipAdapter(WithSupport):
    title = "training images as a memory that votes (training-free)"
    Settings = TipAdapterSettings
    settings: TipAdapterSettings
    recipes = {"default": {}, "paper": {"augment": "crop-flip"}}

    def __init__(self, clip, classnames, template, settings):
        super().__init__(clip, classnames, template, settings)
        self.alpha = torch.tensor(max(settings.alpha, 0.0), device=clip.device)
        self.beta = torch.tensor(max(settings.beta, 0.0), device=clip.device)

    @property
    def keys(self) -> Tensor:
        """Features of the training images (N, E), on the unit sphere."""
        return self.support

    def classify(self, x: Tensor) -> Tensor:
        """Image features x (B, E) -> logits (B, K)."""
        return super().classify(x) + self.alpha * self.cache_logits(x, self.beta)

    def cache_logits(self, features: Tensor, beta) -> Tensor:
        """exp(-β (1 - f·keysᵀ)) · values: (B, E) -> (B, K)."""
        with self.float32():
            return self.count_votes((-beta * self.distances(features)).exp()).T

    def distances(self, features: Tensor) -> Tensor:
        """1 - keys·fᵀ: (B, E) -> (N, B)."""
        return 1 - self.keys @ F.normalize(features.float(), dim=-1).T

    def fit(self, train, val, descend) -> None:
        self.remember(train, self.settings.views, self.settings.augment)
        self.search(val)

    @torch.no_grad()
    def search(self, val) -> None:
        """Set α and β to the best values on validation; of equally good ones, to the smallest."""
        every = ceil(len(val.labels) / SEARCHED)
        features, labels = val.encoded(self)[::every], val.labels[::every]
        alphas = ALPHAS if self.settings.alpha < 0 else [self.settings.alpha]
        betas = BETAS if self.settings.beta < 0 else [self.settings.beta]
        weights = torch.tensor(alphas, device=features.device)
        right = torch.zeros(len(betas), len(alphas), dtype=torch.int64, device=features.device)
        few = max(1, ROOM // max(len(self.keys), len(self.classnames)))
        for part in torch.arange(len(features), device=features.device).split(few):
            zero_shot = super().classify(features[part])  # (V, K), V images of validation
            distances = self.distances(features[part])  # (N, V)
            for row, beta in zip(right, betas, strict=True):
                votes = self.count_votes((-beta * distances).exp()).T  # (V, K)
                low, high = winning(zero_shot, votes, labels[part])
                row += ((low[:, None] < weights) & (weights < high[:, None])).sum(dim=0)
        share = (right.double() / len(features)).tolist()
        best = max(
            (share[b][a], -alpha, -beta)
            for b, beta in enumerate(betas)
            for a, alpha in enumerate(alphas)
        )
        self.alpha.fill_(-best[1])
        self.beta.fill_(-best[2])
        print(f"α {-best[1]:.4g}, β {-best[2]:.4g}: {100 * best[0]:.2f} % on validation")

    def adapter_state(self) -> dict[str, Tensor]:
        return {**super().adapter_state(), "alpha": self.alpha, "beta": self.beta}


def winning(zero_shot: Tensor, votes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """zero_shot, votes (V, K), labels (V,) -> the interval of α in which the right class wins: its
    lower and upper ends, (V,) each.

    A class's logit, zero_shot + α·votes, is a line over α. The right class is ahead of another
    class on one side of the point where their lines cross, so it wins in a single interval.
    Computing its ends tests all α at once.
    """
    lead, gain = (t.gather(1, labels[:, None]) - t for t in (zero_shot, votes))  # (V, K)
    lead.scatter_(1, labels[:, None], torch.inf)  # not against itself
    crossing = -lead / gain  # the lead is lead + α·gain
    low = crossing.where(gain > 0, -torch.inf).amax(dim=1)
    high = crossing.where(gain < 0, torch.inf).amin(dim=1)
    never = ((gain == 0) & (lead <= 0)).any(dim=1)
    return low.where(~never, torch.inf), high


@dataclass(frozen=True)
class TipAdapterFSettings(TrainingSettings, TipAdapterSettings):
    limits = {**TrainingSettings.limits, **TipAdapterSettings.limits}


OWN = {"lr": 1e-3, "eps": 1e-4, "epochs": 20, "batch_size": 256, "schedule": "step"}


class TipAdapterF(TipAdapter):
    title = "training images as a memory whose keys are trained"
    Settings = TipAdapterFSettings
    settings: TipAdapterFSettings
    recipes = {
        "default": {**OWN, **DEFAULT, "min_steps": 3000},
        "paper": {**OWN, "augment": "crop-flip", "patience": 0},
        "demo": OWN,
    }
    trains_support = True
    searches_last = True

    def fit(self, train, val, descend) -> None:
        """Start from Tip-Adapter's keys, α and β, train the keys, then choose α and β again."""
        super().fit(train, val, descend)
        if self.settings.alpha < 0 and self.alpha == 0:
            self.alpha.fill_(1.0)  # without votes, the keys would have no gradient
        descend(self, train, val)
        self.search(val)
