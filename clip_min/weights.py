"""Weights: where a CLIP comes from.

    load("demo")               the small CLIP that ships with this package
    load("ViT-B/16")           OpenAI's weights from the Hugging Face hub, cached where it caches
    load("ViT-B-16.pt")        OpenAI's own file: TorchScript archive or state dict, sha256 checked
    load("model.safetensors")  OpenAI's, Hugging Face's or open_clip's names, told by the keys
    load("folder")             the weights in a folder of Hugging Face's or open_clip's

    python -m clip_min.weights convert IN OUT.safetensors

Which activation a model was trained with, no tensor tells, nor how many heads it has. Everything
here computes QuickGELU, as all of OpenAI's models do; many of open_clip's own (LAION's and
DataComp's ViT-B/16, say) were trained with plain GELU. So the description beside the weights is
read, if there is one (Hugging Face's config.json, open_clip's open_clip_config.json): it tells the
heads, and GELU in it is an error, as is another way to prepare pictures (in preprocess_cfg or
preprocessor_config.json). Of a file that lies alone, heads are taken to be 64 wide, and the
activation, with a warning, to be QuickGELU: open_clip's name for weights trained with GELU has no
"-quickgelu" and is not tagged "openai".

Loading is strict: a missing, unexpected or misshapen tensor is an error that names it, as are NaN
and infinity. Nothing that stands in a `.pt` file is run, be it a state dict or a TorchScript
archive (see pickled.py).
"""

import argparse
import hashlib
import io
import json
import re
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_min.errors import FROM_OUTSIDE, Note, UserError, first_line, told
from clip_min.files import (
    parse_json,
    read_json,
    read_safetensors,
    remove_half_written,
    sha256_of,
    write_safetensors,
)
from clip_min.model import CLIP, CONFIGS, CLIPConfig
from clip_min.names import to_our_names
from clip_min.pickled import read_pickled
from clip_min.preprocess import MEAN, STD
from clip_min.typed import expect

TOWERS = ("vision", "text")
# How the file of weights is called in a folder of open_clip's or Hugging Face's.
IN_FOLDERS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
DEMO = Path(__file__).parent / "assets" / "demo.safetensors"

# OpenAI's weights in safetensors form (open_clip's names), as open_clip itself fetches them: where,
# at which revision, and the file's sha256, as several unrelated public projects pin them.
HUB_FILE = "open_clip_model.safetensors"
HUB = {
    "ViT-B/32": (
        "timm/vit_base_patch32_clip_224.openai",
        "a6f597a30f7b82c51704746581f9a4e41421e878",
        "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31",
    ),
    "ViT-B/16": (
        "timm/vit_base_patch16_clip_224.openai",
        "977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
        "4b8699299b1e8997753c64b052ba32031449d5d853f55a039148560ee02b820f",
    ),
    "ViT-L/14": (
        "timm/vit_large_patch14_clip_224.openai",
        "18d0535469bb561bf468d76c1d73aa35156c922b",
        "9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e",
    ),
    "ViT-L/14@336px": (
        "timm/vit_large_patch14_clip_336.openai",
        "81e38efc4637de5023b10e75a7f9bd1c6fa6b010",
        "fbc415c3d0d7b79faed8f5ccfb740c32b7c4f5ffe7283b851f89c6231c01a8e0",
    ),
}

