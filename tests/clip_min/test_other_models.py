"""Models of others, with GELU, wider heads or pictures prepared otherwise, from their libraries'
own folders and back: logits and pixels are theirs.
"""

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from oracle import far, random_tokens
from PIL import Image
from safetensors.torch import save_file

from clip_min import (
    CLIP,
    CONFIGS,
    CLIPConfig,
    UserError,
    crop,
    formats,
    load,
    normalize,
    save,
)
from clip_min.names import to_openai_names

CLOSE = 1e-5
# Of each tower one thing that no tensor tells is not as OpenAI's models have it.
TINY = CLIPConfig(32, 32, 8, 64, 2, 2, 48, 2, 4, vocab_size=1000)
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
WAYS = {
    "OpenAI's": {},
    "LAION's": {"activation": "gelu"},
    "LAION's L/14": {"activation": "gelu", **HALF},
    "DFN's": {"resize": "squash"},
    "bilinear": {"activation": "gelu", "resize": "squash", "interpolation": "bilinear"},
}
SHAPES = [(300, 200), (20, 150), (32, 32), (31, 33), (3, 2), (640, 427)]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(*shape[::-1], 3) for shape in SHAPES]
    return [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


def pixels(config: CLIPConfig) -> torch.Tensor:
    return torch.stack([normalize(crop(image, config), config=config) for image in pictures()])


def open_clip_folder(config: CLIPConfig, folder: Path) -> None:
    """As open_clip publishes one, with random weights; its config in words of its own."""
    folder.mkdir(exist_ok=True)
    model = {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.vision_width,
            "layers": config.vision_layers,
            "head_width": config.vision_width // config.vision_heads,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": config.vocab_size,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
        },
    }
    if config.activation == "quick_gelu":
        model["quick_gelu"] = True
    how = {"mean": config.mean, "std": config.std, "interpolation": config.interpolation}
    told = {"model_cfg": model, "preprocess_cfg": how | {"resize_mode": config.resize}}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    save_file(open_clip.model.CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")


def of_open_clip(folder: Path, images: torch.Tensor, tokens: torch.Tensor):
    """open_clip's logits of images that are prepared, and the pixels of those that are not."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    with torch.no_grad():
        image, text, scale = model.eval()(images, tokens)
    return scale * image @ text.T, torch.stack([transform(picture) for picture in pictures()])


def hugging_face_folder(config: CLIPConfig, folder: Path) -> None:
    """As transformers saves one, with random weights."""
    shared = {"hidden_act": config.activation, "projection_dim": config.embed_dim}
    vision = {"image_size": config.image_size, "patch_size": config.patch_size}
    text = {"vocab_size": config.vocab_size, "eos_token_id": config.vocab_size - 1}
    text |= {"bos_token_id": config.vocab_size - 2}
    for part, tower in ((vision, "vision"), (text, "text")):
        part |= shared | {
            "hidden_size": getattr(config, f"{tower}_width"),
            "intermediate_size": 4 * getattr(config, f"{tower}_width"),
            "num_hidden_layers": getattr(config, f"{tower}_layers"),
            "num_attention_heads": getattr(config, f"{tower}_heads"),
        }
    made = transformers.CLIPConfig(
        projection_dim=config.embed_dim, vision_config=vision, text_config=text
    )
    transformers.CLIPModel(made).save_pretrained(folder)
    square = {"height": config.image_size, "width": config.image_size}
    squash = config.resize == "squash"
    transformers.CLIPImageProcessor(
        size=square if squash else {"shortest_edge": config.image_size},
        do_center_crop=not squash,
        crop_size=square,
        resample=2 if config.interpolation == "bilinear" else 3,
        image_mean=list(config.mean),
        image_std=list(config.std),
    ).save_pretrained(folder)


def of_hugging_face(folder: Path, images: torch.Tensor, tokens: torch.Tensor):
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    # The one of Pillow; transformers 5.0 has it under the shorter name.
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    transform = kind.from_pretrained(folder)
    with torch.no_grad():
        logits = model(pixel_values=images, input_ids=tokens).logits_per_image
    return logits, transform(pictures(), return_tensors="pt")["pixel_values"]


LIBRARIES = {
    "open_clip": (open_clip_folder, of_open_clip, formats.save_open_clip),
    "transformers": (hugging_face_folder, of_hugging_face, formats.save_hugging_face),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_from_a_librarys_folder_and_back_logits_and_pixels_are_theirs(library, way, tmp_path):
    make, theirs, export = LIBRARIES[library]
    config = dataclasses.replace(TINY, **WAYS[way])
    make(config, tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a Note would be one: all is told
        clip = load(tmp_path / "theirs")
    assert clip.config == config
    images, tokens = pixels(config), random_tokens(4, config)
    export(clip, tmp_path / "ours")
    save(clip, tmp_path / "ours.safetensors")
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        logits, prepared = theirs(folder, images, tokens)
        assert far(clip(images, tokens), logits) < CLOSE
        assert prepared.shape == images.shape
        if library == "open_clip":
            assert torch.equal(prepared, images)
        else:  # which divides by 255 after the rest, and cuts the last one's odd margin elsewhere
            assert (prepared - images)[:-1].abs().max() < 1e-6
    for path in (tmp_path / "ours", tmp_path / "ours.safetensors"):
        assert load(path).config == config
        assert torch.equal(load(path)(images, tokens), clip(images, tokens))


@pytest.mark.parametrize("way", WAYS)
def test_photographs_are_prepared_as_open_clip_does(way, flowers12):
    config = dataclasses.replace(TINY, **WAYS[way], image_size=224)
    how = {"resize_mode": config.resize, "interpolation": config.interpolation}
    transform = open_clip.image_transform(224, False, config.mean, config.std, **how)
    for path in sorted(flowers12.rglob("*.jpg"))[::50]:
        with Image.open(path) as image:
            assert torch.equal(normalize(crop(image, config), config=config), transform(image))


def test_what_openai_clip_takes_for_granted_is_not_exported_otherwise(tmp_path):
    plain = dataclasses.replace(TINY, vision_heads=1, text_width=64, text_heads=1)
    for way, said in (("LAION's", "activation, but .* gelu"), ("DFN's", "resize, but .* squash")):
        clip = CLIP(dataclasses.replace(plain, **WAYS[way]))
        with pytest.raises(UserError, match=f"own {said}; export it for transformers or open_clip"):
            formats.save_openai(clip, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- full size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "library", "activation", "layers"),
    [
        ("ViT-B/16", "open_clip", "gelu", None),
        ("ViT-B/16", "transformers", "gelu", None),
        ("ViT-B/16", "transformers", "quick_gelu", None),
        ("ViT-L/14", "open_clip", "gelu", None),
        ("ViT-H/14", "open_clip", "gelu", 3),
    ],
)
@torch.no_grad()
def test_logits_of_full_size_are_theirs(name, library, activation, layers, tmp_path):
    """With pictures squashed, and mean and deviation 0.5; of ViT-H/14 few layers."""
    make, theirs, _ = LIBRARIES[library]
    config = dataclasses.replace(CONFIGS[name], activation=activation, resize="squash", **HALF)
    if layers:
        config = dataclasses.replace(config, vision_layers=layers, text_layers=layers)
    make(config, tmp_path)
    images, tokens = pixels(config)[:2], random_tokens(3, config)
    logits, _ = theirs(tmp_path, images, tokens)
    clip = load(tmp_path)
    assert clip.config == config
    assert far(clip(images, tokens), logits) < CLOSE


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_vit_h_14_is_loaded_and_computes(tmp_path):
    """4 GB in float32, 2 of them in the file."""
    config = dataclasses.replace(CONFIGS["ViT-H/14"], activation="gelu")
    with torch.device("meta"):
        empty = CLIP(config)
    state = {n: torch.randn(t.shape).mul_(0.02).half() for n, t in empty.state_dict().items()}
    folder = tmp_path / "folder"
    open_clip_folder(dataclasses.replace(config, vision_layers=1, text_layers=1), folder)
    save_file(to_openai_names(state), folder / "open_clip_model.safetensors")
    del state
    clip = load(folder)
    assert clip.config == config
    assert sum(p.numel() for p in clip.parameters()) == 986_109_441
    logits = clip(torch.randn(1, 3, 224, 224), random_tokens(2, config))
    assert logits.shape == (1, 2)
    assert logits.isfinite().all()
