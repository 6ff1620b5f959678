"""CoCoOp: prompt vectors that depend on the image.

Zhou et al., "Conditional Prompt Learning for Vision-Language Models", arXiv:2203.05557. CoOp's
vectors v overfit the classes they were trained on. CoCoOp lets a small network π shift them by the
content of the image, which reduces overfitting:

    v_m(f)   = v_m + π(norm(f)),   m = 1 … M        π = Linear(E, E/16) - ReLU - Linear(E/16, D)
    logits_k = s · cos(f, text([start] v_1(f) … v_M(f) name_k . [end]))

Each image therefore has K prompts of its own. The published code encodes B·K prompts of 77 tokens
in a step on B images, and trains with B = 1. What we do differently: all prompts of an image form a
PromptTree, which computes no padding, and computes the context once instead of K times; B images
are a batch of B trees. The numbers are the same for a tenth of the work, at any batch size, and
evaluation is batched as well. Recipe `paper` uses float32 instead of float16.
"""

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import DEFAULT
from methods.coop import OWN, PUBLISHED, ContextSettings, LearnedContext


@dataclass(frozen=True)
class CoCoOpSettings(ContextSettings):
    max_tokens: Annotated[int, "prompt tokens to compute at once, over images and classes"] = 16384


class CoCoOp(LearnedContext):
    title = "prompt vectors that depend on the image"
    Settings = CoCoOpSettings
    settings: CoCoOpSettings
    recipes = {
        "default": {**OWN, **DEFAULT, "min_steps": 2400, "batch_size": 8},
        "notebook": {**OWN, "batch_size": 1, "patience": 4},
        "paper": {**PUBLISHED, "epochs": 10, "batch_size": 1},
        "demo": {**OWN, "batch_size": 16},
    }
    demo_model = {"lr": 6e-3}

    def __init__(self, clip, classnames, template, settings: CoCoOpSettings):
        super().__init__(clip, classnames, template, settings)
        width, embed = self.context.shape[1], clip.config.embed_dim  # D, E
        # A bottleneck of E/16 keeps π small: it has to be learned from a few images.
        self.meta_net = nn.Sequential(
            nn.Linear(embed, embed // 16), nn.ReLU(), nn.Linear(embed // 16, width)
        ).to(clip.device)

    def classify(self, f: Tensor) -> Tensor:
        """Image features f (B, E) -> logits (B, K)."""
        # All M vectors get the same shift: π sees the image, not the vector.
        shift = self.meta_net(F.normalize(f.float(), dim=-1))  # (B, D)
        context = self.context + shift.unsqueeze(1)  # (M, D) + (B, 1, D) -> (B, M, D)
        # One tree per image, computed as a batch of B trees; logits then take text b for image b.
        text = self.prompts(self.clip, context, self.settings.max_tokens)  # (B, K, E)
        return self.clip.logits(f, text)
