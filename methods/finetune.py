"""Full fine-tuning: all of CLIP's weights, or a chosen part of them.

The most flexible method and, with few images, the easiest to overfit. All weights of both towers
learn, with a small learning rate, in float32 and with clipped gradients. The loss is

    class        CE over s · norm(f)·norm(W)ᵀ, (B, K): B images by the prompts of all K classes, or
    contrastive  CE over rows and columns of s · norm(f)·norm(W[labels])ᵀ, (B, B): B images by the
                 B prompts of their classes, as in pretraining (contrastive.py); proposed by Goyal
                 et al., "Finetune Like You Pretrain", arXiv:2212.00638, whose code counts only an
                 image's own prompt as right (`--plain-pairs`)

`--train` chooses the weights that learn: both towers, one of them, or the last N blocks of each and
the layers after them. The saved adapter holds all of these weights.

`--recipe skip-tuning` follows Wu et al., "Skip Tuning: Pre-trained Vision-Language Models are
Effective and Efficient Adapters Themselves", arXiv:2412.11509, for base to novel. The last six
blocks of both towers learn. Each step's loss is over half of the classes, at most 50: those of its
images and the most similar ones by max_b cos(f_b, W°_k), where W° are the text features of frozen
CLIP. The text tower learns at 2e-5, the image tower at a quarter of that, as in the authors' code.
Differences from that code: every step computes the first six blocks (theirs stores the image
tower's outputs of them for an epoch); a batch has images of any classes (theirs, from 4 shots on,
of a single class); their code also adds some of the less similar classes, the more similar the
likelier; float32 instead of float16; and their hand-written template of each data set must be given
(Flowers102: `--template "a close-up photo of a {}."`), and `--epochs 5` on ImageNet, SUN397 and
Food101. With all classes they train at `--lr 1e-5 --image-lr-factor 1 --epochs 40 --warmup-epochs
0`, for tests on other data sets at `--lr 1e-5 --image-lr-factor 0.1 --warmup-lr 1e-8`.
"""

import math
from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import UserError
from methods.base import DEFAULT, Method, TrainingSettings
from methods.contrastive import check_objective, contrastive_loss
from methods.coop import PUBLISHED
from methods.templates import PromptSettings

MOST = 50  # classes in a step's loss, with --class-share below 1


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings, PromptSettings):
    train: Annotated[str, "weights that learn: both, image, text, or last-N (blocks)"] = "both"
    objective: Annotated[
        Literal["class", "contrastive"], "cross-entropy over classes, or pairs"
    ] = "class"
    plain_pairs: Annotated[bool, "contrastive: count only an image's own caption as right"] = False
    class_share: Annotated[
        float,
        "below 1: compute a step's loss over this share of the classes, at most 50: those of its "
        "images and the most similar ones",
    ] = 1.0
    image_lr_factor: Annotated[float, "image tower's learning rate, as a multiple of --lr"] = 1.0
    limits = {**TrainingSettings.limits, "class_share": (0, 1), "image_lr_factor": (0, inf)}

    def __post_init__(self):
        super().__post_init__()
        check_objective(self)
        if self.class_share < 1 and self.objective != "class":
            raise UserError(
                f"--class-share {self.class_share}: only works with --objective class; leave it "
                "out, or give that"
            )


OWN = {"lr": 1e-5, "clip_norm": 5.0}


