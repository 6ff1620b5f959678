import pytest

from clip_min.errors import UserError, nearest, told


def test_nearest_returns_a_known_name_and_suggests_one_for_an_unknown():
    known = {"lora": 1, "zero_shot": 2}
    assert nearest("--method", "lora", known) == "lora"
    with pytest.raises(UserError, match="--method zeroshot: unknown; did you mean zero_shot"):
        nearest("--method", "zeroshot", known)
    with pytest.raises(UserError, match="--method xyz: unknown; known are lora, zero_shot"):
        nearest("--method", "xyz", known)


def test_of_many_known_names_the_first_are_shown():
    with pytest.raises(UserError) as error:
        nearest("class", "xyz", [f"flower {i}" for i in range(10_000)])
    assert str(error.value).endswith("flower 18, flower 19, … (10000 in all)")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("two\nlines"), "two lines"),
        (MemoryError(), "out of memory (MemoryError)"),
        (OSError(36, "File name too long", "a.png"), "File name too long: 'a.png'"),
        (RecursionError("maximum recursion depth exceeded\nhere"), "maximum recursion depth"),
    ],
)
def test_what_comes_from_outside_is_told_in_a_line(error, said):
    assert said in told(error)
    assert "\n" not in told(error)


def test_of_a_line_without_end_both_ends_are_told():
    found = told(UserError(f"shots.json: its first path, {'9' * 100_000}, is not there; mend it"))
    assert found.startswith("shots.json: its first path, 999")
    assert found.endswith("999, is not there; mend it")
    assert len(found) < 2_000
    assert told(UserError(1_900 * "x")) == 1_900 * "x"