# sha256 of OpenAI's files, as published in their download addresses.
OPENAI_SHA256 = {
    "ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14.pt": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336px.pt": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}

# -------------------------------------------------------------------------------------------- load


def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CLIP:
    """A CLIP with weights, in eval mode. `name_or_path`: see the top of this file."""
    state, config = read(name_or_path)
    with torch.device("meta"):  # shapes only: no time or memory for an initialisation
        clip = CLIP(config)
    expected = clip.state_dict()
    problems = mismatches(state, expected)
    problems += [
        f"{name} is {tensor.dtype}, expected floating point"  # quantised, say
        for name, tensor in state.items()
        if not tensor.is_floating_point()
    ]
    if not problems:
        state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
        problems = [f"{n} has NaN or infinity" for n, t in state.items() if not t.isfinite().all()]
    if problems:
        shown = "; ".join(problems[:20]) + (
            f"; and {len(problems) - 20} more" * (len(problems) > 20)
        )
        raise UserError(f"{name_or_path}: not the weights of one CLIP (ViT): {shown}")
    clip.load_state_dict(state, assign=True)
    return clip.eval()


def mismatches(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Every tensor that is missing, unexpected or misshapen, in words; empty if all fit."""
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
    """Write a CLIP as safetensors under our names, its sizes and `about` in the header; whole or
    not at all.
    """
    state = {name: tensor.to(dtype) for name, tensor in clip.state_dict().items()}
    header = json.dumps(asdict(clip.config) | (about or {}), ensure_ascii=False)
    write_safetensors(path, state, {"clip_min": header})


def read(name_or_path: str | Path) -> tuple[dict[str, Tensor], CLIPConfig]:
    """The tensors of a model under our names, and the sizes they imply."""
    path = _locate(str(name_or_path))
    metadata = {}
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
    elif path.suffix in (".pt", ".pth", ".bin"):
        state = _read_torch(path)
    else:
        raise UserError(f"{path}: weights are .safetensors, .pt, .pth or .bin, not {path.suffix!r}")
    try:
        state = to_our_names(state)
        config = infer_config(state)
    except KeyError as missing:
        raise UserError(
            f"{path}: not a CLIP (ViT) in OpenAI's, Hugging Face's or open_clip's naming: "
            f"no tensor {missing}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if "clip_min" in metadata:  # the number of heads leaves no trace in the tensors' shapes
        here = f"{path}: its header"
        saved = parse_json(metadata["clip_min"], {"vision_heads": int, "text_heads": int}, here)
        config = _with_heads(config, saved["vision_heads"], saved["text_heads"], here)
    elif str(name_or_path) not in HUB:
        config = _described(path, config)
    return state, _with_heads(config, config.vision_heads, config.text_heads, str(path))


def _with_heads(config: CLIPConfig, vision: int, text: int, where: str) -> CLIPConfig:
    for heads, width in ((vision, config.vision_width), (text, config.text_width)):
        if heads < 1 or width % heads:
            raise UserError(
                f"{where}: its numbers of heads, {vision} and {text}, do not divide the towers' "
                f"widths, {config.vision_width} and {config.text_width}; give the file that "
                "belongs to these weights, or none"
            )
    return replace(config, vision_heads=vision, text_heads=text)


def _described(path: Path, config: CLIPConfig) -> CLIPConfig:
    """`config` with the heads that a description beside the file tells, if there is one."""
    known = path.name in OPENAI_SHA256
    for file in (path.with_name("config.json"), path.with_name("open_clip_config.json")):
        found = read_json(file, "") if file.exists() else {}
        if "vision_config" in found:  # Hugging Face's; what it leaves out is OpenAI's
            own = {"vision": config.vision_heads, "text": config.text_heads}
            towers = {f"{t}_config": dict for t in TOWERS}
            expect(found, towers, str(file))
            acts, heads = [], []
            for tower in TOWERS:
                part = {"hidden_act": "quick_gelu", "num_attention_heads": own[tower]}
                part |= found[f"{tower}_config"]
                kind = {"hidden_act": str, "num_attention_heads": int}
                expect(part, kind, str(file), f"{tower}_config")
                acts.append(part["hidden_act"])
                heads.append(part["num_attention_heads"])
            quick = set(acts) == {"quick_gelu"}
        elif "model_cfg" in found:
            model = found["model_cfg"]
            expect(model, {"vision_cfg": dict, "text_cfg": dict}, str(file), "model_cfg")
            vision = {"head_width": 64} | model["vision_cfg"]
            text = {"heads": 8} | model["text_cfg"]
            expect(vision, {"head_width": int}, str(file), "model_cfg.vision_cfg")
            expect(text, {"heads": int}, str(file), "model_cfg.text_cfg")
            quick = model.get("quick_gelu", False)
            width = vision["head_width"]
            heads = [config.vision_width // width if width else 0, text["heads"]]
        else:  # of something else
            continue
        if quick is not True:
            raise UserError(
                f"{path}: was trained with GELU, says {file.name} beside it, and CLIP computes "
                "QuickGELU here, as OpenAI's do: its features would be wrong; take other weights"
            )
        config, known = _with_heads(config, *heads, str(file)), True
    if not known:
        warnings.warn(
            f"{path}: no config.json or open_clip_config.json beside it says how it was trained; "
            "QuickGELU and heads 64 wide are assumed, as OpenAI's models have them",
            Note,
            stacklevel=1,  # so that it is said once for a file
        )
    _check_transform(path, config.image_size)
    return config


def _check_transform(path: Path, size: int) -> None:
    """UserError, if a file beside the weights says that pictures are prepared in another way."""
    # What may stand there for what preprocess.py does; `resample` 3 is Pillow's bicubic.
    own = {
        **dict.fromkeys(("mean", "image_mean"), (MEAN,)),
        **dict.fromkeys(("std", "image_std"), (STD,)),
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
        "interpolation": ("bicubic",),
        "resample": (3,),
        "resize_mode": ("shortest",),
        "size": (size, (size, size), {"shortest_edge": size}),
        "crop_size": (size, {"height": size, "width": size}),
    }
    for name in ("open_clip_config.json", "preprocessor_config.json"):
        file = path.with_name(name)
        told = read_json(file, "") if file.exists() else {}
        told = told.get("preprocess_cfg") if name == "open_clip_config.json" else told
        for key, value in told.items() if isinstance(told, dict) else ():
            if key in own and _rounded(value) not in _rounded(own[key]):
                raise UserError(
                    f"{file}: {key} is {value}, but here pictures are prepared as CLIP does it, "
                    f"with {own[key][0]}: its features would be wrong; take other weights"
                )


def _rounded(value):
    """A JSON value with three digits of every float, and no tuples."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 3))


def fingerprint(module: nn.Module) -> str:
    """A short sha256 of a model: tells whether an adapter meets the one it was made for.

    It covers all weights and, of a CLIP, all of the config that they do not tell by themselves: the
    number of heads where they are not 64 wide, say. (So most models have the fingerprint that they
    had when it covered the weights alone.)
    """
    digest = hashlib.sha256()
    if isinstance(module, CLIP) and module.config != infer_config(module.state_dict()):
        digest.update(repr(asdict(module.config)).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------- where it comes from


def check(name: str) -> None:
    """UserError, unless there is such a model; nothing is read or downloaded."""
    if name not in ("demo", *HUB):
        _file(name)


def _locate(name: str) -> Path:
    """The local file behind a name or path; OpenAI's names are fetched from the hub."""
    if name == "demo":
        return DEMO
    if name in HUB:
        return _download(name)
    return _file(name)


def _file(name: str) -> Path:
    """A weights file, or the one in a folder as Hugging Face and open_clip lay it out."""
    path = Path(name).expanduser()
    inside = (path / file for file in IN_FOLDERS)
    found = next((file for file in (path, *inside) if file.is_file()), None)
    if found is None:
        known = ", ".join(["demo", *HUB])
        raise UserError(
            f"{name}: neither a weights file nor a folder with {' or '.join(IN_FOLDERS)}, nor a "
            f"known model; models are {known}"
        )
    return found


def _download(name: str) -> Path:
    """The file in the hub's cache; fetched first, if it is not there."""
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.utils import HfHubHTTPError

    repo, revision, sha256 = HUB[name]
    advice = (
        f"or give a file: --model path/to/{re.sub('[/@]', '-', name)}.pt; --model demo, which has "
        "never seen a photo, is there to try things"
    )
    try:
        path = try_to_load_from_cache(repo, HUB_FILE, revision=revision)
        if not isinstance(path, str):
            url = hf_hub_url(repo, HUB_FILE, revision=revision)
            try:  # once: the download itself would knock for half a minute at a closed door
                get_hf_file_metadata(url)
            except HfHubHTTPError:
                raise
            except Exception as error:
                raise UserError(
                    f"{name}: {repo} is not in the hub's cache and the hub cannot be reached "
                    f"({first_line(error)}); connect once to download it, {advice}"
                ) from None
            path = hf_hub_download(repo, HUB_FILE, revision=revision)
    except UserError:
        raise
    except Exception as error:  # refused, cut off, no room: types of three libraries
        status = getattr(getattr(error, "response", None), "status_code", None)
        login = "log in with `hf auth login`, " if status in (401, 403) else ""
        raise UserError(
            f"{name}: {repo}/{HUB_FILE} could not be downloaded ({first_line(error)}); "
            f"{login}{advice}"
        ) from None
    found = sha256_of(path)
    if found != sha256:
        raise UserError(
            f"{path}: sha256 is {found[:16]}…, but {repo} has {sha256[:16]}…; delete this file, "
            "and it is downloaded again"
        )
    return Path(path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    """OpenAI's TorchScript archive, or a state dict, possibly inside a training checkpoint."""
    expected = OPENAI_SHA256.get(path.name)
    if expected is not None:
        found = sha256_of(path)
        if found != expected:
            raise UserError(
                f"{path}: sha256 is {found[:16]}…, but OpenAI's {path.name} has {expected[:16]}…; "
                "download it again (or rename the file, if these are weights of your own)"
            )
    state = read_pickled(path)
    if isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds {type(state).__name__}, expected a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: holds {type(tensor).__name__} under {name!r}, expected tensors under "
                "their names"
            )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------- sizes

DEEPEST = 200  # blocks of a tower; the deepest CLIP there is has 64
_TELL_SIZES = {  # what the sizes of a CLIP are read off, and how many dimensions it has
    "visual.conv1.weight": 4,
    "visual.positional_embedding": 2,
    "text_projection": 2,
    "positional_embedding": 2,
    "token_embedding.weight": 2,
}


def infer_config(state: dict[str, Tensor]) -> CLIPConfig:
    """The sizes of a CLIP, read off its tensors (our names). Heads: 64 wide, as OpenAI's are."""

    def layers(prefix: str) -> int:
        blocks = {n.removeprefix(prefix).split(".")[0] for n in state if n.startswith(prefix)}
        if not blocks:
            raise KeyError(prefix + "0")
        if len(blocks) > DEEPEST:  # each costs time and memory before a tensor is missed
            raise ValueError(f"has {len(blocks)} blocks {prefix}…, expected {DEEPEST} or fewer")
        return len(blocks)

    for name, dims in _TELL_SIZES.items():
        if state[name].dim() != dims or not state[name].numel():
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, expected {dims} dimensions"
            )
    vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    text_width, embed_dim = state["text_projection"].shape
    return CLIPConfig(
        embed_dim=embed_dim,
        image_size=grid * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=layers("visual.transformer.resblocks."),
        vision_heads=max(1, vision_width // 64),
        text_width=text_width,
        text_layers=layers("transformer.resblocks."),
        text_heads=max(1, text_width // 64),
        context_length=len(state["positional_embedding"]),
        vocab_size=len(state["token_embedding.weight"]),
    )


def model_name(config: CLIPConfig) -> str:
    """The name of a known size ("ViT-B/16"), or "custom"."""
    return next((name for name, known in CONFIGS.items() if known == config), "custom")


# ----------------------------------------------------------------------------------------- convert


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
    convert.add_argument("source", metavar="IN", help="a name, .pt or .safetensors")
    convert.add_argument("target", metavar="OUT.safetensors", help="a new file")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = parser.parse_args(argv)
        target = Path(arguments.target)
        if target.suffix != ".safetensors":
            raise UserError(f"{target}: the output is a .safetensors file; name it so")
        if target.exists():
            raise UserError(f"{target}: is there already; choose another place, or remove it")
        with warnings.catch_warnings(record=True) as notes:
            clip = load(arguments.source)
        remove_half_written(target.parent, target.name)
        save(clip, target)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    except (UserError, *FROM_OUTSIDE) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 2
    for note in notes:
        print(f"note: {note.message}")
    count = sum(parameter.numel() for parameter in clip.parameters())
    print(f"{target}: {model_name(clip.config)}, {count:,} parameters, float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
