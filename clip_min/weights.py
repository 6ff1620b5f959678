"""Weights: files -> a CLIP, and back.

    load("demo")               the small CLIP that ships with this package
    load("ViT-B/16")           OpenAI's weights, by name (see hub.py)
    load("ViT-B-16.pt")        OpenAI's own file: TorchScript archive or state dict, sha256 checked
    load("model.safetensors")  with OpenAI's, Hugging Face's or open_clip's names
    load("folder")             the weights in a folder of Hugging Face or open_clip

    python -m clip_min.weights convert IN OUT.safetensors
    python -m clip_min.weights list                         models of the hub that are known to work

The activation and the preprocessing come from a description beside the weights (description.py).

Loading is strict: a missing, unexpected or misshapen tensor is an error that names the tensor, and
so are NaN and infinity. No code in a `.pt` file is ever run (see pickled.py).
"""

import argparse
import hashlib
import io
import json
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_min.description import UNTOLD, described, infer_config
from clip_min.errors import UserError, is_bug, told
from clip_min.files import read_safetensors, remove_half_written, sha256_of, write_safetensors
from clip_min.hub import DEMO, HUB, KNOWN, OPENAI_SHA256, SUFFIXES, locate
from clip_min.model import CLIP, CONFIGS, CLIPConfig
from clip_min.names import to_our_names
from clip_min.pickled import read_pickled

# -------------------------------------------------------------------------------------------- load


def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    image_size: int = 0,
) -> CLIP:
    """A CLIP with weights, in eval mode. `name_or_path`: see the top of this file.

    image_size: side in pixels of the images to read, a multiple of the patch size; the positional
    embedding is resized to it. 0: the size the model was trained with.
    """
    if str(name_or_path) == "demo":  # whose names are ours, and whose sizes are known
        state, config = read_safetensors(DEMO)[0], CONFIGS["demo"]
        state = {name: tensor.to(device, dtype, copy=True) for name, tensor in state.items()}
    else:
        state, config = read(name_or_path, device, dtype)
    with torch.device("meta"):  # shapes only: no time or memory for an initialisation
        clip = CLIP(config)
    problems = []
    try:
        clip.load_state_dict(state, assign=True)
    except RuntimeError:  # which says so in many lines
        problems = mismatches(state, clip.state_dict())
    problems += [
        f"{name} is {tensor.dtype}, expected floating point"  # quantised, say
        for name, tensor in state.items()
        if not tensor.is_floating_point()
    ]
    problems = problems or [
        f"{name} has NaN or infinity"
        for name, tensor in state.items()
        if not torch.stack(tensor.aminmax()).isfinite().all()
    ]
    if problems:
        shown = "; ".join(problems[:20]) + (
            f"; and {len(problems) - 20} more" * (len(problems) > 20)
        )
        raise UserError(f"{name_or_path}: not the weights of one CLIP (ViT): {shown}")
    if image_size not in (0, config.image_size):
        if image_size < 1 or image_size % config.patch_size:
            raise UserError(
                f"{name_or_path}: cannot read images of {image_size} pixels; give a multiple of "
                f"its patch size, {config.patch_size}"
            )
        positions = state["visual.positional_embedding"]
        grid = image_size // config.patch_size
        state["visual.positional_embedding"] = resized(positions, grid)
        with torch.device("meta"):
            clip = CLIP(replace(config, image_size=image_size))
        clip.load_state_dict(state, assign=True)
    return clip.eval()


def resized(positions: Tensor, grid: int) -> Tensor:
    """Resize a positional embedding (1 + g·g, D) -> (1 + grid·grid, D), as open_clip does.

    On the CPU and in float64, so that the result, and with it the fingerprint, depends neither on
    the device nor on the processor.
    """
    rows = round((len(positions) - 1) ** 0.5)  # g
    patches = positions[1:].cpu().double().unflatten(0, (rows, rows)).permute(2, 0, 1)  # (D, g, g)
    patches = F.interpolate(
        patches[None], (grid, grid), mode="bicubic", antialias=True, align_corners=False
    )[0]  # (D, grid, grid)
    # No value may be halfway between two of float32: it would be rounded by chance.
    patches *= 1 + 2**-40
    return torch.cat([positions[:1], patches.flatten(1).T.to(positions)])


