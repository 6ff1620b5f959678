"""DISEF: LoRA trained on real and synthetic images together.

da Costa et al., "Diversified in-domain synthesis with efficient fine-tuning for few-shot
classification", arXiv:2312.03046. A diffusion model paints variations of the few real images
(gen/), and LoRA on both towers (lora.py) learns from shuffled batches of both kinds,

    loss = λ · CE(real part of the batch) + (1 - λ) · CE(synthetic part)

Each term is a mean over its own images, and 0 if the batch has none. λ (0.8) is above 1/2 because a
real image is worth more: a painted one may show another class, or something no photo shows.
DISEF-F1 is a variant from a course notebook, not published. It makes images only of classes on
which zero-shot CLIP is weak (gen/plan.py), keeps those that a LoRA-tuned CLIP recognises, and gives
them less weight (λ 0.95).

The paper also mixes images (`--mixup`, `--cutmix`). Within the real and within the synthetic part
of a batch, each image is mixed with its counterpart in reversed order, and so are their labels:

    x' = m·x + (1 - m)·flip(x)      or, half the time, a box of x' is cut from flip(x): cutmix
    y' = m·y + (1 - m)·flip(y)      m ~ Beta(a, a), for cutmix corrected to the share of x in x'

The paper draws real and synthetic images separately (`--apart`): a batch has 64 of each, an epoch
is a pass over the larger set, and images of the smaller one repeat. Otherwise they are shuffled
together.

Both kinds go through the towers in one pass, as in DISEF's code and unlike in the notebook. What we
do differently: at λ = 1 the synthetic images, which have no weight, are left out, so that training
equals LoRA's on the real images, to the bit; test images are CLIP's own crops (theirs are resized
to 256 pixels and cut to 224). The paper chooses a learning rate between 2⁻¹⁵ and 2⁻¹⁰ for each data
set; recipe `paper` uses 2⁻¹², and `paper-grid` chooses on validation. Their code also chooses batch
size, RandAugment, mixing and λ, and its validation images are the test set. How their images are
made differs more: docs/generation.md.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import DEFAULT
from methods.lora import LoRA, LoRASettings


@dataclass(frozen=True)
class DISEFSettings(LoRASettings):
    lam: Annotated[float, "λ, weight of the real images; synthetic images have 1 - λ"] = 0.8
    label_smoothing: Annotated[float, "share of each label spread evenly over all classes"] = 0.0
    mixup: Annotated[float, "a of Beta(a, a), which mixes two images; 0: no mixup"] = 0.0
    cutmix: Annotated[float, "a of Beta(a, a), which sizes the box; 0: no cutmix"] = 0.0
    apart: Annotated[
        bool, "draw real and synthetic images separately, --batch-size of each in a step"
    ] = False
    synthetic: Annotated[str, "folder of synthetic images, made by generate.py"] = ""
    per_class: Annotated[int, "synthetic images to make for each class, if there are none yet"] = 32
    plan: Annotated[
        Literal["uniform", "f1", "deficit"], "the classes to make images of (see generate.py)"
    ] = "uniform"
    filter: Annotated[
        Literal["zero_shot", "lora"], "the filter: zero-shot CLIP, or a LoRA run with this seed"
    ] = "zero_shot"

    limits = {
        **LoRASettings.limits,
        "lam": (0, 1),
        "label_smoothing": (0, 1),
        "mixup": (0, math.inf),
        "cutmix": (0, math.inf),
        "per_class": (1, 2**31),
    }


NOTEBOOK = {**LoRA.recipes["notebook"], "epochs": 50}
IMPROVED = {**NOTEBOOK, "lam": 0.95, "lr": 2e-5, "plan": "f1", "filter": "lora"}
PAPER = {
    "epochs": 50,
    "lr": 2**-12,
    "weight_decay": 1e-3,
    "batch_size": 64,
    "apart": True,
    "drop_last": True,
    "label_smoothing": 0.1,
    "mixup": 0.1,
    "cutmix": 0.1,
    "schedule": "step",
    "min_lr": 1e-7,
    "patience": 0,
    "keep": "last",
    "per_class": 64,
    "augment": "randaugment-crop",
}
GRID = f"lr={','.join(str(2.0**power) for power in range(-15, -9))}"
DEMO = {**LoRA.recipes["demo"], "lr": 4e-3, "epochs": 10}


class DISEF(LoRA):
    title = "LoRA on real and synthetic images together"
    Settings = DISEFSettings
    settings: DISEFSettings
    recipes = {
        "default": DEFAULT,
        "notebook": NOTEBOOK,
        "improved": IMPROVED,
        "paper": PAPER,
        "paper-grid": {**PAPER, "grid": GRID},
        "demo": DEMO,
    }

    def __init__(self, clip, classnames, template, settings: DISEFSettings):
        super().__init__(clip, classnames, template, settings)
        if settings.mixup or settings.cutmix:
            self.first_block = 0  # mixing needs images, so none is encoded beforehand

    def loss(self, x: Tensor, labels: Tensor, synthetic: Tensor | None = None) -> Tensor:
        """x (B, …) encoded, labels (B,), synthetic (B,) bool: True for those images -> scalar.

        Without `synthetic` all images are real, and the loss is LoRA's.
        """
        s = self.settings
        cross_entropy = functools.partial(
            F.cross_entropy, weight=self.class_weights, label_smoothing=s.label_smoothing
        )
        if s.mixup or s.cutmix:
            real = torch.ones_like(labels, dtype=torch.bool) if synthetic is None else ~synthetic
            x, labels = x.clone(), F.one_hot(labels, len(self.classnames)).float()
            for part in (real, ~real):
                x[part], labels[part] = mix(x[part], labels[part], s.mixup, s.cutmix)
        if synthetic is None:
            return cross_entropy(self.classify(x), labels)
        # Both kinds go through the towers together; only then is the loss split.
        each = cross_entropy(self.classify(x), labels, reduction="none")  # (B,)
        if (weights := self.class_weights) is not None:  # of a weighted mean for each kind
            weights = labels @ weights if labels.ndim > 1 else weights[labels]  # (B,)
            scale = torch.ones_like(weights)
            for part in (~synthetic, synthetic):
                scale[part] /= weights[part].mean()
            each = each * scale
        _, whole = self.whole or (labels, synthetic)  # of the whole batch, over all processes
        return s.lam * _mean(each, ~synthetic, ~whole) + (1 - s.lam) * _mean(each, synthetic, whole)

    def fit(self, train, val, descend: Callable) -> None:
        """The gradient loop; at λ = 1 only on the real images."""
        if self.settings.lam == 1:  # synthetic images would cost time and have no effect
            train = train.real()
        elif self.settings.apart:
            train.draw_apart()
        descend(self, train, val)


class DISEF_F1(DISEF):
    title = "DISEF with images only of classes that are hard"
    recipes = {
        "default": {**IMPROVED, **DEFAULT},
        "improved": IMPROVED,
        "demo": {**DEMO, "lam": 0.95, "plan": "f1", "filter": "lora"},
    }


def mix(images: Tensor, labels: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """images (B, 3, n, n) and labels (B, K) -> the same, mixed with the reversed batch.

    Uses mixup or cutmix, whichever is set; if both are, one of them at random for the batch.
    """
    cut = bool(torch.rand(()) < 0.5) if mixup and cutmix else cutmix > 0
    a = torch.tensor(cutmix if cut else mixup)
    m = torch.distributions.Beta(a, a).sample().item()
    if cut:
        size = images.shape[-1]  # n
        side = int(size * math.sqrt(1 - m))  # so that the box has the share 1 - m of the area
        rows, columns = (  # of the box, clipped to the image
            slice(max(middle - side // 2, 0), min(middle + (side + 1) // 2, size))
            for middle in torch.randint(size, (2,)).tolist()
        )
        # The box may be smaller now, and m must be the share of x that is left.
        m = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / size**2
        images, reverse = images.clone(), images.flip(0)
        images[..., rows, columns] = reverse[..., rows, columns]
    else:
        images = m * images + (1 - m) * images.flip(0)
    return images, m * labels + (1 - m) * labels.flip(0)


def _mean(each: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    """Mean of the values (B,) where `part` (B,) is true; 0 if it is nowhere.

    whole: `part` for the whole batch, which processes may share. Weighted by their number of
    images, the processes' results average to the mean over the whole batch.
    """
    return each.where(part, 0).sum() / (whole.sum().clamp(min=1) * (len(part) / len(whole)))
