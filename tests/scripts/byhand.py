"""A trained run, read from its files and applied without the code that trained it."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import clip_min


def merged_clip(run: Path) -> clip_min.CLIP:
    """The run's CLIP, with s·B·A added to the rows of q and of v of every fused projection."""
    config = json.loads((run / "config.json").read_text())
    settings = config["settings"]
    assert settings["parts"] == "qv"
    clip = clip_min.load(config["model"])
    adapter = load_file(run / "adapter.safetensors")
    for name in [name for name in adapter if name.endswith("lora_A")]:
        tower = "image" if ".visual." in name else "text"
        rank = settings[f"{tower}_rank"]
        scale = settings[f"{tower}_alpha"] / rank
        a, b = adapter[name], adapter[name.replace("lora_A", "lora_B")]
        layer = clip.get_submodule(name.removeprefix("clip.").removesuffix(".lora_A"))
        width = len(layer.weight) // 3
        with torch.no_grad():
            layer.weight[:width] += scale * b[:width] @ a[:rank]
            layer.weight[2 * width :] += scale * b[width:] @ a[rank:]
    return clip


def logits(clip: clip_min.CLIP, files: list[Path], classnames: list[str]) -> torch.Tensor:
    """One picture at a time, (N, K)."""
    tokens = clip_min.tokenize([f"a photo of a {name}." for name in classnames])
    images = [clip_min.crop(Image.open(file), clip.config.image_size) for file in files]
    with torch.no_grad():
        return torch.cat([clip(clip_min.normalize(image)[None], tokens) for image in images])


def accuracy(clip: clip_min.CLIP, folder: Path, classes: list[str]) -> float:
    """Percent of the pictures in folder/CLASS of these classes (folder names) that are right."""
    right = []
    for label, name in enumerate(classes):
        names = [name.replace("-", " ").replace("_", " ") for name in classes]
        best = logits(clip, sorted((folder / name).iterdir()), names).argmax(dim=1)
        right += (best == label).tolist()
    return 100 * sum(right) / len(right)
