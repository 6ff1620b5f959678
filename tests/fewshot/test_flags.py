"""Flags follow from settings, and what is wrong with one is said in a line."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from clip_min import UserError
from fewshot.flags import Parser, add_flags, changes, pick


@dataclass
class Tree:
    height: Annotated[float, "in metres"] = 3.5
    rings: Annotated[int, "years, 100% of them"] = 7
    leaf_shape: Annotated[Literal["oak", "maple"], "what falls in autumn"] = "oak"
    name: Annotated[str, "how it is called"] = ""
    evergreen: Annotated[bool, "keeps its leaves"] = False


@pytest.fixture
def parser():
    parser = Parser()
    add_flags(parser, Tree)
    return parser


def test_flags_that_were_given_come_back_in_their_types(parser):
    given = parser.parse(
        ["--height", "2", "--rings", "9", "--leaf-shape", "maple", "--name", "fir", "--evergreen"]
    )
    assert given == {
        "height": 2.0,
        "rings": 9,
        "leaf_shape": "maple",
        "name": "fir",
        "evergreen": True,
    }
    assert type(given["height"]) is float
    assert type(given["rings"]) is int


def test_a_number_may_be_a_word():
    @dataclass
    class Wood:
        trees: Annotated[int | str, "how many, or all"] = 3

    parser = Parser()
    add_flags(parser, Wood)
    assert parser.parse(["--trees", "5"]) == {"trees": 5}
    assert parser.parse(["--trees", "all"]) == {"trees": "all"}


def test_flags_that_were_not_given_are_absent(parser):
    assert parser.parse([]) == {}
    assert parser.parse(["--rings=0", "--name="]) == {"rings": 0, "name": ""}  # 0 and "" are given


def test_a_yes_or_no_flag_can_be_taken_back(parser):
    assert parser.parse(["--evergreen"]) == {"evergreen": True}
    assert parser.parse(["--no-evergreen"]) == {"evergreen": False}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--heigth", "2"], "unknown argument --heigth; did you mean --height?"),
        (["--leaf_shape=oak"], "unknown argument --leaf_shape; did you mean --leaf-shape?"),
        (["--heig", "2"], "did you mean --height"),  # no abbreviations: tomorrow's flag may fit too
        (["--zzz"], "unknown argument --zzz; see --help"),
        (["--nome", "x"], "did you mean --name"),
        (
            ["--rim", "x"],
            "unknown argument --rim; see --help",
        ),  # not --rings
        (["oak"], "unknown argument oak"),
        (["--rings", "1.5"], "--rings: invalid int value: '1.5'"),
        (["--height", "tall"], "--height: invalid float value: 'tall'"),
        (["--leaf-shape", "elm"], "--leaf-shape: invalid choice: 'elm'"),
        (["--height"], "--height: expected one argument"),
    ],
)
def test_a_wrong_flag_is_an_error_that_says_which_and_what_is_right(parser, argv, said):
    with pytest.raises(UserError) as error:
        parser.parse(argv)
    assert said in str(error.value)


def test_a_wrong_choice_lists_the_right_ones(parser):
    with pytest.raises(UserError, match="oak.*maple"):
        parser.parse(["--leaf-shape", "elm"])


def help_lines(parser) -> dict[str, str]:
    """Flag -> its help, on one line."""
    entries = " ".join(parser.format_help().split()).split("options:")[1].split(" --")
    return {entry.split()[0]: entry for entry in entries}


def test_help_shows_meaning_and_default(parser):
    shown = help_lines(parser)
    assert "in metres [3.5]" in shown["height"]
    assert "100% of them [7]" in shown["rings"]
    assert "{oak,maple}" in shown["leaf-shape"]
    assert "[oak]" in shown["leaf-shape"]
    assert "[" not in shown["name"]  # an empty default says nothing
    assert "[" not in shown["no-evergreen"]


def test_help_shows_the_defaults_of_a_recipe_where_it_has_one():
    parser = Parser()
    add_flags(parser, Tree, {"height": 12.0, "name": "pine"})
    shown = help_lines(parser)
    assert "[12.0]" in shown["height"]
    assert "[pine]" in shown["name"]
    assert "[7]" in shown["rings"]


def test_pick_keeps_the_fields_of_a_class():
    assert pick(Tree, {"height": 1, "lr": 2, "name": None}) == {"height": 1, "name": None}


def test_flags_of_some_fields_alone_and_the_rest_is_unknown():
    parser = Parser()
    add_flags(parser, Tree, only=("rings", "name", "stranger"))
    assert parser.parse(["--rings", "2", "--name", "fir"]) == {"rings": 2, "name": "fir"}
    with pytest.raises(UserError, match="unknown argument --height"):
        parser.parse(["--height", "2"])


def test_changes_name_what_differs_and_nothing_else():
    usual = Tree(rings=8, name="fir", evergreen=True)
    assert changes(Tree(rings=8, name="fir", evergreen=True), usual) == ""
    assert changes(Tree(rings=0), usual) == "rings 0, name '', evergreen False"
