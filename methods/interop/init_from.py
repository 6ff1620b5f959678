"""Start from an adapter made elsewhere: `train.py --init-from PATH`.

    our own          a run folder of any method: config.json and adapter.safetensors
    PEFT             a folder: adapter_config.json and adapter_model.safetensors, made on
                     `transformers.CLIPModel`
    CLIP-LoRA        a .pt file of github.com/MaxZanella/CLIP-LoRA: {"weights", "metadata"}
    loralib          a .pt or .safetensors file of `loralib.MergedLinear` tensors on OpenAI's names

The LoRA formats hold the same correction s·B·A; fused.py stacks q, k and v where they are separate.
Shapes show neither s nor which parts a stack holds. If the file says so, its settings must equal
those of the method that continues from it.
"""

from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from clip_min import UserError, weights
from fewshot.run import Run
from methods.base import Method
from methods.interop.clip_lora import read_file
from methods.interop.fused import OUR_TOWER, tower_depths
from methods.interop.load import described
from methods.interop.peft import read_peft
from methods.lora import LoRA, block_numbers

# Settings that change what tensors mean, beyond their shapes.
MEANING = ["image_rank", "image_alpha", "text_rank", "text_alpha", "parts", "towers", "blocks"]
MEANING += ["scaling", "n_ctx", "position", "class_specific", "first_block", "ratio", "activation"]
MEANING += ["depth_head", "head", "deep", "n_tokens", "adapters", "reduction"]


def load_into(method: Method, path: Path) -> None:
    """Load the adapter at `path` into `method`."""
    try:
        if method.starts_over:
            raise UserError(
                f"{path}: {type(method).__name__} learns only from the training images, wherever "
                "it starts; leave the flag out, or test that run with eval.py"
            )
        state, settings = read(path, method)
        differ = [k for k in MEANING if k in settings and not _same(method, k, settings[k])]
        if differ:
            flags = " ".join(_flag(key, settings[key]) for key in differ)
            raise UserError(f"{path}: was made with other settings; give {flags}")
        try:
            method.load_adapter(state)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    except UserError as error:
        raise UserError(f"--init-from {error}") from None


def _flag(key: str, value) -> str:
    """A setting as a flag: --image-rank 4, --class-specific, --no-class-specific."""
    key = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{key}" if value else f"--no-{key}"
    return f"--{key} {value}"


def read(path: Path, method: Method) -> tuple[dict[str, Tensor], dict]:
    """An adapter of any of the four kinds -> tensors under our names, and its known settings."""
    if path.is_file() or (path / "adapter_config.json").is_file():
        return (read_file if path.is_file() else read_peft)(path, as_lora(method, path))
    if (path / "config.json").exists():
        return read_run(path, method)
    neither = "is neither a run of train.py nor a PEFT adapter; give one of these"
    raise UserError(f"{path}: {neither if path.is_dir() else 'there is no such folder or file'}")


def as_lora(method: Method, path: Path) -> LoRA:
    """The method, if it is a LoRA; UserError if not."""
    if not isinstance(method, LoRA):
        raise UserError(
            f"{path}: is a LoRA adapter, and {type(method).__name__} learns something "
            "else; use --method lora, or give a run of the same method"
        )
    return method


def _same(method: Method, key: str, value) -> bool:
    """Whether a setting of the method means the same as `value`, even if written differently."""
    if not hasattr(method.settings, key):
        return True  # the tensors' names and shapes are checked later
    mine = getattr(method.settings, key)
    if key == "parts":
        return set(mine) == set(value)
    if key == "blocks":
        depth = max(tower_depths(method).values())
        return all(
            block_numbers(mine, depth, tower) == block_numbers(value, depth, tower)
            for tower in OUR_TOWER
        )
    return mine == value


def read_run(path: Path, method: Method) -> tuple[dict[str, Tensor], dict]:
    """A run folder of train.py -> its learned tensors and settings."""
    run = Run.open(path)
    run.check_model(weights.fingerprint(method.lent[0]))
    rows = not method.names_unseen or getattr(method.settings, "depth_head", False)
    if rows and run.learned != method.classnames:  # a tensor has a row for each class
        count, mine = len(run.learned), len(method.classnames)
        raise UserError(
            f"{path}: learned {count} classes ({run.learned[0]!r} …) that are not the {mine} of "
            f"this run ({method.classnames[0]!r} …), or are in another order, and what "
            f"{type(method).__name__} learns has a row for each; give a run on the same classes"
        )
    settings = asdict(described(run)[1])
    unused = {"image": "text_", "text": "image_"}.get(settings.get("towers", ""), "no such setting")
    settings = {key: value for key, value in settings.items() if not key.startswith(unused)}
    return run.load_adapter(), settings