def mismatches(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """A sentence for each tensor that is missing, unexpected or misshapen; empty if all fit."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    return problems + [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]


def save(
    clip: CLIP,
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    about: dict | None = None,
) -> None:
    """Write a CLIP as safetensors with our names; its config and `about` go into the header."""
    state = {name: tensor.to(dtype) for name, tensor in clip.state_dict().items()}
    header = json.dumps(asdict(clip.config) | (about or {}), ensure_ascii=False)
    write_safetensors(path, state, {"clip_min": header})


def read(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], CLIPConfig]:
    """The tensors of a model under our names, and its config.

    Each tensor is cast when it is read, so that memory holds the model once, in this precision.
    """
    path = locate(str(name_or_path))
    metadata: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    mapped = path.suffix == ".safetensors"
    if mapped:
        tensors, metadata = read_safetensors(path)
    elif path.suffix in SUFFIXES:
        tensors = _read_torch(path)
    else:
        raise UserError(f"{path}: is a {path.suffix!r} file; give .safetensors, .pt, .pth or .bin")

    def take(name: str) -> Tensor:
        if mapped and tensors[name].nbytes > 1e6:  # a new mapping, freed after the copy
            return read_safetensors(path, name)[0][name]
        return tensors[name] if mapped else tensors.pop(name)

    largest_first = sorted(tensors, key=lambda name: tensors[name].numel(), reverse=True)
    try:
        for name, tensor in to_our_names(largest_first, take):
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            state[name] = tensor.to(device, kind, copy=mapped)
        config = infer_config(state)
    except KeyError as missing:
        raise UserError(
            f"{path}: not a CLIP (ViT) with OpenAI's, Hugging Face's or open_clip's names: "
            f"no tensor {missing}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    known = str(name_or_path) in HUB or path.name in OPENAI_SHA256
    return state, described(config, path, metadata.get("clip_min"), known)


def fingerprint(module: nn.Module) -> str:
    """A short sha256 of a model, to check that an adapter is used with the model it was made for.

    It covers all weights and, for a CLIP, what the weights do not show and differs from OpenAI's:
    the activation, say. (Most models therefore keep the fingerprint that they had when it covered
    only the weights.) It is computed once, and stored on the module until a tensor is changed or
    replaced.
    """
    state, config = sorted(module.state_dict().items()), getattr(module, "config", None)
    tracked = not any(tensor.is_inference() for _, tensor in state)  # else changes are not counted
    now = (config, [(name, t.data_ptr(), t._version) for name, t in state]) if tracked else None
    seen, found = module.__dict__.get("_fingerprint", (None, ""))
    if now is None or now != seen:
        digest = hashlib.sha256()
        if isinstance(module, CLIP):
            config = module.config
            usual = {key: getattr(CLIPConfig, key) for key in UNTOLD}
            heads = [max(1, width // 64) for width in (config.vision_width, config.text_width)]
            if replace(config, vision_heads=heads[0], text_heads=heads[1], **usual) != config:
                every = asdict(config).items()  # less newer fields that have the old value
                told = {k: v for k, v in every if k not in usual or v != usual[k]}
                digest.update(repr(told).encode())
        for name, tensor in state:
            digest.update(name.encode())
            digest.update(tensor.to("cpu", torch.float32).contiguous().numpy().data)
        found = digest.hexdigest()[:16]
        module.__dict__["_fingerprint"] = now, found
    return found


def _read_torch(path: Path) -> dict[str, Tensor]:
    """OpenAI's TorchScript archive, or a state dict, possibly inside a training checkpoint."""
    expected = OPENAI_SHA256.get(path.name)
    if expected is not None:
        found = sha256_of(path)
        if found != expected:
            raise UserError(
                f"{path}: sha256 is {found[:16]}…, but OpenAI's {path.name} has {expected[:16]}…; "
                "download it again (or rename the file, if these are your own weights)"
            )
    state = read_pickled(path)
    if isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds {type(state).__name__}, expected a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: holds {type(tensor).__name__} under {name!r}, expected a dictionary of "
                "names and tensors"
            )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def model_name(config: CLIPConfig) -> str:
    """The name of a known size ("ViT-B/16"), or "custom"."""
    sizes = replace(config, **{key: getattr(CLIPConfig, key) for key in UNTOLD})
    return next((name for name, known in CONFIGS.items() if known == sizes), "custom")


# ----------------------------------------------------------------------------------------- convert


def listed() -> str:
    """The table of known models, with published zero-shot accuracies in percent."""
    rows = [["--model", "size", "activation", "licence", "Flowers102", "ImageNet"]]
    rows += [[*known[:4], *(f"{figure:.2f}" for figure in known[4:])] for known in KNOWN]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see python -m clip_min.weights --help")


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(
        prog="python -m clip_min.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="any supported file -> safetensors, our names")
    convert.add_argument("source", metavar="IN", help="a model's name, a .pt or .safetensors file")
    convert.add_argument("target", metavar="OUT.safetensors", help="the file to write")
    commands.add_parser("list", help="list models of the hub that are known to work")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may hold bytes that are not text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = parser.parse_args(argv)
        if arguments.command == "list":
            print(listed())
            return 0
        target = Path(arguments.target)
        if target.suffix != ".safetensors":
            raise UserError(f"{target}: the output is a .safetensors file; give it that suffix")
        if target.exists():
            raise UserError(f"{target}: exists already; choose another place, or remove it")
        with warnings.catch_warnings(record=True) as notes:
            clip = load(arguments.source)
        remove_half_written(target.parent, target.name)
        save(clip, target)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        if is_bug(error):
            raise
        print(f"error: {told(error)}", file=sys.stderr)
        return 2
    for note in notes:
        print(f"note: {note.message}")
    count = sum(parameter.numel() for parameter in clip.parameters())
    print(f"{target}: {model_name(clip.config)}, {count:,} parameters, float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
