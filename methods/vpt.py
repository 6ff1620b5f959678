"""VPT: learned tokens among the patches of an image.

Jia et al., "Visual Prompt Tuning", arXiv:2203.12119. N vectors p (N, D) are inserted into the image
tower's sequence, right after the class token; nothing else in the tower learns:

    shallow    [class, p_1 … p_N, patches] -> block 0 -> block 1 -> …
    deep       the same, but before each later block the N outputs at the prompts' places are
               replaced with N vectors of that block

The prompts are inserted after CLIP's `ln_pre`, which the paper's ViT, trained on labels, does not
have. Attention knows order only from positions, and prompts have none. Their place in the sequence
therefore does not matter, only the block before which they are inserted (`--first-block`).

There are two classifiers: CLIP's text features (`--head text`), which can name unseen classes, and
the paper's linear layer on the class token (`--head linear`), which starts at random and cannot.

The authors try 36 pairs of learning rate and weight decay (40 on VTAB) on the validation images of
each data set, and several N. Recipe `paper` uses one of these pairs, `paper-grid` tries all. Both
keep the last epoch, as the authors' code does; there, deep runs of 5, 10 or 100 tokens have dropout
0.1. What we do differently: images are resized with bicubic interpolation, as for CLIP, instead of
bilinear; validation and test images are CLIP's own crops, where theirs are resized to 256 pixels
and cut to 224, like those for training.
"""

from dataclasses import dataclass
from math import inf, sqrt
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from clip_min import UserError
from methods.base import DEFAULT, Method, TrainingSettings
from methods.templates import TemplateSettings


@dataclass(frozen=True)
class VPTSettings(TrainingSettings, TemplateSettings):
    n_tokens: Annotated[int, "N, learned tokens (in each block, with --deep)"] = 50
    deep: Annotated[bool, "learn tokens for each block"] = False
    first_block: Annotated[int, "insert the tokens before this block, from 0"] = 0
    dropout: Annotated[float, "dropout on the learned tokens"] = 0.1
    head: Annotated[
        Literal["text", "linear"], "classify by CLIP's text features, or a linear layer"
    ] = "text"
    limits = {
        **TrainingSettings.limits,
        "n_tokens": (0, inf),
        "first_block": (0, inf),
        "dropout": (0, 1),
    }


PAPER = {
    "head": "linear",
    "dropout": 0.0,
    "optimizer": "sgd",
    "lr": 0.5,
    "weight_decay": 1e-3,
    "epochs": 100,
    "warmup_epochs": 10,
    "warmup": "linear",
    "warmup_lr": 0.0,
    "batch_size": 128,
    "patience": 0,
    "keep": "last",
    "augment": "random-crop",
}
RATES = (50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1)  # at 256 images in one step
GRID = f"lr={','.join(str(rate * 128 / 256) for rate in RATES)} weight_decay=0.01,0.001,0.0001,0"
DEMO = {"lr": 1e-2, "n_tokens": 8, "dropout": 0.0}


class VPT(Method):
    title = "learned tokens among the image's patches (VPT)"
    Settings = VPTSettings
    settings: VPTSettings
    no_weight_decay = ("head.bias",)  # as published
    recipes = {
        "default": {"lr": 2e-3, **DEFAULT, "min_steps": 1200},
        "paper": PAPER,
        "paper-grid": {**PAPER, "grid": GRID},
        "mri": {"lr": 2e-3, "head": "linear", "n_tokens": 5},  # a study of brain scans, 4 classes
        "demo": DEMO,
    }
    demo_model = {"lr": 0.1, "dropout": 0.0}

    def __init__(self, clip, classnames, template, settings: VPTSettings):
        super().__init__(clip, classnames, template, settings)
        width, depth = clip.config.vision_width, clip.config.vision_layers
        if settings.first_block >= depth:
            raise UserError(
                f"--first-block {settings.first_block}: expected 0 to {depth - 1}, as this model's "
                f"image tower has {depth} blocks"
            )
        self.first_block = settings.first_block
        places = depth - settings.first_block if settings.deep else 1
        bound = sqrt(6 / (3 * clip.config.patch_size**2 + width))  # Xavier's, for a patch embedding
        prompts = torch.empty(places, settings.n_tokens, width).uniform_(-bound, bound)
        self.visual_prompts = nn.Parameter(prompts.to(clip.device))  # (places, N, D)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = None
        if settings.head == "linear":
            self.names_unseen = False
            self.head = nn.Linear(width, len(classnames))
            nn.init.kaiming_normal_(self.head.weight, mode="fan_out")  # variance 2/K, as published
            nn.init.zeros_(self.head.bias)  # published: another constant, which changes no softmax
            self.head.to(clip.device)

    def class_token(self, x: Tensor) -> Tensor:
        """Encoded images x (B, …) -> the class token after the last block (B, D)."""
        tower, n, first = self.clip.visual, self.settings.n_tokens, self.settings.first_block
        x = x if self.first_block else tower.begin(x, first)  # (B, T, D), block `first`'s input
        blocks = tower.transformer.resblocks
        for i, block in enumerate(blocks[first:], first):
            if (place := i - first) < len(self.visual_prompts):
                prompts = self.visual_prompts[place].expand(len(x), -1, -1)  # (B, N, D)
                prompts = self.dropout(prompts).to(x.dtype)  # a mask for each image
                patches = x[:, 1 + (n if place else 0) :]  # without the previous block's prompts
                x = torch.cat([x[:, :1], prompts, patches], dim=1)
            x = block(x, read=slice(0, 1) if i == len(blocks) - 1 else None)
        return tower.ln_post(x[:, 0])

    def classify(self, x: Tensor) -> Tensor:
        """Encoded images x (B, …) -> logits (B, K)."""
        x = self.class_token(x)  # (B, D)
        if self.head is not None:
            with self.float32():
                return self.head(x.float())
        return self.clip.logits(x @ self.clip.visual.proj, self.class_features())
