"""DISEF: LoRA trained on real and synthetic images together.

da Costa et al., "Diversified in-domain synthesis with efficient fine-tuning for few-shot
classification", arXiv:2312.03046. A few real images of a class are joined by images painted from
them (gen/), and LoRA on both towers (lora.py) learns from mixed, shuffled batches,

    loss = λ · CE(real part of the batch) + (1 - λ) · CE(synthetic part)

each a mean over its own images, 0 for a part that is empty. λ (0.8) is above 1/2 because a real
image is worth more: a painted one may show another class, or what no photo shows. DISEF-F1, a
variant of a course notebook's and not published, makes images only of the classes that zero-shot
CLIP is weak in (gen/plan.py), keeps those that a LoRA-tuned CLIP recognises, and trusts them less
(λ 0.95).

What we do differently: real and synthetic images go through the towers in one pass, not in one for
each; at λ = 1 the synthetic ones, which weigh nothing, are left out, so that training is LoRA's on
the real images, to the bit. The paper's mixup and cutmix are left out.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor

from methods.base import DEFAULT
from methods.lora import LoRA, LoRASettings


@dataclass(frozen=True)
class DISEFSettings(LoRASettings):
    epochs: Annotated[int, "passes over the training images, at most"] = 50
    lam: Annotated[float, "λ, the weight of the real images; the synthetic ones weigh 1 - λ"] = 0.8
    label_smoothing: Annotated[float, "share of a label given to all classes alike"] = 0.0
    synthetic: Annotated[str, "folder of synthetic images that generate.py made"] = ""
    per_class: Annotated[int, "synthetic images to make of a class, where there are none yet"] = 32
    plan: Annotated[
        Literal["uniform", "f1", "deficit"], "of which classes these are made (see generate.py)"
    ] = "uniform"
    filter: Annotated[
        Literal["zero_shot", "lora"], "what keeps these: CLIP as it is, or a LoRA run of this seed"
    ] = "zero_shot"

    limits = {
        **LoRASettings.limits,
        "lam": (0, 1),
        "label_smoothing": (0, 1),
        "per_class": (1, 2**31),
    }


IMPROVED = {"lam": 0.95, "lr": 2e-5, "plan": "f1", "filter": "lora"}
DEMO = {**LoRA.recipes["demo"], "lr": 4e-3, "epochs": 10}


class DISEF(LoRA):
    title = "LoRA on real and synthetic images together"
    Settings = DISEFSettings
    recipes = {
        "default": DEFAULT,
        "notebook": {},
        "improved": IMPROVED,
        "paper": {  # lr: one of its grid, 2^-15 … 2^-10, from which it chooses by data set
            "lr": 2**-12,
            "weight_decay": 1e-3,
            "batch_size": 64,
            "label_smoothing": 0.1,
            "per_class": 64,
            "augment": "randaugment",
        },
        "demo": DEMO,
    }

    def loss(self, images: Tensor, labels: Tensor, synthetic: Tensor | None = None) -> Tensor:
        """images (B, 3, n, n), labels (B,), synthetic (B,) bool: which of them -> scalar.

        Without `synthetic` all images are real ones, and alone: the loss is LoRA's.
        """
        lam, smoothing = self.settings.lam, self.settings.label_smoothing
        cross_entropy = functools.partial(F.cross_entropy, label_smoothing=smoothing)
        if synthetic is None:
            return cross_entropy(self(images), labels)
        each = cross_entropy(self(images), labels, reduction="none")  # (B,)
        return lam * _mean(each, ~synthetic) + (1 - lam) * _mean(each, synthetic)

    def fit(self, train, val, descend: Callable) -> None:
        """The gradient loop; at λ = 1 on the real images alone."""
        descend(self, train.real() if self.settings.lam == 1 else train, val)


class DISEF_F1(DISEF):
    title = "the same, images made only of classes that are hard"
    recipes = {
        "default": {**IMPROVED, **DEFAULT},
        "improved": IMPROVED,
        "demo": {**DEMO, "lam": 0.95, "plan": "f1", "filter": "lora"},
    }


def _mean(each: Tensor, part: Tensor) -> Tensor:
    """Mean of the values (B,) where `part` (B,) is true; 0 if that is nowhere."""
    return each.where(part, 0).sum() / part.sum().clamp(min=1)
