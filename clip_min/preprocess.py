"""From a picture to what the image tower reads, in two steps.

    crop       PIL image -> uint8 (3, n, n): short side to n pixels (bicubic), centre square, RGB
    normalize  uint8 -> float: to [0, 1], minus CLIP's mean, over CLIP's standard deviation

OpenAI's transform, pixel for pixel, cut where it can be: everything slow happens before the cut
(decoding, resizing) and loses nothing by being kept as uint8; what comes after is one pass that
runs on the device. Like theirs, `crop` resizes in the picture's own mode (palette, grey, RGBA) and
turns it into RGB afterwards, and does not act on EXIF rotation.

Other models' pictures are prepared otherwise, as their config says: both sides to n pixels
("squash"), bilinear, another mean and deviation. open_clip's transform is the same, then.
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
    """A picture of any size and mode -> its uint8 crop (3, n, n).

    config: of the model that is to read it; or n, for a crop as OpenAI's models read it.
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
