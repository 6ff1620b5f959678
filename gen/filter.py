"""The filter: it keeps images in which a model recognises their class.

Any method can be the filter: zero-shot CLIP, or a method trained on the real images.
"""

import torch
from PIL import Image
from torch import Tensor

from clip_min import crop, normalize


class Filter:
    """A method as the filter. name, revision: recorded with each image it judges."""

    def __init__(self, method, name: str, revision: str):
        self.method, self.name, self.revision = method, name, revision

    def __call__(self, images: list[Image.Image], labels: list[int]) -> list[tuple[int, float]]:
        """-> of each image, the class of the largest logit and the margin.

        margin: the logit of the right class minus the largest other one; above 0 if recognised.
        """
        clip = self.method.clip
        pixels = torch.stack([crop(image, clip.config) for image in images])
        with self.method.inference():
            x = normalize(pixels.to(clip.device), config=clip.config)  # (B, 3, n, n)
            logits = self.method(x).cpu()  # (B, K)
        above = margins(logits, torch.tensor(labels)).tolist()
        return list(zip(logits.argmax(dim=1).tolist(), above, strict=True))


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, K), labels (B,) -> (B,)."""
    right = logits.gather(1, labels[:, None])  # (B, 1)
    others = logits.scatter(1, labels[:, None], -torch.inf)  # (B, K)
    return right[:, 0] - others.amax(dim=1)
