from pathlib import Path

import pytest
import torch

from clip_min.errors import UserError, is_bug, told, unknown


def test_for_an_unknown_name_the_nearest_is_suggested():
    known = {"lora": 1, "zero_shot": 2}
    with pytest.raises(UserError, match="--method zeroshot: unknown; did you mean zero_shot"):
        raise unknown("--method", "zeroshot", known)
    with pytest.raises(UserError, match="--method xyz: unknown; known are lora, zero_shot"):
        raise unknown("--method", "xyz", known)


def test_of_many_known_names_the_first_are_shown():
    with pytest.raises(UserError) as error:
        raise unknown("class", "xyz", [f"flower {i}" for i in range(10_000)])
    assert str(error.value).endswith("flower 18, flower 19, … (10000 in all)")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("two\nlines"), "two lines"),
        (MemoryError(), "out of memory (MemoryError)"),
        (RuntimeError("Could not determine home directory."), "begins with ~NAME, but there is no"),
        (OSError(36, "File name too long", "a.png"), "File name too long: 'a.png'"),
        (RecursionError("maximum recursion depth exceeded\nhere"), "maximum recursion depth"),
    ],
)
def test_what_comes_from_outside_is_told_in_a_line(error, said):
    assert not is_bug(error)
    assert said in told(error)
    assert "\n" not in told(error)


def test_memory_that_torch_cannot_have_is_told_in_a_line():
    with pytest.raises(RuntimeError) as found:
        torch.empty(10**15)
    for error in (found.value, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to …")):
        assert not is_bug(error)
        assert told(error).startswith("out of memory (")
        assert "\n" not in told(error)


def test_the_home_of_no_user_is_what_pathlib_says():
    with pytest.raises(RuntimeError) as found:
        Path("~nosuchuser/clip.pt").expanduser()
    assert not is_bug(found.value)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), KeyError("a"), ValueError("b")])
def test_an_error_of_the_code_is_a_bug(error):
    assert is_bug(error)


def test_of_a_line_without_end_both_ends_are_told():
    found = told(UserError(f"shots.json: its first path, {'9' * 100_000}, is not there; mend it"))
    assert found.startswith("shots.json: its first path, 999")
    assert found.endswith("999, is not there; mend it")
    assert len(found) < 2_000
    assert told(UserError(1_900 * "x")) == 1_900 * "x"
