"""Export a run in a format that other software loads.

python export.py --run DIR --format safetensors OUT.safetensors    CLIP with the new weights, ours
python export.py --run DIR --format openai OUT.safetensors         … for openai-clip
python export.py --run DIR --format huggingface OUT                … for transformers, a folder
python export.py --run DIR --format open_clip OUT                  … for open_clip, a folder
python export.py --run DIR --format peft OUT                       only the LoRA, for peft, a folder
python export.py --run DIR --format classifier OUT.safetensors     a row for each class name
python export.py … --keep-share 0.5                                halfway from zero-shot CLIP
"""

import json
import sys
from pathlib import Path

from clip_min import UserError, weights
from clip_min.errors import unknown
from clip_min.files import new_folder, remove_half_written, write_safetensors, write_text
from clip_min.formats import save_hugging_face, save_open_clip, save_openai
from fewshot.experiment import named, run_script
from fewshot.flags import Parser
from fewshot.run import Run
from fewshot.shares import one_share, shown
from methods import Method
from methods.class_prompts import class_texts
from methods.interop.load import trained
from methods.interop.peft import to_peft
from methods.interop.plain_weights import classifier, merged_clip
from methods.two_stage import TwoStage

MERGED = {
    "safetensors": lambda clip, out, about: weights.save(clip, out, about=about),
    "openai": save_openai,
    "huggingface": save_hugging_face,
    "open_clip": save_open_clip,
}
FILES = ("safetensors", "openai", "classifier")  # the others are folders

# OpenAI's weights with transformers' names, for which a PEFT adapter is made.
HUGGING_FACE = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}

USE = {
    "safetensors": 'clip_min.load("{out}")',
    "openai": 'state = safetensors.torch.load_file("{out}")\n'
    "model = clip.model.build_model(dict(state)).float()  # it rounds to half precision\n"
    "model.load_state_dict(state)  # so once more, in full precision",
    "huggingface": 'transformers.CLIPModel.from_pretrained("{out}")\n'
    'transformers.CLIPProcessor.from_pretrained("{out}")',
    "open_clip": 'open_clip.create_model_from_pretrained("local-dir:{out}")',
    "peft": 'base = transformers.CLIPModel.from_pretrained("{base}")\n'
    'peft.PeftModel.from_pretrained(base, "{out}")',
    "classifier": 'file = safetensors.safe_open("{out}", "pt")\n'
    'names = json.loads(file.metadata()["clip_min"])["classnames"]\n'
    "logits = {logits}",
}
# The logits of a classifier; a linear probe uses image features that are not normalised.
SCALED = 'file.get_tensor("logit_scale") * normalised_image_features @ file.get_tensor("weight").T'
PLAIN = 'image_features @ file.get_tensor("weight").T + file.get_tensor("bias")'


def main() -> None:
    given = parse(sys.argv[1:])
    name, out = given["format"], Path(given["out"])
    if out.exists():
        raise UserError(f"{out}: exists already; choose another place")
    if (out.suffix == ".safetensors") != (name in FILES):
        kind = "a file, NAME.safetensors" if name in FILES else "a folder, without an ending"
        raise UserError(f"{out}: --format {name} writes {kind}; give such a name")
    remove_half_written(out.parent, out.name)  # left by an export that was killed
    run = Run.open(Path(given["run"]))
    model = given.get("model", run.config["experiment"]["model"])
    size = run.config["experiment"].get("image_size", 0)  # missing in old runs
    share = given.get("keep_share")
    method = trained(run, weights.load(model, image_size=size), share=share).eval()
    if "classes" in given:
        names = named(given["classes"])
    elif method.names_unseen:
        names = [name for part in run.config["classnames"].values() for name in part]
    else:
        names = method.classnames
    base = None if size else HUGGING_FACE.get(model)  # which has the size it was trained with
    about, logits = {"classnames": names, **written(method, names)}, SCALED
    about |= {} if share is None else {"keep_share": share}
    if name in MERGED:
        MERGED[name](merged_clip(method), out, about)
        if isinstance(method, TwoStage) and method.in_second:
            print("note: this classifies by prompts only; the learned rows of the base classes are")
            print("      in --format classifier")
    elif name == "peft":
        save_peft(method, out, base, about)
    else:
        logits = save_classifier(run, method, out, about)
    of = "" if share is None else f", keep-share {shown(share)},"
    print(f"{out}: {run.config['method']}{of} as {name}. To use it:")
    base = base or "FOLDER: a zero_shot run exported as huggingface"
    print(USE[name].format(out=out, base=base, logits=logits))


def written(method: Method, names: list[str]) -> dict:
    """The template, or the texts of each class."""
    if prompts := getattr(method.settings, "prompts", None):
        texts = class_texts(names, prompts)
        return {"prompts": dict(zip(names, texts, strict=True))}
    return {"template": "|".join(method.templates)}


def save_peft(method: Method, out: Path, base: str | None, about: dict) -> None:
    tensors, config = to_peft(method)
    header = {"format": "pt", "clip_min": json.dumps(about, ensure_ascii=False)}
    with new_folder(out) as folder:
        write_safetensors(folder / "adapter_model.safetensors", tensors, header)
        text = json.dumps({**config, "base_model_name_or_path": base}, indent=2) + "\n"
        write_text(folder / "adapter_config.json", text)


def save_classifier(run: Run, method: Method, out: Path, about: dict) -> str:
    """Write the tensors of `classifier`, described in the header -> the code that applies them."""
    if about["classnames"] != method.classnames:
        method = method.for_classes(about["classnames"])
    tuned = any(name.startswith("clip.visual.") for name in method.adapter_state())
    tensors = classifier(method)
    logits = PLAIN if "bias" in tensors else SCALED
    header = {
        **about,
        "logits": logits,
        "method": run.config["method"],
        "model": run.config["model"],
        "fingerprint": run.config["fingerprint"],
        "image_tower": "tuned" if tuned else "as it is",
    }
    write_safetensors(out, tensors, {"clip_min": json.dumps(header, ensure_ascii=False)})
    if tuned:
        print("note: the image tower was trained as well; take image features from a merged export")
    return logits


def parse(argv: list[str]) -> dict:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", metavar="DIR", help="a run folder of train.py")
    parser.add_argument("--format", metavar="FORMAT", help="one of the above")
    parser.add_argument("--classes", metavar="NAMES", help='for a classifier: "a,b,c" or a file')
    parser.add_argument(
        "--keep-share",
        metavar="A",
        type=one_share,
        help="interpolate between zero-shot CLIP (0) and the run (1) [1]",
    )
    parser.add_argument("--model", help="the run's model, if it has moved")
    parser.add_argument("out", metavar="OUT", nargs="?", help="new file or folder to write")
    given = parser.parse(argv)
    for name, flag in (("run", "--run DIR"), ("format", "--format FORMAT"), ("out", "OUT")):
        if name not in given:
            raise UserError(f"{flag} is missing; see --help")
    if given["format"] not in USE:
        raise unknown("--format", given["format"], USE)
    if "classes" in given and given["format"] != "classifier":
        raise UserError("--classes: works only with --format classifier; add that, or leave it out")
    return given


if __name__ == "__main__":
    run_script(main)
