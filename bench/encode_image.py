"""Images per second of `encode_image` at ViT-B/16, beside three libraries and the machine's limit.

    python bench/encode_image.py [--batch 16] [--rounds 5] [--compile]

The limit is the rate of a large float32 matrix product (4096 x 4096 x 4096) in the same run,
computed by `a @ b`, as in the other libraries, and as in our linear layers (see clip_min/fast.py).
Our own rate counts only the multiply-adds that are computed: the last block computes one token.
Random weights. Needs the `test` extra.

--compile also times torch.compile of our tower, as it is and with PyTorch's own path in it. This
takes minutes and needs a C++ compiler.
"""

import argparse
import unittest.mock

import clip as openai_clip
import open_clip
import torch
import transformers
from side_by_side import plain, products, relative, seconds, show

from clip_min import CLIP, CONFIGS


def flops(config) -> float:
    """Floating-point operations for one image: 2 per multiply-add, only matrix products."""
    width, patch = config.vision_width, config.patch_size
    tokens = 1 + (config.image_size // patch) ** 2
    embed = (tokens - 1) * 3 * patch**2 * width + width * config.embed_dim
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    last = tokens * 3 * width**2 + 9 * width**2 + 2 * tokens * width  # for one token
    return 2 * (embed + (config.vision_layers - 1) * block + last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    flags = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    config = CONFIGS["ViT-B/16"]
    images = torch.randn(flags.batch, 3, 224, 224)

    ours = CLIP(config).eval()
    openai = openai_clip.model.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12).eval()
    state = {name.replace("in_proj.", "in_proj_"): t for name, t in ours.state_dict().items()}
    openai.load_state_dict(state)
    opened = open_clip.create_model("ViT-B-16", force_quick_gelu=True).eval()
    opened.load_state_dict(state)
    vision = transformers.CLIPVisionConfig(patch_size=16, projection_dim=512)
    hugging = transformers.CLIPVisionModelWithProjection(vision).eval()

    ways = {
        "ours": lambda: ours.encode_image(images),
        "ours, F.linear": plain(lambda: ours.encode_image(images)),
        "openai-clip": lambda: openai.encode_image(images),
        "open_clip": lambda: opened.encode_image(images),
        "transformers": lambda: hugging(pixel_values=images),
    }
    if flags.compile:
        compiled = torch.compile(ours.encode_image)
        ways["ours, compiled"] = lambda: compiled(images)
        off = unittest.mock.patch("clip_min.fast.enabled", False)
        ways["CLIP_MIN_FAST=0"] = off(lambda: ours.encode_image(images))
        ways["CLIP_MIN_FAST=0, compiled"] = off(lambda: compiled(images))
    features = ways["ours"]()
    differ = {
        name: relative(features, ways[name]())
        for name in ways
        if name not in ("ours", "transformers")  # whose weights are others
    }
    taken = seconds(ways | products(), flags.rounds)
    ours_per_second = flops(config) * flags.batch / taken["ours"]
    rate, our_rate = (2 * 4096**3 / taken[product] for product in products())
    share, our_share = ours_per_second / rate, ours_per_second / our_rate
    rows = [
        {
            "library": name,
            "images/s": flags.batch / taken[name],
            "ours is faster by": taken[name] / taken["ours"],
            "features differ by": differ.get(name),
        }
        for name in ways
    ]
    show(
        f"encode_image, ViT-B/16, batch {flags.batch}, float32; ours runs at {100 * share:.0f} %"
        f" of the rate of a @ b ({rate / 1e9:.0f} GFLOP/s), {100 * our_share:.0f} % of that of our"
        f" linear layer ({our_rate / 1e9:.0f} GFLOP/s)",
        rows,
        share_of_product_rate=share,
        share_of_our_product_rate=our_share,
        product_gflops=rate / 1e9,
        our_product_gflops=our_rate / 1e9,
    )


if __name__ == "__main__":
    main()
