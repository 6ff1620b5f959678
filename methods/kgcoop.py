"""KgCoOp: CoOp whose class features stay near those of hand-written prompts.

Yao et al., "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization",
arXiv:2303.13283. CoOp's vectors overfit the base classes, at the cost of novel ones. KgCoOp adds a
term to CoOp's loss that holds each class's text feature W_k near W°_k, the frozen text tower's
feature of the template:

    loss = CE + λ · (1 - mean_k cos(W_k, W°_k))              W, W° (K, E), λ = 8

The paper writes ‖W_k - W°_k‖², its code this cosine, which is half of that on the unit sphere. At
λ = 0 the method is CoOp. If the vectors start from the template's words, W starts at W°, and a
large λ keeps it there: zero-shot CLIP.

Recipe `paper` follows the authors' code, with float32 instead of float16. With fewer than 128
images (EuroSAT's base half has 80 at 16 shots), an epoch is a single step. An earlier version of
that code, which made the log in its issue 2, steps two schedulers of one optimizer, so that its
learning rate falls faster; the recipe follows the later one. On DTD their template is "a photo of a
{}, a type of texture." (`--template`).
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
    near: Annotated[float, "λ, weight of holding text features near the template's"] = 8.0
    limits = {**CoOpSettings.limits, "near": (0, inf)}


class KgCoOp(CoOp):
    title = "CoOp held near hand-written prompts"
    Settings = KgCoOpSettings
    settings: KgCoOpSettings
    recipes = {
        "default": {**OWN, **DEFAULT, "min_steps": 3000},
        "paper": {**PUBLISHED, "epochs": 100, "batch_size": 128},
        # With DePT's head (depth_head.py), as in the code of its authors.
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
    demo_model = {"lr": 0.1}

    def loss_of(self, f: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """Image features f (B, E), text features (K, E), labels (B,) -> scalar."""
        cosine = F.cosine_similarity(text.float(), self.written_features().float())  # (K,)
        moved = 1 - cosine.mean()
        return super().loss_of(f, text, labels) + self.settings.near * moved