class Finetune(Method):
    title = "all of CLIP's weights, or the last blocks'"
    Settings = FinetuneSettings
    settings: FinetuneSettings
    recipes = {
        "default": {**OWN, **DEFAULT},
        "contrastive": {**OWN, **DEFAULT, "objective": "contrastive"},
        "skip-tuning": {
            **PUBLISHED,
            "train": "last-6",
            "class_share": 0.5,
            "lr": 2e-5,
            "image_lr_factor": 0.25,
            "warmup_lr": 1e-6,
            "batch_size": 4,
            "epochs": 20,
        },
        "demo": {**OWN, "lr": 3e-4},
    }
    demo_model = {"lr": 3e-4}

    def __init__(self, clip, classnames, template, settings: FinetuneSettings):
        super().__init__(clip, classnames, template, settings)
        train_weights(self.clip, trained_names(clip, settings.train))
        self.text_learns = settings.train != "image"
        if settings.train in ("both", "image"):
            self.first_block = 0
        elif settings.train != "text":
            self.first_block = clip.config.vision_layers - int(settings.train.split("-")[1])
        image = [name for name in self.adapter_state() if name.startswith("clip.visual.")]
        self.lr_factors = dict.fromkeys(image, settings.image_lr_factor)
        # A mean over images, unless the pairs or the classes depend on the whole batch.
        self.loss_is_mean = settings.objective == "class" and settings.class_share == 1
        if settings.class_share < 1:
            with torch.no_grad():  # W° (K, E), before anything is learned
                self.frozen_text = F.normalize(self.text_features(), dim=-1)

    def zero_shot_state(self) -> dict[str, Tensor]:
        """The lent CLIP's weights."""
        names = self.adapter_state()
        return {name: self.lent[0].get_parameter(name.removeprefix("clip.")) for name in names}

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Encoded images x (B, …), labels (B,) -> scalar."""
        if self.clip.logit_scale.requires_grad:  # as in CLIP's pretraining: s <= 100
            with torch.no_grad():
                self.clip.logit_scale.clamp_(max=math.log(100))
        if self.settings.objective == "contrastive":
            captions = self.class_features()[labels]  # (K, E) -> (B, E)
            pairs = self.clip.logits(self.image_features(x), captions)  # (B, B)
            return contrastive_loss(pairs, labels, self.settings.plain_pairs)
        if self.settings.class_share == 1:
            return super().loss(x, labels)
        f = self.image_features(x)  # (B, E)
        chosen = self.most_similar(f, labels)  # (C,)
        names = [self.classnames[k] for k in chosen.tolist()]
        logits = self.clip.logits(f, self.for_classes(names).text_features())  # (B, C)
        weights = None if self.class_weights is None else self.class_weights[chosen]
        return F.cross_entropy(logits, torch.searchsorted(chosen, labels), weights)

    @torch.no_grad()
    def most_similar(self, f: Tensor, labels: Tensor) -> Tensor:
        """Indices of the classes (C,), sorted, for the loss of images f (B, E): the images' own and
        the most similar ones; at least two, since with one class the loss is 0.
        """
        similar = F.normalize(f.float(), dim=-1) @ self.frozen_text.float().T  # (B, K)
        similar.scatter_(1, labels[:, None], inf)
        count = min(math.ceil(self.settings.class_share * len(self.classnames)), MOST)
        count = min(max(count, 2, len(labels.unique())), len(self.classnames))
        return similar.amax(dim=0).topk(count).indices.sort().values


def train_weights(clip, names: list[str]) -> None:
    """Make these weights of a method's own CLIP learn, in float32; the lent CLIP is unchanged."""
    clip.float()
    for name in names:
        weight = clip.get_parameter(name)
        weight.data = weight.data.clone()
        weight.requires_grad_()


def trained_names(clip, part: str) -> list[str]:
    """The parameters of CLIP that `part` ("both", "image", "text", "last-2") names."""
    names = [name for name, _ in clip.named_parameters()]
    if part == "both":
        return names
    if part in ("image", "text"):
        image = [name for name in names if name.startswith("visual.")]
        return image if part == "image" else [n for n in names if n not in image + ["logit_scale"]]
    depth = min(len(clip.transformer.resblocks), len(clip.visual.transformer.resblocks))
    last = part.removeprefix("last-")
    if last == part or not last.isdecimal() or len(last) > 4 or not 1 <= int(last) <= depth:
        raise UserError(
            f"--train {part}: expected both, image, text, or last-1 to last-{depth} (blocks)"
        )
    chosen = ["visual.ln_post", "visual.proj", "ln_final", "text_projection"]
    for tower, transformer in {"visual.": clip.visual.transformer, "": clip.transformer}.items():
        blocks = len(transformer.resblocks)
        chosen += [f"{tower}transformer.resblocks.{blocks - 1 - i}" for i in range(int(last))]
    return [name for name in names if any(name == c or name.startswith(f"{c}.") for c in chosen)]
