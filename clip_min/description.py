"""Find out what a CLIP is: its sizes from its tensors, the rest from the files beside them.

The tensors do not show which activation a model was trained with, how many heads it has, or how its
images were preprocessed. OpenAI's models use QuickGELU, most of LAION's and DataComp's plain GELU.
The wrong one costs some percent of accuracy without any error, so it is read from a description:

    header                    in a file that this code saved
    open_clip_config.json     open_clip's: model_cfg and preprocess_cfg
    config.json               Hugging Face's, with processor_config.json (transformers 5) or
                              preprocessor_config.json

If both of the latter exist, the name of the weights file decides which one counts; a note says if
the other contradicts it. Without a description, OpenAI's values are assumed, with a note. Other
architectures are refused, with the reason.
"""

import functools
import warnings
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from clip_min.errors import Note, UserError
from clip_min.files import parse_json, read_json
from clip_min.model import ACTIVATIONS, CLIPConfig
from clip_min.typed import expect

DEEPEST = 200  # blocks of a tower; the deepest CLIP there is has 64
_TELL_SIZES = {  # tensors that show a CLIP's sizes, and their number of dimensions
    "visual.conv1.weight": 4,
    "visual.positional_embedding": 2,
    "text_projection": 2,
    "positional_embedding": 2,
    "token_embedding.weight": 2,
}
OPEN_CLIP, HUGGING_FACE = "open_clip_config.json", "config.json"
PROCESSORS = ("processor_config.json", "preprocessor_config.json")  # the first counts
UNTOLD = ("activation", "mean", "std", "resize", "interpolation")  # not visible in tensors
# Keys of open_clip's vision_cfg and text_cfg that a plain CLIP may have, and the values allowed.
_PLAIN = {
    **dict.fromkeys(("image_size", "patch_size", "width", "layers", "head_width", "heads")),
    **dict.fromkeys(("context_length", "vocab_size", "patch_dropout", "output_tokens")),
    "mlp_ratio": (4,),
    "pool_type": ("tok", "argmax"),
    "proj_type": ("linear",),
}


