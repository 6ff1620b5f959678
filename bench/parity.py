"""Compare results with those of other libraries, given the same weights.

    python bench/parity.py [--all]      --all: ViT-L/14 and part of ViT-H/14 too (6 GB)

The tokens of 11,000 texts, and the pixels of pictures of many shapes and modes, must be equal. For
logits, features and gradients of models with random weights, the largest difference is shown as a
fraction of the largest value. Texts, pictures and models are those of the tests.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import side_by_side  # first: it puts the clone on the path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "clip_min"))

import clip as openai
import open_clip
import torch
import torch.nn.functional as F
import transformers
from oracle import far, gradients, openai_clip, random_tokens, same_in_ours
from test_other_models import HALF, LIBRARIES, pixels
from test_preprocess import MODES, SHAPES, noise
from test_tokenizer import any_texts

from clip_min import CONFIGS, crop, load, normalize, tokenize


def tokens() -> list[dict]:
    texts = any_texts(11_000, seed=0)
    ours, theirs = tokenize(texts, truncate=True), openai.tokenize(texts, truncate=True)
    return [row("tokens of 11,000 texts", "openai-clip", (ours != theirs).sum().item())]


def prepared() -> list[dict]:
    """Compare with OpenAI's and open_clip's transforms at 224 pixels."""
    images = [noise(*shape) for shape in SHAPES] + [noise(300, 200, mode) for mode in MODES[:-1]]
    config = CONFIGS["ViT-B/16"]
    ours = torch.stack([normalize(crop(image, config), config=config) for image in images])
    rows = []
    for name, transform in {
        "openai-clip": openai.clip._transform(224),
        "open_clip": open_clip.image_transform(224, False, config.mean, config.std),
    }.items():
        theirs = torch.stack([transform(image) for image in images])
        rows.append(row(f"pixels of {len(images)} pictures", name, (ours != theirs).sum().item()))
    return rows


@torch.no_grad()
def of_openai(name: str) -> list[dict]:
    config = CONFIGS[name]
    theirs = openai_clip(config)
    ours = same_in_ours(theirs, config)
    images = torch.randn(2, 3, config.image_size, config.image_size)
    prompts = random_tokens(5, config)
    found = {
        "image features": far(ours.encode_image(images), theirs.encode_image(images)),
        "text features": far(ours.encode_text(prompts), theirs.encode_text(prompts)),
        "logits": far(ours(images, prompts), theirs(images, prompts)[0]),
    }
    return [row(f"{name}: {what}", "openai-clip", one) for what, one in found.items()]


def gradient(name: str) -> list[dict]:
    """Gradients of the cross-entropy of three images among five prompts; the largest difference."""
    openai.model.LayerNorm.forward = torch.nn.LayerNorm.forward  # theirs always computes in float32
    config = CONFIGS[name]
    theirs = openai_clip(config).double()
    ours = same_in_ours(theirs, config)
    images = torch.randn(3, 3, config.image_size, config.image_size, dtype=torch.float64)
    prompts, labels = random_tokens(5, config), torch.tensor([4, 0, 2])
    F.cross_entropy(theirs(images, prompts)[0], labels).backward()
    F.cross_entropy(ours(images, prompts), labels).backward()
    oracle, found = gradients(theirs), gradients(ours)
    farthest = max(far(found[name], oracle[name]) for name in oracle)
    return [row(f"{name}: gradient of each parameter, float64", "openai-clip", farthest)]


@torch.no_grad()
def of_folder(name: str, library: str, **changes) -> list[dict]:
    """Load a folder that a library has written; pictures are squashed, mean and deviation 0.5."""
    make, theirs, _ = LIBRARIES[library]
    config = dataclasses.replace(CONFIGS[name], **changes, resize="squash", **HALF)
    with tempfile.TemporaryDirectory() as folder:
        make(config, Path(folder))
        images, prompts = pixels(config)[:2], random_tokens(3, config)
        logits, _ = theirs(Path(folder), images, prompts)
        found = far(load(folder)(images, prompts), logits)
    of = "GELU" if config.activation == "gelu" else "QuickGELU"
    few = ", 3 layers" if "text_layers" in changes else ""
    return [row(f"{name}: logits, {of}{few}", library, found)]


def row(what: str, library: str, difference: float) -> dict:
    return {"what": what, "beside": library, "difference": difference or "none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="ViT-L/14 and part of ViT-H/14 too")
    large = parser.parse_args().all
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    rows = tokens() + prepared() + of_openai("ViT-B/32") + of_openai("ViT-B/16")
    rows += gradient("demo")
    for library in LIBRARIES:
        for activation in ("quick_gelu", "gelu"):
            rows += of_folder("ViT-B/16", library, activation=activation)
    if large:
        rows += of_folder("ViT-L/14", "open_clip", activation="gelu")
        rows += of_folder(
            "ViT-H/14", "open_clip", activation="gelu", vision_layers=3, text_layers=3
        )
    side_by_side.show("results beside those of other libraries, same weights", rows)


if __name__ == "__main__":
    main()
