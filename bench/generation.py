"""Make synthetic images in batches, and one at a time as published code does.

    python bench/generation.py [--batch 8] [--images 16] [--rounds 3] [--acceptance 0.5]
    python bench/generation.py --device cuda        LLaVA-1.5-7B's and SD 2.1's sizes: 20 GB of disk

The models have random weights, which do not change the speed: tiny models on a CPU, the real sizes
on a GPU. First each stage is timed alone, then a whole folder of images for 4 classes, with a
filter that accepts a given share; there the U-Net's passes are counted. A batch is filled from four
classes, so it stays full while any of them lacks images.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from side_by_side import seconds, show
from torchvision.transforms import functional as tv

from fewshot.pictures import Pictures
from gen.batching import Batcher
from gen.books import DONE, Manifest
from gen.caption import Llava
from gen.diffuse import Diffusion
from gen.plan import plan
from gen.settings import Generation
from gen.studio import Studio
from tests.tiny_generators import save_diffusion, save_llava

CLASSES, SHOTS = [f"flower {k}" for k in range(4)], 4
# The real sizes: 14 and 5 GB.
LLAVA_7B = {
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    | {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768},
    "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064},
}
SD_21 = {
    "unet": {"sample_size": 64, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024}
    | {"use_linear_projection": True},
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
    | {"down_block_types": ("DownEncoderBlock2D",) * 4}
    | {"up_block_types": ("UpDecoderBlock2D",) * 4},
    "text": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
    | {"num_attention_heads": 16, "projection_dim": 512, "hidden_act": "gelu"},
}


class Judge:
    """Replaces the filter: accepts exactly this share of images, evenly spread."""

    name = revision = "share"

    def __init__(self, share: float):
        self.share, self.seen = share, 0

    def __call__(self, images: list, labels: list[int]) -> tuple[list[int], list[float]]:
        predicted = []
        for label in labels:
            right = int((self.seen + 1) * self.share) > int(self.seen * self.share)
            predicted.append(label if right else (label + 1) % len(CLASSES))
            self.seen += 1
        return predicted, [0.0] * len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--acceptance", type=float, default=0.5)
    flags = parser.parse_args()
    gpu = flags.device != "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folders = Path(temporary) / "llava", Path(temporary) / "diffusion"
        save_llava(folders[0], *((LLAVA_7B, torch.float16) if gpu else ()))
        save_diffusion(folders[1], *((SD_21, torch.float16) if gpu else ()))
        options = Generation(per_class=flags.images // len(CLASSES), captions=1)
        options = options.for_task("folder", "a photo of a {}.")
        painter = Diffusion(str(folders[1]), options, flags.device)
        captioner = Llava(str(folders[0]), options, flags.device)
        rows = stages(captioner, painter, flags)
        made = [
            whole(captioner, painter, replace(options, batch_size=size), flags, Path(temporary))
            for size in (1, flags.batch)
        ]
    for row, passes in zip(rows[2:], made, strict=True):  # the painter's rows
        row["U-Net passes per kept image"] = passes
    size = "real sizes" if gpu else "tiny models"
    show(
        f"synthetic images, {size}, {flags.device}, random weights, {options.steps} steps of which "
        f"{int(options.steps * options.strength)} run, {100 * flags.acceptance:.0f} % accepted",
        rows,
        fewer_passes=made[0] / made[1],
    )


def pictures(count: int, size: int = 64) -> list[Image.Image]:
    noise = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return [tv.to_pil_image(picture) for picture in noise]


def stages(captioner: Llava, painter: Diffusion, flags: argparse.Namespace) -> list[dict]:
    """Images per second of both stages, one at a time and in batches."""
    torch.manual_seed(0)
    images, seeds = pictures(flags.images), list(range(flags.images))
    names = [CLASSES[i % len(CLASSES)] for i in seeds]
    work = {"caption": captioner, "paint": painter}
    ways = {
        (stage, size): lambda model=model, size=size: Batcher(size)(model, images, names, seeds)
        for stage, model in work.items()
        for size in (1, flags.batch)
    }
    taken = seconds(ways, flags.rounds)
    return [
        {
            "stage": stage,
            "batch": size,
            "images/s": flags.images / taken[stage, size],
            "faster by": taken[stage, 1] / taken[stage, size],
            "U-Net passes per kept image": None,
        }
        for stage, size in ways
    ]


def whole(captioner, painter, options: Generation, flags, temporary: Path) -> float:
    """Make a folder of images -> passes of the U-Net per kept image."""
    torch.manual_seed(0)
    labels = torch.arange(len(CLASSES)).repeat_interleave(SHOTS)
    noise = torch.randint(0, 256, (len(labels), 3, 64, 64), dtype=torch.uint8)
    folder = temporary / f"images{options.batch_size}"
    manifest = Manifest.start(folder, {"classnames": CLASSES}, plan(options, CLASSES, None))
    studio = Studio(manifest, Pictures(noise, labels), options, seed=0)
    passes = []
    handle = painter.pipe.unet.register_forward_hook(lambda *_: passes.append(1))
    studio.caption(captioner)
    studio.paint(painter, Judge(flags.acceptance))
    handle.remove()
    return len(passes) / manifest.count(*DONE).total()


if __name__ == "__main__":
    main()
