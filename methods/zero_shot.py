"""Zero-shot CLIP: no training; the class names are the classifier.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020, section 3.1. With f an image's feature (E,), W the text features of the class
prompts (K, E) and s CLIP's own logit scale,

    logits = s · norm(f) · norm(W)ᵀ                                       (K,)

Every other method starts from this equation and changes one thing in it. Takes image features, as
nothing in the image tower changes.
"""

from torch import Tensor

from methods.base import Method


class ZeroShot(Method):
    title = "CLIP as it is: class names alone"
    input = "features"

    def forward(self, features: Tensor) -> Tensor:
        """features (B, E) -> logits (B, K)."""
        return self.clip.logits(features, self.class_features())

    def fit(self, train, val, descend) -> None:
        """Nothing is learned."""
