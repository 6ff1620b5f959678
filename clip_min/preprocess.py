"""From an image to the image tower's input, in two steps.

    crop       PIL image -> uint8 (3, n, n): short side to n pixels (bicubic), centre square, RGB
    normalize  uint8 -> float: to [0, 1], minus CLIP's mean, over CLIP's standard deviation

Together they are OpenAI's transform, pixel for pixel. The first step does the slow work (decoding,
resizing), and its uint8 result can be stored without loss; the second is a single pass that runs on
the device. As in OpenAI's transform, `crop` resizes in the image's own mode (palette, grey, RGBA),
converts to RGB afterwards, and ignores EXIF rotation.

Other models use another preprocessing, which their config names: both sides resized to n pixels
("squash"), bilinear interpolation, another mean and deviation. The result equals open_clip's.
"""

from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from clip_min.model import CONFIGS, CLIPConfig

OPENAI = CONFIGS["ViT-B/16"]  # 224 pixels


def crop(image: Image.Image, config: CLIPConfig | int = OPENAI) -> Tensor:
    """An image of any size and mode -> its uint8 crop (3, n, n).

    config: the model's; or n, for OpenAI's preprocessing at that size.
    """
    if not isinstance(config, CLIPConfig):
        config = replace(OPENAI, image_size=config)
    size, squash = config.image_size, config.resize == "squash"
    image = tv.resize(
        image, [size, size] if squash else size, InterpolationMode(config.interpolation)
    )
    image = tv.center_crop(image, size).convert("RGB")
    return tv.pil_to_tensor(image)


def normalize(
    pixels: Tensor, dtype: torch.dtype = torch.float32, config: CLIPConfig = OPENAI
) -> Tensor:
    """uint8 crops (..., 3, n, n) -> what `CLIP.encode_image` reads, same shape, same device."""
    mean = torch.tensor(config.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(config.std, device=pixels.device).view(3, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std).to(dtype)
