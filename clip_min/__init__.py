"""CLIP (Radford et al., 2021), rewritten from scratch in plain PyTorch.

import clip_min
clip = clip_min.load("ViT-B/16")
pixels = clip_min.crop(image, clip.config)                            # uint8 (3, 224, 224)
images = clip_min.normalize(pixels, config=clip.config)[None]         # (1, 3, 224, 224)
logits = clip(images, clip_min.tokenize(["a cat", "a dog"]))          # (1, 2)
"""

import os

# Let OpenMP threads sleep while they wait for other threads. By default they spin; if another
# process keeps a core busy, a spinning thread takes the core from the very thread it waits for, and
# matrix products take much longer. torch reads this when it is imported, so import clip_min first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from clip_min.errors import UserError
from clip_min.model import CLIP, CONFIGS, CLIPConfig
from clip_min.preprocess import crop, normalize
from clip_min.prompts import PromptTree
from clip_min.tokenizer import tokenize


def __getattr__(name: str):
    # Imported on first use: else `python -m clip_min.weights` would import its own module twice.
    if name in ("load", "save"):
        from clip_min import weights

        return getattr(weights, name)
    raise AttributeError(f"module 'clip_min' has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "CLIP",
    "CONFIGS",
    "CLIPConfig",
    "PromptTree",
    "UserError",
    "crop",
    "load",
    "normalize",
    "save",
    "tokenize",
]
