"""Cross-modal adaptation: class names as extra training samples of a linear head.

Lin et al., "Multimodality Helps Unimodality: Cross-Modal Few-Shot Learning with Multimodal Models",
arXiv:2301.06267. CLIP puts images and texts into one space, so a classifier of images may learn
from texts as well. The classifier is a matrix H (K, E) without bias. It starts at the text
features, which is zero-shot CLIP:

    logits = s · norm(x)·Hᵀ             x an image's or a text's feature (E,);  H = norm(W) at first

and half of each batch are text features, each a sample of its own class:

    loss = CE over B images and B texts

The texts come in shuffled passes over the K classes, as the images do over the training images; the
rest of a pass that B does not divide is skipped. The paper counts both kinds: its batches of 32 or
8 are 16 or 4 images here.

As published, each training image also has its mirror image beside it (`--mirror`); learning rate,
weight decay and batch size are chosen on validation (`--grid`), and so is one of 128 checkpoints of
12,800 steps. What the `paper` recipe does differently: the checkpoints are after steps 100, 200 …
(published: 1, 101 …), a batch may be larger than the number of images or texts, and of several
templates for a class (the published ones on ImageNet) the mean is one text, not each of them.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import DEFAULT, Method, TrainingSettings
from methods.templates import TemplateSettings


@dataclass(frozen=True)
class CrossModalSettings(TrainingSettings, TemplateSettings):
    batch_size: Annotated[int, "images in a gradient step; as many texts are added"] = 32
    mirror: Annotated[bool, "also learn from each training image's mirror image"] = False


OWN = {"lr": 1e-3, "epochs": 50, "patience": 10}


class CrossModal(Method):
    title = "a linear head on images and class names as samples"
    Settings = CrossModalSettings
    settings: CrossModalSettings
    recipes = {
        "default": {**OWN, **DEFAULT, "min_steps": 9000},
        "paper": {
            "lr": 1e-3,
            "mirror": True,
            "epochs": 0,  # the length is set in steps
            "min_steps": 12_800,
            "drop_last": True,
            "schedule": "step",
            "warmup_steps": 50,
            "warmup": "proportional",
            "warmup_lr": 1e-5,
            "validations": 128,
            "patience": 0,
            "keep": "best",
            "grid": "lr=1e-3,1e-4 weight_decay=0,0.01,1e-4 batch_size=4,16",
        },
        "demo": OWN,
    }
    demo_model = {"lr": 1e-2}
    names_unseen = False

    def __init__(self, clip, classnames, template, settings: CrossModalSettings):
        super().__init__(clip, classnames, template, settings)
        self.head = nn.Parameter(self.zero_shot_state()["head"])  # (K, E)
        self.seed = torch.initial_seed()  # determines the order of the texts

    def zero_shot_state(self) -> dict[str, Tensor]:
        """norm(W)."""
        return {"head": F.normalize(self.class_features().float(), dim=-1)}

    def classify(self, x: Tensor) -> Tensor:
        """Features x (B, E), of images or of texts -> logits (B, K)."""
        x = F.normalize(x.float(), dim=-1)
        with self.float32():
            return self.clip.logit_scale.exp() * x @ self.head.T

    def matrix(self) -> dict[str, Tensor]:
        return {"weight": self.head, "logit_scale": self.clip.logit_scale.exp()}

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """x as in `classify`, labels (B,) -> scalar, over these images and as many texts."""
        texts = self.texts()[self.place :][: len(labels)].to(labels.device)  # (B,)
        samples = torch.cat([x, self.class_features()[texts]])  # (2B, E)
        labels = torch.cat([labels, texts])  # (2B,)
        return F.cross_entropy(self.classify(samples), labels, self.class_weights)

    def fit(self, train, val, descend) -> None:
        descend(self, train.mirrored() if self.settings.mirror else train, val)

    def texts(self) -> Tensor:
        """Indices of the class prompts (B,) in the batch of step `self.step`."""
        count, classes = self.settings.batch_size, len(self.classnames)
        epoch, batch = divmod(self.step, max(1, classes // count))
        own = 500_000  # so that texts are not in the order of the images (fewshot/loop.py)
        generator = torch.Generator().manual_seed((1_000_003 * self.seed + own + epoch) % 2**63)
        passes = math.ceil(count / classes)  # more than one, where a batch is larger than K
        order = [torch.randperm(classes, generator=generator) for _ in range(passes)]
        return torch.cat(order)[batch * count : (batch + 1) * count]
