"""PromptSRC: learned tokens deep in both towers, regularised to stay near frozen CLIP.

Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting",
arXiv:2307.06948. Both towers have learned tokens of their own before each of their first J blocks.
Before block 1 and later, they replace the outputs of the previous block's tokens:

    text    [start] v⁰_1 … v⁰_M name . [end] -> block 0 -> [start] v¹_1 … v¹_M name . [end] -> …
    image   [class] u⁰_1 … u⁰_N patches      -> block 0 -> [class] u¹_1 … u¹_N patches      -> …

v⁰ starts from "a photo of a", all others at random. Three terms keep features and logits near those
of the frozen towers (°). With f, W on the unit sphere and p the softmax of the logits,

    loss = CE + 25 · mean|W - W°| + 10 · mean|f - f°| + KL(p° ‖ p) / K     (the batch's mean)

W° is the mean over many hand-written templates. The result is not the last epoch's tokens but a
mean over all epochs, with weights exp(-½((t - 0.75) / 0.05)²), t the share of training done:
early tokens know little, and late ones have begun to forget.

What we do differently: without positions, attention ignores order, so image tokens can stand after
the class token instead of after the patches. Text tokens are the same for all classes and see only
[start] and each other, so a PromptTree computes them once, not K times. Recipe `paper` uses float32
instead of float16, averages only the tokens (their code averages the whole model, partly rounded),
and takes W° from 20 templates of ours instead of 60 for ImageNet (`--templates FILE` reads others).
It is for base to novel. For training on ImageNet and testing on other data sets, the authors learn
3 blocks, with another mean: `--depth 3 --mean-at 0.3 --mean-width 0.5`.
"""

from dataclasses import dataclass
from math import exp, inf
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import DEFAULT
from methods.coop import PUBLISHED, ContextSettings, LearnedContext
from methods.templates import ENSEMBLE, TemplateSettings


@dataclass(frozen=True)
class PromptSRCSettings(ContextSettings, TemplateSettings):
    templates: Annotated[
        tuple[str, ...],
        "templates of the frozen text features: 'ensemble' (20 of ours), a file with one on each "
        "line, or the templates themselves, separated by |; empty: only --template",
    ] = ENSEMBLE
    n_visual: Annotated[int, "learned tokens in each block of the image tower"] = 4
    depth: Annotated[int, "J, blocks of each tower with learned tokens, at most"] = 9
    near_text: Annotated[float, "weight of |text features - frozen ones|"] = 25.0
    near_image: Annotated[float, "weight of |image features - frozen ones|"] = 10.0
    near_logits: Annotated[float, "weight of KL(frozen || learned) / K"] = 1.0
    mean_at: Annotated[float, "--keep mean: the share of training with the largest weight"] = 0.75
    mean_width: Annotated[float, "… and the standard deviation around it, as a share"] = 0.05
    limits = {
        **ContextSettings.limits,
        "n_visual": (0, inf),
        "depth": (1, inf),
        "near_text": (0, inf),
        "near_image": (0, inf),
        "near_logits": (0, inf),
        "mean_at": (0, 1),
        "mean_width": (0.03, inf),  # below, all weights but the largest round to 0
    }


class Prompted(nn.Module):
    """A block whose input tokens 1 … M are replaced with learned ones (M, D)."""

    def __init__(self, block: nn.Module, prompts: Tensor):
        super().__init__()
        self.block, self.prompts = block, nn.Parameter(prompts)

    def forward(self, x: Tensor, mask: Tensor | None = None, read=None) -> Tensor:
        prompts = self.prompts.to(x.dtype).expand(len(x), -1, -1)  # (B, M, D)
        rest = x[:, 1 + len(self.prompts) :]
        return self.block(torch.cat([x[:, :1], prompts, rest], dim=1), mask, read)


OWN = {"keep": "mean", "patience": 0}
PAPER = {**PUBLISHED, **OWN, "lr": 2.5e-3, "epochs": 20, "batch_size": 4}


class PromptSRC(LearnedContext):
    title = "deep prompts in both towers, held near frozen CLIP"
    Settings = PromptSRCSettings
    settings: PromptSRCSettings
    first_block = 0
    recipes = {
        "default": {**DEFAULT, **OWN, "lr": 2e-3, "min_steps": 1200},
        "paper": PAPER,
        # For Flowers102 and four others; for the rest, the published mean and width are 0.6.
        "few-shot": {**PAPER, "epochs": 50, "mean_at": 0.9, "mean_width": 0.1},
        "demo": {**OWN, "lr": 1e-2, "epochs": 25, "batch_size": 16},
    }
    demo_model = {"lr": 1e-2}

    def __init__(self, clip, classnames, template, settings: PromptSRCSettings):
        super().__init__(clip, classnames, template, settings)
        c, visual = clip.config, self.clip.visual

        def tokens(number: int, width: int) -> Tensor:
            return 0.02 * torch.randn(number, width).to(clip.device)

        self.visual_context = nn.Parameter(tokens(settings.n_visual, c.vision_width))  # (N, D)
        sides = (
            (self.clip, settings.n_ctx, c.text_width),
            (visual, settings.n_visual, c.vision_width),
        )
        for tower, number, width in sides:
            blocks = tower.transformer.resblocks
            for i in range(1, min(settings.depth, len(blocks))):
                blocks[i] = Prompted(blocks[i], tokens(number, width))

    def text_features(self) -> Tensor:
        return self.prompts(self.clip, self.context)  # (K, E)

    def image_features(self, x: Tensor) -> Tensor:
        """images (B, 3, n, n), normalised -> features (B, E), not normalised."""
        tower = self.clip.visual
        x = tower.begin(x, 0)  # (B, T, D)
        # As published, u⁰ passes the LayerNorm before the blocks, like the other tokens.
        prompts = tower.ln_pre(self.visual_context.to(tower.proj.dtype))  # (N, D)
        prompts = prompts.to(x.dtype).expand(len(x), -1, -1)  # (B, N, D)
        return tower.finish(torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """images x (B, 3, n, n), labels (B,) -> scalar."""
        s, frozen = self.settings, self.lent[0]
        with torch.no_grad():
            image_was, text_was = frozen.encode_image(x), self.written_features()
        image, text = self.image_features(x), self.text_features()
        logits = self.clip.logits(image, text)  # (B, K)
        p_was = self.clip.logits(image_was, text_was).softmax(dim=1)
        divergence = F.kl_div(logits.log_softmax(dim=1), p_was, reduction="batchmean")
        return (
            F.cross_entropy(logits, labels, self.class_weights)
            + s.near_text * distance(text, text_was)
            + s.near_image * distance(image, image_was)
            + s.near_logits * divergence / len(self.classnames)
        )

    def round_weight(self, progress: float) -> float:
        """The Gaussian of the mean; progress from 0 to 1."""
        s = self.settings
        return exp(-(((progress - s.mean_at) / s.mean_width) ** 2) / 2)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """The mean absolute difference of two sets of features (N, E), put on the unit sphere."""
    return F.l1_loss(F.normalize(one.float(), dim=-1), F.normalize(other.float(), dim=-1))
