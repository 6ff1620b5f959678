"""From a picture to what the image tower reads, in two steps.

    crop       PIL image -> uint8 (3, n, n): short side to n pixels (bicubic), centre square, RGB
    normalize  uint8 -> float: to [0, 1], minus CLIP's mean, over CLIP's standard deviation

OpenAI's transform, pixel for pixel, cut where it can be: everything slow happens before the cut
(decoding, resizing) and loses nothing by being kept as uint8; what comes after is one pass that
runs on the device. Like theirs, `crop` resizes in the picture's own mode (palette, grey, RGBA) and
turns it into RGB afterwards, and does not act on EXIF rotation.
"""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def crop(image: Image.Image, size: int = 224) -> Tensor:
    """A picture of any size and mode -> its uint8 crop (3, size, size)."""
    image = tv.resize(image, size, InterpolationMode.BICUBIC)
    image = tv.center_crop(image, size).convert("RGB")
    return tv.pil_to_tensor(image)


def normalize(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 crops (..., 3, n, n) -> what `CLIP.encode_image` reads, same shape, same device."""
    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(3, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std).to(dtype)
