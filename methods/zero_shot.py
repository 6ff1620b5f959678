"""Zero-shot CLIP: no training; the class names are the classifier.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020, section 3.1. With f an image's feature (E,), W the text features of the class
prompts (K, E) and s CLIP's own logit scale,

    logits = s · norm(f) · norm(W)ᵀ                                       (K,)

Every other method starts from this equation and changes one thing in it. `Method` computes it, so
this class adds nothing.
"""

from methods.base import Method
from methods.templates import TemplateSettings


class ZeroShot(Method):
    title = "CLIP as it is: class names alone"
    Settings = TemplateSettings

    @classmethod
    def plain(cls, clip, classnames: list[str], template: str) -> "ZeroShot":
        """Zero-shot CLIP with default settings: the baseline of every method."""
        return cls(clip, classnames, template, cls.Settings())