def infer_config(state: dict[str, Tensor]) -> CLIPConfig:
    """The sizes of a CLIP, from its tensors (our names). Heads are assumed to be 64 wide.

    KeyError, ValueError: the tensors are not those of a CLIP with a ViT.
    """
    layers = {}
    for tower in ("visual.transformer.resblocks.", "transformer.resblocks."):
        layers[tower] = len({n.split(tower)[1].split(".")[0] for n in state if n.startswith(tower)})
        if not layers[tower]:
            raise KeyError(f"{tower}0")
        if layers[tower] > DEEPEST:  # each would cost time and memory before an error
            raise ValueError(f"has {layers[tower]} blocks {tower}…, expected {DEEPEST} or fewer")
    for name, dims in _TELL_SIZES.items():
        if state[name].dim() != dims or not state[name].numel():
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, expected {dims} dimensions"
            )
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    if grid < 1:
        raise ValueError("visual.positional_embedding has 1 row, expected one more for each patch")
    text_width, embed_dim = state["text_projection"].shape
    hidden = len(state.get("visual.transformer.resblocks.0.mlp.c_fc.bias", range(4 * width)))
    if hidden in (6144, 8192) and hidden != 4 * width:
        raise ValueError(
            f"an MLP of its image tower is {hidden} wide, {hidden / width:.2f} times the tower's "
            "width, as in ViT-g/14 and ViT-bigG/14: another architecture; expected 4 times"
        )
    return CLIPConfig(
        embed_dim=embed_dim,
        image_size=grid * patch_size,
        patch_size=patch_size,
        vision_width=width,
        vision_layers=layers["visual.transformer.resblocks."],
        vision_heads=max(1, width // 64),
        text_width=text_width,
        text_layers=layers["transformer.resblocks."],
        text_heads=max(1, text_width // 64),
        context_length=len(state["positional_embedding"]),
        vocab_size=len(state["token_embedding.weight"]),
    )


def described(config: CLIPConfig, path: Path, header: str | None, known: bool) -> CLIPConfig:
    """`config` of the weights in the file `path`, completed with what the tensors do not show.

    header: the file's own description. known: the model is OpenAI's, so nothing has to be read.
    """
    where, told = f"{path}", {}
    if header is not None:
        where = f"{path}: its header"
        told = parse_json(header, {"vision_heads": int, "text_heads": int}, where)
        expect(told, {"activation": str} if "activation" in told else {}, where)
        told = {k: v for k, v in told.items() if k in (*UNTOLD, "vision_heads", "text_heads")}
        told |= _pictures(told, where)
    elif not known:
        where, told = _beside(config, path)
    config = replace(config, **told)
    if config.activation not in ACTIVATIONS:
        raise UserError(
            f"{where}: the activation is {config.activation!r:.100}, expected "
            f"{' or '.join(ACTIVATIONS)}, the same in both towers; use another model"
        )
    heads, widths = (
        (config.vision_heads, config.text_heads),
        (config.vision_width, config.text_width),
    )
    if any(n < 1 or width % n for n, width in zip(heads, widths, strict=True)):
        raise UserError(
            f"{where}: its numbers of heads, {heads[0]} and {heads[1]}, do not divide the towers' "
            f"widths, {widths[0]} and {widths[1]}; put the description of these weights "
            "there, or none"
        )
    return config


def _beside(config: CLIPConfig, path: Path) -> tuple[str, dict]:
    """The file beside the weights that describes them, and its values; notes name assumptions."""
    found: dict[str, dict] = {}
    for name in descriptions(path.name):
        file, read = path.with_name(name), _open_clip if name == OPEN_CLIP else _hugging_face
        try:
            if (content := plain(file)) is not None:
                found[name] = read(content, config, file)
        except UserError:
            if not found:  # else it is not the one that belongs to these weights
                raise
            _note(f"{file} describes another model; {next(iter(found))} beside it is used")
    pictures = "OpenAI's preprocessing of images is assumed"
    if not found:
        wide = 80 if config.vision_width == 1280 else 64  # ViT-H/14's, and all others'
        told = {"vision_heads": max(1, config.vision_width // wide)}
        alone = not (processor := _processor(path, config.image_size))
        _note(
            f"{path}: no {HUGGING_FACE} or {OPEN_CLIP} beside it describes the model; "
            f"QuickGELU and heads {wide} wide are assumed{'; ' + pictures if alone else ''}; "
            "if that is wrong, put its description beside it"
        )
        return f"{path}", told | processor
    first, *others = found
    for other in others:
        differ = [k for k, v in found[first].items() if found[other].get(k, v) != v]
        if differ:
            _note(
                f"{path}: {first} and {other} beside it differ in {', '.join(differ)}; "
                f"{first} is used, which belongs to this file"
            )
    if "mean" not in found[first]:
        _note(f"{path}: {first} beside it does not describe the preprocessing; {pictures}")
    return f"{path.with_name(first)}", found[first]


def descriptions(weights: str) -> tuple[str, str]:
    """The name of the description that belongs to a weights file, and that of the other."""
    both = (HUGGING_FACE, OPEN_CLIP)
    return both[::-1] if weights.startswith("open_clip") else both


@functools.cache  # one note for each file
def _note(text: str) -> None:
    warnings.warn(text, Note, stacklevel=2)


def plain(file: Path) -> dict | None:
    """The content of open_clip's or Hugging Face's description of a CLIP; None, if it is no such
    description. UserError, if it describes another architecture.
    """
    found, why = read_json(file, "") if file.exists() else {}, ""
    if file.name == HUGGING_FACE:
        kind = found.get("model_type", "clip")
        if kind != "clip":
            why = f"model_type is {kind!r:.100}"
    elif "model_cfg" in found:
        model = found["model_cfg"]
        expect(model, {"vision_cfg": dict, "text_cfg": dict}, str(file), "model_cfg")
        if model.get("multimodal_cfg"):
            why = "it has a multimodal_cfg (CoCa)"
        for part in ("vision_cfg", "text_cfg"):
            for key, value in model[part].items():
                odd = value not in (_PLAIN[key] or (value,)) if key in _PLAIN else bool(value)
                if odd or (key == "layers" and isinstance(value, list)):  # a ResNet
                    why = why or f"{part}.{key} is {value!r:.100}"
    if why:
        raise UserError(
            f"{file}: {why}: another architecture than CLIP with a ViT, which is not supported; "
            "python -m clip_min.weights list shows models that are"
        )
    return found if "vision_config" in found or "model_cfg" in found else None


def _open_clip(found: dict, config: CLIPConfig, file: Path) -> dict:
    model = found["model_cfg"]
    vision, text = {"head_width": 64} | model["vision_cfg"], {"heads": 8} | model["text_cfg"]
    expect(vision, {"head_width": int}, str(file), "model_cfg.vision_cfg")
    expect(text, {"heads": int}, str(file), "model_cfg.text_cfg")
    quick = model.get("quick_gelu", False)
    expect(quick, bool, str(file), "model_cfg.quick_gelu")
    heads, rest = divmod(config.vision_width, vision["head_width"] or config.vision_width + 1)
    told = {
        "activation": "quick_gelu" if quick else "gelu",
        "vision_heads": 0 if rest else heads,
        "text_heads": text["heads"],
    }
    if not isinstance(pictures := found.get("preprocess_cfg"), dict):
        return told
    size = config.image_size
    _only(pictures, file, size=(size, [size, size]), mode=("RGB",))
    asked = pictures | {"resize": pictures.get("resize_mode")}
    if pictures.get("interpolation") == "random":  # in training
        del asked["interpolation"]
    return told | _pictures(asked, str(file))


def _hugging_face(found: dict, config: CLIPConfig, file: Path) -> dict:
    expect(found, {"vision_config": dict, "text_config": dict}, str(file))
    acts: list[str] = []
    told: dict = {}
    for tower, heads in (("vision", 12), ("text", 8)):
        part: dict = {  # the values of transformers, if it has none
            "hidden_act": "quick_gelu",
            "num_attention_heads": heads,
            "layer_norm_eps": 1e-5,
        }
        more = found.get(f"{tower}_config_dict") or {}
        expect(more, dict, str(file), f"{tower}_config_dict")
        part |= found[f"{tower}_config"] | more
        kind = {"hidden_act": str, "num_attention_heads": int, "layer_norm_eps": float}
        expect(part, kind, str(file), f"{tower}_config")
        _only(part, file, layer_norm_eps=(1e-5,))
        told[f"{tower}_heads"] = part["num_attention_heads"]
        acts.append(part["hidden_act"])
    told["activation"] = acts[0] if acts[0] == acts[1] else " and ".join(acts)
    return told | _processor(file, config.image_size)


def _processor(beside: Path, size: int) -> dict:
    """The preprocessing of images in Hugging Face's file beside another, if there is one."""
    new, old = map(beside.with_name, PROCESSORS)
    file, content = new, read_json(new, "").get("image_processor") if new.exists() else None
    if not isinstance(content, dict):
        if not old.exists():
            return {}
        file, content = old, read_json(old, "")
    found = {"size": size, "do_center_crop": True} | content
    short, whole = (size, {"shortest_edge": size}), {"height": size, "width": size}
    _only(found, file, do_resize=(True,), do_rescale=(True,), do_normalize=(True,))
    _only(found, file, size=(*short, whole), resample=(2, 3))
    if "rescale_factor" in found:
        expect(found, {"rescale_factor": float}, str(file))
        found["rescale_factor"] = round(255 * found["rescale_factor"], 4)
        _only(found, file, rescale_factor=(1,))
    if found["size"] in short:
        _only(found, file, do_center_crop=(True,))
    if found["do_center_crop"]:
        _only(found, file, crop_size=(size, whole))
    asked = {"mean": found.get("image_mean"), "std": found.get("image_std")}
    asked["resize"] = "shortest" if found["size"] in short else "squash"
    asked["interpolation"] = "bilinear" if found.get("resample") == 2 else "bicubic"  # Pillow's 3
    return _pictures(asked, str(file))


def _only(found: dict, file: Path, **allowed: tuple) -> None:
    """UserError, if a key is present with a value that is not supported here."""
    for key, values in allowed.items():
        if found.get(key, values[0]) not in values:
            raise UserError(
                f"{file}: {key} is {found[key]!r:.100}, but this code supports only "
                f"{' or '.join(map(str, values))}: features would be wrong; use other weights"
            )


def _pictures(told: dict, where: str) -> dict:
    """mean and std of three channels, and the resizing, checked; OpenAI's value instead of None."""
    asked: dict = {key: told.get(key) for key in UNTOLD[1:]}
    for key in ("mean", "std"):
        if asked[key] is None:
            asked[key] = getattr(CLIPConfig, key)
        elif not isinstance(asked[key], list):
            asked[key] = [asked[key]] * 3
        expect([*asked[key]], list[float], where, key)
        if len(asked[key]) != 3 or (key == "std" and min(asked[key]) <= 0):
            raise UserError(
                f"{where}: {key} is {asked[key]!r:.100}, expected three numbers above 0"
            )
        own = getattr(CLIPConfig, key)
        rounded = [round(x, 3) for x in asked[key]] == [round(x, 3) for x in own]
        asked[key] = own if rounded else tuple(asked[key])
    for key, known in (
        ("resize", ("shortest", "squash")),
        ("interpolation", ("bicubic", "bilinear")),
    ):
        asked[key] = asked[key] or getattr(CLIPConfig, key)
        if asked[key] not in known:
            raise UserError(
                f"{where}: {key} is {asked[key]!r:.100}, but this code supports only "
                f"{' or '.join(known)}: features would be wrong; use other weights"
            )
    return asked
