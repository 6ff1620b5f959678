"""KgCoOp: learned vectors that keep the class names near where hand-written prompts put them.

Yao et al., "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization",
arXiv:2303.13283. CoOp's vectors fit the classes they learn from, and novel ones pay for it. KgCoOp
is CoOp whose loss also asks each class's text feature W_k to stay near W°_k, that of the template,
from the frozen text tower:

    loss = CE + λ · (1 - mean_k cos(W_k, W°_k))              W, W° (K, E), λ = 8

At λ = 0 it is CoOp. From the words of the template itself, W starts at W° and a large λ leaves it
there: zero-shot CLIP.

Recipe `paper` is as in the authors' code, but for float32 instead of float16. Of fewer than 128
images (EuroSAT's base half at 16 shots is 80), an epoch is a single step.
"""

from dataclasses import dataclass
from math import inf
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from methods.base import DEFAULT
from methods.coop import OWN, PUBLISHED, CoOp, CoOpSettings
from methods.templates import PromptSettings


@dataclass(frozen=True)
class KgCoOpSettings(CoOpSettings, PromptSettings):
    near: Annotated[float, "λ, how strongly text features are held near the template's"] = 8.0
    limits = {**CoOpSettings.limits, "near": (0, inf)}


class KgCoOp(CoOp):
    title = "CoOp held near hand-written prompts"
    Settings = KgCoOpSettings
    settings: KgCoOpSettings
    recipes = {
        "default": {**OWN, **DEFAULT, "min_steps": 3000},
        "paper": {**PUBLISHED, "epochs": 100, "batch_size": 128},
        # With DePT's head (depth_head.py), as in its authors' code.
        "dept": {
            **PUBLISHED,
            "depth_head": True,
            "near": 2.0,
            "lr": 3.5e-3,
            "batch_size": 4,
            "epochs": 10,
        },
        "demo": {**OWN, "epochs": 30, "patience": 5},
    }
    demo_model = {"lr": 1e-2}

    def loss_of(self, f: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """Image features f (B, E), text features (K, E), labels (B,) -> scalar."""
        cosine = F.cosine_similarity(text.float(), self.written_features().float())  # (K,)
        moved = 1 - cosine.mean()
        return super().loss_of(f, text, labels) + self.settings.near * moved
