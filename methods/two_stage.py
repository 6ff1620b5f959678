"""2SFS: train the LayerNorms of both towers, then a classifier that starts at the class names.

Farina et al., "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages",
arXiv:2503.11609. Training on a few images has two phases. First, features adapt to the task, which
helps new classes as well; later, they specialise in the base classes, which harms new ones. So the
method divides the steps:

    stage 1   the LayerNorms of both towers learn, y = γ·x̂ + β each, γ and β (D,), with
              logits = s · norm(f)·norm(W)ᵀ         f, W from the current towers
    stage 2   the towers are frozen, and a matrix Φ (K, E) learns, starting at norm(W):
              logits = s · norm(f)·norm(Φ)ᵀ

Each stage has a fresh optimizer and its own cosine schedule. Afterwards a learned class has its row
of Φ as its text feature, and any other class has W_k from the text tower. Both are normalised, so
they have the same scale in a common list.

In stage 1, Φ is all zeros. A saved adapter shows by this which stage it is from (validation may
choose a checkpoint of stage 1).

The authors' code means to train all LayerNorms, 65,536 numbers at ViT-B/16, but freezes `ln_pre`,
`ln_post` and `ln_final` again, so that only those of the blocks learn, 61,440. `--layer-norms`
offers both. Recipe `paper` trains as their code does, with float32 instead of float16; stage 2
continues the pass over the images in which stage 1 ends (theirs starts a new pass). Their template
is "a photo of a {}." on every data set: give it as `--template` if a data set has another default.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_min.weights import fingerprint
from methods.base import DEFAULT, Method, TrainingSettings
from methods.finetune import train_weights
from methods.learned_names import rows
from methods.templates import TemplateSettings


@dataclass(frozen=True)
class TwoStageSettings(TrainingSettings, TemplateSettings):
    first_stage: Annotated[float, "share of the steps before the classifier learns"] = 0.6
    layer_norms: Annotated[
        Literal["all", "blocks"], "LayerNorms that learn: all, or only those within the blocks"
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
        among = ".resblocks." if settings.layer_norms == "blocks" else ""
        names = [name for name, _ in self.clip.named_parameters() if "ln_" in name]
        train_weights(self.clip, [name for name in names if among in name])
        shape = len(classnames), clip.config.embed_dim
        self.classifier = nn.Parameter(torch.zeros(shape, device=clip.device))  # Φ (K, E)

    @property
    def in_second(self) -> bool:
        """Whether stage 2 has begun, so that Φ classifies the learned classes."""
        return bool(self.classifier.detach().any())

    @torch.no_grad()
    def second_stage(self) -> None:
        """Called by the loop between the stages: start Φ at the class names."""
        self.classifier.copy_(F.normalize(super().text_features().float(), dim=-1))

    @property
    def first_block(self) -> int | None:  # type: ignore[override]  # never set
        """In stage 2 the image tower is frozen, and images are encoded once, unless augmented."""
        return None if self.in_second else 0

    @property
    def encoder(self) -> tuple | None:
        """As in the base class, with the fingerprint of the tower that has learned."""
        kind = super().encoder
        return kind and (fingerprint(self.clip.visual), *kind)

    def text_features(self) -> Tensor:
        """(K, E): in stage 2, rows of Φ for learned names, the text tower's features for others."""
        if not self.in_second:
            return super().text_features()
        row = rows(self.classnames, self.learned_names).to(self.clip.device)  # (K,)
        learned = self.classifier[row]  # (K, E)
        if (row >= 0).all():
            return learned
        text = F.normalize(super().text_features().float(), dim=-1)
        return torch.where(row[:, None] >= 0, learned, text)

    def fit(self, train, val, descend) -> None:
        self.classifier.data.zero_()  # also if it starts from another run's adapter
        descend(self, train, val)
