"""What a CLIP is: read off its tensors, and off the description beside them.

Which activation a model was trained with, no tensor tells, nor how many heads it has. Everything
here computes QuickGELU, as all of OpenAI's models do; many of open_clip's own (LAION's and
DataComp's ViT-B/16, say) were trained with plain GELU. So the description beside the weights is
read, if there is one (Hugging Face's config.json, open_clip's open_clip_config.json): it tells the
heads, and GELU in it is an error, as is another way to prepare pictures (in preprocess_cfg or
preprocessor_config.json). Of a file that lies alone, heads are taken to be 64 wide, and the
activation, with a warning, to be QuickGELU: open_clip's name for weights trained with GELU has no
"-quickgelu" and is not tagged "openai".
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from clip_min.errors import Note, UserError
from clip_min.files import parse_json, read_json
from clip_min.hub import OPENAI_SHA256
from clip_min.model import CLIPConfig
from clip_min.preprocess import MEAN, STD
from clip_min.typed import expect

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

    for name, dims in _TELL_SIZES.items():
        if state[name].dim() != dims or not state[name].numel():
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, expected {dims} dimensions"
            )
    layers = {}
    for tower in ("visual.transformer.resblocks.", "transformer.resblocks."):
        layers[tower] = len({n.split(tower)[1].split(".")[0] for n in state if n.startswith(tower)})
        if not layers[tower]:
            raise KeyError(f"{tower}0")
        if layers[tower] > DEEPEST:  # each costs time and memory before a tensor is missed
            raise ValueError(f"has {layers[tower]} blocks {tower}…, expected {DEEPEST} or fewer")
    vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    text_width, embed_dim = state["text_projection"].shape
    return CLIPConfig(
        embed_dim=embed_dim,
        image_size=grid * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=layers["visual.transformer.resblocks."],
        vision_heads=max(1, vision_width // 64),
        text_width=text_width,
        text_layers=layers["transformer.resblocks."],
        text_heads=max(1, text_width // 64),
        context_length=len(state["positional_embedding"]),
        vocab_size=len(state["token_embedding.weight"]),
    )


def described(config: CLIPConfig, path: Path, header: str | None, known: bool) -> CLIPConfig:
    """`config` with the heads that the file's own header tells, or else a description beside it.

    known: the file is one of OpenAI's, so that there is nothing to be told.
    """
    vision, text, where = config.vision_heads, config.text_heads, f"{path}"
    if header is not None:
        where = f"{path}: its header"
        saved = parse_json(header, {"vision_heads": int, "text_heads": int}, where)
        vision, text = saved["vision_heads"], saved["text_heads"]
    elif not known:
        vision, text, where = _beside(config, path)
    for heads, width in ((vision, config.vision_width), (text, config.text_width)):
        if heads < 1 or width % heads:
            raise UserError(
                f"{where}: its numbers of heads, {vision} and {text}, do not divide the towers' "
                f"widths, {config.vision_width} and {config.text_width}; give the file that "
                "belongs to these weights, or none"
            )
    return replace(config, vision_heads=vision, text_heads=text)


def _beside(config: CLIPConfig, path: Path) -> tuple[int, int, str]:
    """Heads of the towers, and where that is told: in a file beside the weights, if there is one.

    UserError, if the description is of what cannot be computed here.
    """
    heads, where = (config.vision_heads, config.text_heads), f"{path}"
    known = path.name in OPENAI_SHA256
    for file in (path.with_name("config.json"), path.with_name("open_clip_config.json")):
        found = read_json(file, "") if file.exists() else {}
        if "vision_config" in found:  # Hugging Face's; what it leaves out is OpenAI's
            own = {"vision": config.vision_heads, "text": config.text_heads}
            towers = {f"{t}_config": dict for t in own}
            expect(found, towers, str(file))
            parts = []
            for tower in own:
                part = {"hidden_act": "quick_gelu", "num_attention_heads": own[tower]}
                parts.append(part | found[f"{tower}_config"])
                kind = {"hidden_act": str, "num_attention_heads": int}
                expect(parts[-1], kind, str(file), f"{tower}_config")
            heads = tuple(part["num_attention_heads"] for part in parts)
            quick = all(part["hidden_act"] == "quick_gelu" for part in parts)
        elif "model_cfg" in found:
            model = found["model_cfg"]
            expect(model, {"vision_cfg": dict, "text_cfg": dict}, str(file), "model_cfg")
            vision = {"head_width": 64} | model["vision_cfg"]
            text = {"heads": 8} | model["text_cfg"]
            expect(vision, {"head_width": int}, str(file), "model_cfg.vision_cfg")
            expect(text, {"heads": int}, str(file), "model_cfg.text_cfg")
            quick = model.get("quick_gelu", False)
            width = vision["head_width"]
            heads = config.vision_width // width if width else 0, text["heads"]
        else:  # of something else
            continue
        if quick is not True:
            raise UserError(
                f"{path}: was trained with GELU, says {file.name} beside it, and CLIP computes "
                "QuickGELU here, as OpenAI's do: its features would be wrong; take other weights"
            )
        known, where = True, f"{file}"
    if not known:
        warnings.warn(
            f"{path}: no config.json or open_clip_config.json beside it says how it was trained; "
            "QuickGELU and heads 64 wide are assumed, as OpenAI's models have them",
            Note,
            stacklevel=1,  # so that it is said once for a file
        )
    _check_transform(path, config.image_size)
    return *heads, where


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
