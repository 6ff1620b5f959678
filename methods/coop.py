"""CoOp: learn the words around the class name, as vectors.

Zhou et al., "Learning to Prompt for Vision-Language Models", arXiv:2109.01134. The template
"a photo of a {}." becomes M free vectors v, in place of word embeddings,

    prompt_k = [start] v_1 … v_M  name_k .  [end]          v (M, D), shared by all classes
    logits   = s · norm(f) · norm(text(prompt))ᵀ           f: frozen image feature (E,)

and only v is trained. v starts from the words of `ctx_init` ("a photo of a": zero-shot CLIP) or, if
that is empty, at random. The name stands at the end, in the middle or in front. With
`class_specific` every class has its own vectors, (K, M, D); such a model cannot name new classes.

What we do differently: the prompts go through a PromptTree, so [start] v_1 … v_M is computed once
per step, not once per class. Without augmentation the frozen image tower encodes each image only
once, and training uses the stored features. Recipe `paper` uses float32 instead of float16.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from clip_min import PromptTree, UserError, tokenize
from methods.base import DEFAULT, Method, TrainingSettings
from methods.class_prompts import mean_per_class
from methods.depth_head import DepthHeadSettings, WithDepthHead

PLACEHOLDER = "X"  # one token, whose embedding the context replaces

PUBLISHED = {  # as in CoOp's and CoCoOp's code, which choose nothing on validation
    "optimizer": "sgd",
    "lr": 2e-3,
    "weight_decay": 5e-4,
    "drop_last": True,
    "warmup_epochs": 1,
    "warmup_lr": 1e-5,
    "patience": 0,
    "keep": "last",
    "augment": "crop-flip",
}


OWN = {"lr": 2e-3, "epochs": 10}


@dataclass(frozen=True)
class ContextSettings(TrainingSettings):
    n_ctx: Annotated[int, "M, the number of learned vectors"] = 4
    ctx_init: Annotated[str, "words to start from, M tokens; empty: N(0, 0.02)"] = "a photo of a"
    limits = {**TrainingSettings.limits, "n_ctx": (1, 75)}


class LearnedContext(Method):
    """The base of CoOp and its successors: learned vectors in the prompts, in place of words."""

    settings: ContextSettings
    text_learns = True  # class features change in every step
    _written: Tensor | None = None  # see `written_features`

    def __init__(self, clip, classnames, template, settings: ContextSettings):
        super().__init__(clip, classnames, template, settings)
        self.context = nn.Parameter(initial_context(self.clip, settings.n_ctx, settings.ctx_init))

    def set_classes(self, classnames: list[str]) -> None:
        super().set_classes(classnames)
        self._written = None

    def prompt_tree(self) -> PromptTree:
        """The context before each name, so that all classes share its nodes in the tree."""
        return context_tree(self.classnames, self.settings.n_ctx)

    def written_features(self) -> Tensor:
        """The text features (K, E) of the written prompts, from frozen CLIP, computed once. With
        several prompts for a class, their mean; not normalised.
        """
        if self._written is None:
            tree = Method.prompt_tree(self).to(self.clip.device)
            with torch.no_grad():
                x = tree(self.lent[0])  # (J, E)
            self._written = mean_per_class(x, self.written_prompts())
        return self._written


@dataclass(frozen=True)
class CoOpSettings(ContextSettings, DepthHeadSettings):
    position: Annotated[Literal["end", "middle", "front"], "where the class name stands"] = "end"
    class_specific: Annotated[bool, "learn vectors for each class, instead of shared ones"] = False


class CoOp(WithDepthHead, LearnedContext):  # --depth-head adds DePT's head: depth_head.py
    title = "learned prompt vectors, shared by all classes"
    Settings = CoOpSettings
    settings: CoOpSettings
    recipes = {
        "default": {**OWN, **DEFAULT, "min_steps": 3000},
        "notebook": OWN,
        # For 8 or 16 shots. The paper trains 50 epochs with 1 shot, 100 with 2 or 4 shots, and 50
        # on ImageNet.
        "paper": {**PUBLISHED, "epochs": 200},  # base-to-novel: M = 4, from "a photo of a"
        "few-shot": {**PUBLISHED, "epochs": 200, "n_ctx": 16, "ctx_init": ""},  # all classes
        "demo": {**OWN, "epochs": 30, "patience": 5},
    }
    demo_model = {"lr": 1e-2}

    def __init__(self, clip, classnames, template, settings: CoOpSettings):
        super().__init__(clip, classnames, template, settings)
        if settings.class_specific:
            # Drawn for each class, so that random vectors differ between classes, as published.
            each = [
                initial_context(self.clip, settings.n_ctx, settings.ctx_init) for _ in classnames
            ]
            self.context = nn.Parameter(torch.cat(each))  # (K·M, D)
            self.names_unseen = False  # an unseen class has no vectors

    def zero_shot_state(self) -> dict[str, Tensor] | None:
        """The embedded words of `ctx_init`, if they make up the template."""
        s, words = self.settings, self.settings.ctx_init
        written = not (s.class_specific or s.depth_head) and s.position == "end" and words
        if not written or self.templates != (f"{words} {{}}.",):
            return None
        return {"context": initial_context(self.clip, s.n_ctx, words)}

    def prompt_tree(self) -> PromptTree:
        """The prompts of the classes, with slots for the context."""
        n_ctx, position = self.settings.n_ctx, self.settings.position
        return context_tree(self.classnames, n_ctx, position, self.settings.class_specific)

    def text_features(self) -> Tensor:
        return self.prompts(self.clip, self.context)  # (K, E)


def initial_context(clip, n_ctx: int, words: str) -> Tensor:
    """The embeddings of `words`, or N(0, 0.02): (M, D), float32."""
    if not words:
        width = clip.token_embedding.embedding_dim
        # Drawn on the CPU, so that a seed gives the same vectors on every device.
        return 0.02 * torch.randn(n_ctx, width).to(clip.device)
    tokens = tokenize(words)[0]
    tokens = tokens[1 : tokens.argmax()]  # without start and end
    if len(tokens) != n_ctx:
        raise UserError(
            f"--n-ctx {n_ctx}: --ctx-init {words!r} has {len(tokens)} tokens; give --n-ctx "
            f"{len(tokens)}, or --ctx-init '' for random vectors"
        )
    # A copy: the lent CLIP's embeddings must not learn.
    return clip.token_embedding.weight[tokens.to(clip.device)].detach().float().clone()


def context_tree(
    classnames: list[str], n_ctx: int, position: str = "end", class_specific: bool = False
) -> PromptTree:
    """The prompts of K classes with M slots for the context.

    "end", M = 4:  [start] X X X X name . [end]      slots  -1 0 1 2 3 -1 …
    "middle":      [start] X X name X X . [end]      slots  -1 0 1 -1 … 2 3 -1 -1
    Names differ in length, so the slots before the name are counted from the start of the prompt,
    those after it from the end. With `class_specific`, class k has the slots k·M … k·M + M - 1.
    """
    before = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]
    after = n_ctx - before
    texts = [
        " ".join([PLACEHOLDER] * before + [name] + [PLACEHOLDER] * after) + "."
        for name in classnames
    ]
    tokens = tokenize(texts)  # (K, 77)
    slots = torch.full_like(tokens, -1)
    for k, end in enumerate(tokens.argmax(dim=-1).tolist()):  # [end] has the largest token id
        first = k * n_ctx if class_specific else 0
        rows = torch.arange(first, first + n_ctx)
        slots[k, 1 : 1 + before] = rows[:before]  # [start] stands at 0
        slots[k, end - 1 - after : end - 1] = rows[before:]  # the full stop stands at end - 1
    return PromptTree(tokens, slots)
