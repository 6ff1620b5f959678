"""Templates: sentences with a gap for the class name.

A class may have several prompts, one for each template (the prompt ensemble of Radford et al.,
arXiv:2103.00020, section 3.1.4). Its text feature is then the mean of their normalised features
(`Method.text_features`). A class may also have prompts of its own, which replace all templates: see
class_prompts.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from clip_min import UserError
from methods.base import BaseSettings
from methods.class_prompts import read_prompts

ENSEMBLE = (  # for photographs of any subject; our own, similar to the paper's 80
    "a photo of a {}.",
    "a photo of the {}.",
    "a good photo of a {}.",
    "a bad photo of a {}.",
    "a blurry photo of a {}.",
    "a sharp photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a close-up of a {}.",
    "a photo of a {} from afar.",
    "a photo of part of a {}.",
    "a photo of many {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a photo of a {} outdoors.",
    "a photo of a {} in front of a plain background.",
    "a cropped picture of a {}.",
    "a black and white photo of a {}.",
    "a drawing of a {}.",
    "a picture that shows a {}.",
)


@dataclass(frozen=True)
class PromptSettings(BaseSettings):
    """For methods that read written prompts."""

    prompts: Annotated[
        dict | None,
        "a JSON file of texts for each class, instead of templates: {class: [texts]}",
    ] = field(default=None, kw_only=True)

    readers = {"prompts": read_prompts}


def read_templates(given: str | list | tuple) -> tuple[str, ...]:
    """ "a {}.|the {}." -> ("a {}.", "the {}."); or 'ensemble', or a file with one on each line.

    The settings keep the templates instead of the file's name, so that a run does not depend on the
    file. A sequence is returned as it is.
    """
    if not isinstance(given, str):
        return tuple(given) if isinstance(given, list) else given
    text = given
    if text == "ensemble":
        return ENSEMBLE
    if text and "{}" not in text:
        try:
            text = Path(text).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--templates {given}: cannot be read as a text file ({error}); "
                "expected 'ensemble', a file of templates, or templates with {} in them"
            ) from None
    pieces = "|".join(text.splitlines()).split("|")  # in a file too, | stands between two
    lines = tuple(piece.strip() for piece in pieces if piece.strip())
    if bad := [line for line in lines if "{}" not in line]:
        raise UserError(f"--templates: {bad[0]!r} has no {{}} for the class name; add one")
    if given and not lines:
        raise UserError(f"--templates {given}: expected templates, found none")
    return lines


@dataclass(frozen=True)
class TemplateSettings(PromptSettings):
    templates: Annotated[
        tuple[str, ...],
        "templates to average over: 'ensemble' (20 of ours), a file with one on each line, or the "
        "templates themselves, separated by |; empty: only --template",
    ] = ()

    readers = {**PromptSettings.readers, "templates": read_templates}
