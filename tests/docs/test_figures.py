"""The figures show what is in the code, and can be read by all."""

import re
from xml.etree import ElementTree

import pytest

from methods import METHODS
from tools import figures

FIGURES = ("prompt_tree", "methods")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return {"prompt_tree": figures.prompt_tree(), "methods": figures.methods()}


@pytest.mark.parametrize("name", FIGURES)
def test_the_kept_file_is_what_the_script_draws(name, drawn, root):
    kept = (root / "docs" / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    assert kept == drawn[name], "run python tools/figures.py"


@pytest.mark.parametrize("name", FIGURES)
def test_it_is_small_has_a_ground_of_its_own_and_words_for_those_who_do_not_see_it(name, drawn):
    assert len(drawn[name].encode()) < 60_000
    root = ElementTree.fromstring(drawn[name])
    assert root.get("role") == "img"
    for tag in ("title", "desc"):
        assert len(root.find(SVG + tag).text) > 10
    ground = root.find(SVG + "rect")  # the first thing that is painted
    assert ground.get("fill") == "#ffffff"
    assert float(ground.get("width")) >= float(root.get("width")) - 1


def test_every_method_has_a_place_and_no_other_is_named():
    named = {name for rows in figures.PLACES.values() for row in rows for name in row.split(", ")}
    assert named == set(METHODS), "give it a place in tools/figures.py, and run that"


def test_the_tree_has_each_beginning_once(drawn):
    """Counted from the prompts' words: one token each, and a full stop."""
    prompts = [["[start]", *text[:-1].split(), ".", "[end]"] for text in figures.TEXTS]
    beginnings = {tuple(p[:n]) for p in prompts for n in range(1, len(p) + 1)}
    (count,) = re.findall(r"one tree of (\d+) tokens", drawn["prompt_tree"].split("</desc>")[1])
    assert int(count) == len(beginnings)
