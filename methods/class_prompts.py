"""The prompts of each class: its name in every template, or texts written for it alone.

A template says the same about every class. Texts written for a class can say what it looks like or
what kind of thing it is, which improves accuracy (CuPL: Pratt et al., "What does a platypus look
like?", arXiv:2209.03320). `--prompts FILE` reads them:

    {"rose":       ["a photo of a rose, a kind of flower.", "a rose has thorns."],
     "tiger lily": ["a photo of a tiger lily: orange petals with dark spots."]}

A class's text feature is the mean of its prompts' features on the unit sphere.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clip_min import UserError
from clip_min.errors import some
from clip_min.files import read_json
from clip_min.tokenizer import tokenizer
from clip_min.typed import expect

Prompts = dict[str, list[str]]  # class name -> its texts
LONGEST = 77  # tokens the text tower reads, start and end included


def spoken(name: str) -> str:
    """A class name as data sets spell it: "_" is a space. spoken("tiger_lily") is "tiger lily"."""
    return " ".join(name.replace("_", " ").split())


def read_prompts(given: str | Prompts | None) -> Prompts | None:
    """The name of a JSON file, or its content -> texts by class name, checked; "" -> None.

    The settings keep the content instead of the name, so that a run does not depend on the file.
    """
    if not given:
        return None
    where = f"--prompts {given}" if isinstance(given, str) else "--prompts"
    if isinstance(given, str):
        given = read_json(Path(given).expanduser(), "expected one: {class: [texts]}")
    expect(given, Prompts, where)
    expect(list(given), list[str], where, "classes")
    prompts: Prompts = {}
    for key, texts in given.items():
        name = spoken(key)
        if not name:
            raise UserError(f"{where}: {key!r} is not the name of a class; leave it out")
        if name in prompts:
            raise UserError(f"{where}: {name} occurs twice; give all its texts in one list")
        if not texts:
            raise UserError(f"{where}: {name} has no text; give one or more, or leave it out")
        for text in texts:
            check_text(text.replace("{}", name), f"{where}: {name}")
        prompts[name] = list(texts)
    if not prompts:
        raise UserError(f"{where}: names no class; expected {{class: [texts]}}")
    return prompts


def check_text(text: str, where: str) -> None:
    """UserError if a text is empty, or too long for the text tower."""
    if not text.strip():
        raise UserError(f"{where}: {text!r} is empty; write a text, or leave it out")
    length = len(tokenizer().encode(text)) + 2
    if length > LONGEST:
        raise UserError(
            f"{where}: {text:.300}: is {length} tokens long with its start and end, but the text "
            f"tower reads {LONGEST}; shorten it"
        )


def class_texts(classnames: Sequence[str], prompts: Prompts) -> list[list[str]]:
    """The texts written for each of K classes. "{}" is the name."""
    if missing := [name for name in classnames if spoken(name) not in prompts]:
        others = prompts.keys() - {spoken(name) for name in classnames}
        near = difflib.get_close_matches(spoken(missing[0]), sorted(others), 1)
        hint = f"; did you mean {missing[0]} by {near[0]!r}?" if near else ""
        raise UserError(
            f"--prompts: no texts for {some(missing)}{hint}; every class that is learned or tested "
            "needs texts, also each novel class"
        )
    return [[t.replace("{}", name) for t in prompts[spoken(name)]] for name in classnames]


def strangers(prompts: Prompts, classnames: Sequence[str]) -> list[str]:
    """A note, if there are texts for names that are not classes, with the nearest class names."""
    known = {spoken(name) for name in classnames}
    others = [name for name in prompts if name not in known]
    near = {name: difflib.get_close_matches(name, sorted(known), 1) for name in others[:20]}
    told = [name + (f" (near {near[name][0]})" if near.get(name) else "") for name in others]
    return [f"--prompts: has texts for names that are not classes: {some(told)}"] if told else []


def mean_per_class(x: Tensor, texts: list[list[str]]) -> Tensor:
    """Features of all prompts x (J, E), in order of class -> their mean for each class (K, E)."""
    return torch.stack([rows.mean(dim=0) for rows in x.split([len(own) for own in texts])])
