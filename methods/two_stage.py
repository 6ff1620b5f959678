"""2SFS: the LayerNorms of both towers learn, and then a classifier that starts at the class names.

Farina et al., "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages",
arXiv:2503.11609. What a few images of some classes teach comes in two phases: features that suit
the task, and so its other classes, too; and then what tells these very classes apart, which harms
the others. So the steps are divided:

    stage 1   of both towers the LayerNorms learn, y = γ·x̂ + β each, γ and β (D,), with
              logits = s · norm(f)·norm(W)ᵀ         f, W from the towers as they are now
    stage 2   the towers stay as they are, and a matrix Φ (K, E) learns, from norm(W) on:
              logits = s · norm(f)·norm(Φ)ᵀ

and each stage has a fresh optimizer and a cosine of its own. Then a class that was learned is named
by its row of Φ, any other by the text tower, W_k; among both, each class by its own. All rows count
by their direction alone, so they meet on one scale.

Before stage 2, Φ is all zeros: that is how a saved adapter tells which of the two it is of (where
validation chooses, it may prefer one of the first).

The authors' code means to train all LayerNorms, 65,536 numbers at ViT-B/16, but freezes `ln_pre`,
`ln_post` and `ln_final` again, so that those of the blocks learn, 61,440. `--layer-norms` has both;
recipe `paper` trains as their code does, with float32 for float16, and stage 2 goes on in the pass
over the images where stage 1 ends (theirs starts a new one). Its template is "a photo of a {}." on
every data set: to be given as `--template` where a data set has another one.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_min.weights import fingerprint
from methods.base import DEFAULT, Method, TrainingSettings
from methods.learned_names import rows
from methods.templates import TemplateSettings


@dataclass(frozen=True)
class TwoStageSettings(TrainingSettings, TemplateSettings):
    first_stage: Annotated[float, "share of the steps before the classifier learns"] = 0.6
    layer_norms: Annotated[
        Literal["all", "blocks"], "LayerNorms that learn: all, or all but those around the blocks"
    ] = "all"
    limits = {**TrainingSettings.limits, "first_stage": (0, 1)}


class TwoStage(Method):
    title = "LayerNorms of both towers, then a classifier from the class names (2SFS)"
    Settings = TwoStageSettings
    recipes = {
        "default": {**DEFAULT},
        "paper": {
            "layer_norms": "blocks",
            "steps_per_shot": 300,
            "schedule": "step",
            "min_lr": 1e-6,
            "augment": "crop-flip",
            "patience": 0,
            "keep": "last",
        },
        "demo": {"lr": 1e-2, "patience": 0},
    }
    demo_model = {"lr": 1e-2}
    text_learns = True

    def __init__(self, clip, classnames, template, settings: TwoStageSettings):
        super().__init__(clip, classnames, template, settings)
        self.learned_names = list(classnames)
        self.first_stage = settings.first_stage
        self.clip.float()
        for name, module in self.clip.named_modules():
            among = settings.layer_norms == "all" or ".resblocks." in name
            if isinstance(module, nn.LayerNorm) and among:
                for parameter in module.parameters():
                    parameter.data = parameter.data.clone()  # no longer the lent CLIP's
                    parameter.requires_grad_()
        shape = len(classnames), clip.config.embed_dim
        self.classifier = nn.Parameter(torch.zeros(shape, device=clip.device))  # Φ (K, E)

    @property
    def in_second(self) -> bool:
        """Does the classifier name what was learned?"""
        return bool(self.classifier.detach().any())

    @torch.no_grad()
    def second_stage(self) -> None:
        """Called by the loop between the stages: Φ starts at the class names."""
        self.classifier.copy_(F.normalize(super().text_features().float(), dim=-1))

    @property
    def first_block(self) -> int | None:  # type: ignore[override]  # nobody sets it
        """In stage 2 the image tower is frozen: unless images are augmented, once is enough."""
        return None if self.in_second else 0

    @property
    def encoder(self) -> tuple | None:
        """As always, but for the tower that encodes, which is not the lent CLIP's any more."""
        kind = super().encoder
        return kind and (fingerprint(self.clip.visual), *kind)

    def text_features(self) -> Tensor:
        """(K, E): in stage 2 Φ's row of each name that was learned, the text tower's of others."""
        if not self.in_second:
            return super().text_features()
        row = rows(self.classnames, self.learned_names).to(self.clip.device)  # (K,)
        learned = self.classifier[row]  # (K, E)
        if (row >= 0).all():
            return learned
        text = F.normalize(super().text_features().float(), dim=-1)
        return torch.where(row[:, None] >= 0, learned, text)

    def fit(self, train, val, descend) -> None:
        self.classifier.data.zero_()  # also where it starts from another run's adapter
        descend(self, train, val)
