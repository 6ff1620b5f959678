"""Zero-shot CLIP: no training; the class names are the classifier.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020, section 3.1. With f an image's feature (E,), W the text features of the class
prompts (K, E) and s CLIP's own logit scale,

    logits = s · norm(f) · norm(W)ᵀ                                       (K,)

A class may have several prompts, one of each of J templates (the paper's prompt ensemble); its text
feature is then their mean on the unit sphere:

    W_k = mean_j norm(text(template_j(name_k)))

Every other method starts from these equations and changes one thing in them. Those that leave both
towers as they are inherit from `ZeroShot`: they learn on image features, which are computed once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import PromptTree, UserError, tokenize
from methods.base import Method, Settings

ENSEMBLE = (  # for photographs of anything; ours, in the manner of the paper's 80
    "a photo of a {}.",
    "a photo of the {}.",
    "a good photo of a {}.",
    "a bad photo of a {}.",
    "a blurry photo of a {}.",
    "a sharp photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a close-up of a {}.",
    "a photo of a {} from afar.",
    "a photo of part of a {}.",
    "a photo of many {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a photo of a {} outdoors.",
    "a photo of a {} in front of a plain background.",
    "a cropped picture of a {}.",
    "a black and white photo of a {}.",
    "a drawing of a {}.",
    "a picture that shows a {}.",
)


@dataclass(frozen=True)
class TemplateSettings(Settings):
    templates: Annotated[
        str,
        "templates to average over: 'ensemble' (a list of ours), a file of one a line, or the "
        "templates themselves with | between them; empty: --template alone",
    ] = ""

    def __post_init__(self):
        super().__post_init__()
        text = self.templates
        if text == "ensemble":
            text = "|".join(ENSEMBLE)
        elif text and "{}" not in text:
            try:
                text = Path(text).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"--templates {self.templates}: cannot be read as a text file ({error}); "
                    "expected 'ensemble', a file of templates, or templates with {} in them"
                ) from None
        lines = "|".join(text.splitlines()).split("|")  # in a file too, | stands between two
        lines = [line.strip() for line in lines if line.strip()]
        if bad := [line for line in lines if "{}" not in line]:
            raise UserError(f"--templates: {bad[0]!r} has no {{}} for the class name; add one")
        if self.templates and not lines:
            raise UserError(f"--templates {self.templates}: expected templates, found none")
        # The lines stand in for the file's name, so that a run does not depend on the file.
        object.__setattr__(self, "templates", "|".join(lines))


class ZeroShot(Method):
    title = "CLIP as it is: class names alone"
    Settings = TemplateSettings
    input = "features"

    @classmethod
    def plain(cls, clip, classnames: list[str], template: str) -> "ZeroShot":
        """With its default settings: what every method is compared with."""
        return cls(clip, classnames, template, cls.Settings())

    def set_classes(self, classnames: list[str]) -> None:
        self._text = None  # features of the classes it had before
        super().set_classes(classnames)

    def prompt_tree(self) -> PromptTree:
        """J·K prompts, the K of the first template first."""
        if not self.settings.templates:
            return super().prompt_tree()
        templates = self.settings.templates.split("|")
        return PromptTree(
            tokenize([t.replace("{}", n) for t in templates for n in self.classnames])
        )

    def text_features(self) -> Tensor:
        """One text feature per class (K, E)."""
        x = self.prompts(self.clip)  # (J·K, E)
        if len(x) == len(self.classnames):
            return x
        return F.normalize(x, dim=-1).unflatten(0, (-1, len(self.classnames))).mean(0)  # (K, E)

    def class_features(self) -> Tensor:
        """The same, computed once: nothing in the text tower changes."""
        if self._text is None:
            with torch.no_grad():
                self._text = self.text_features()
        return self._text

    def forward(self, x: Tensor) -> Tensor:
        """features (B, E), or images (B, 3, n, n) if they are augmented -> logits (B, K)."""
        return self.clip.logits(self.image_features(x), self.class_features())
