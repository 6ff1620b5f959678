"""Values are held against type hints, and what does not fit is named."""

from typing import Annotated, Literal

import pytest

from clip_min import UserError
from clip_min.files import read_json, read_json_lines, read_safetensors
from clip_min.typed import expect

FITS = [
    (1, float),
    (1.5, float),
    (1, int),
    ("rose 🌹", str),
    (None, str | None),
    ("a", Literal["a", "b"]),
    ("a", Annotated[str, "said of it"]),
    ({"a": 1, "more": 2}, {"a": int}),
    ({"a": [1, 2]}, dict[str, list[int]]),
    ([], list[int]),
]
DOES_NOT = [
    (True, int, "True, expected a whole number"),
    (True, float, "True, expected a finite number"),
    (1.0, int, "1.0, expected a whole number"),
    (2**63, int, "expected a whole number"),
    (float("nan"), float, "nan, expected a finite number"),
    (10**400, float, "expected a finite number"),
    ("\ud83c", str, "expected text"),
    ("a\0", str, r"expected text without \\0 and half characters"),
    (1, str | None, "1, expected text or null"),
    (True, Literal[1, "b"], "True, expected 1 or b"),
    ([1, "2"], list[int], "1 is '2', expected a whole number"),
    ({"a": {"b": [None]}}, {"a": {"b": list[int]}}, "a.b.0 is None, expected a whole number"),
    ({}, {"a": {"b": int}}, "a is missing"),
    ({"a": {}}, {"a": {"b": int}}, "a.b is missing"),
    ([], {"a": int}, r"is \[\], expected an object"),
]


@pytest.mark.parametrize(("value", "kind"), FITS)
def test_what_fits_is_taken(value, kind):
    expect(value, kind, "file.json")


@pytest.mark.parametrize(("value", "kind", "said"), DOES_NOT)
def test_what_does_not_fit_is_named(value, kind, said):
    with pytest.raises(UserError, match=f"^file.json: .*{said}"):
        expect(value, kind, "file.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "cannot be read as JSON|cannot be read"),
        (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
    ],
)
def test_json_that_is_none_is_one_line(content, said, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    for read in (lambda: read_json(file, ""), lambda: read_json_lines(file)):
        if content:
            with pytest.raises(UserError, match=f"a.json.*({said})") as error:
                read()
            assert len(str(error.value)) < 1000
            assert "\n" not in str(error.value)


def test_the_mark_of_editors_on_windows_is_no_content(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json", "") == {"a": 1}
    assert read_json_lines(tmp_path / "a.json") == [{"a": 1}]


def test_what_cannot_be_read_is_not_said_to_be_missing(tmp_path):
    (tmp_path / "a").mkdir()
    for read in (lambda path: read_json(path, "hint"), read_safetensors):
        with pytest.raises(UserError, match="a: cannot be read .Is a directory"):
            read(tmp_path / "a")
        with pytest.raises(UserError, match="b: there is no such file"):
            read(tmp_path / "b")
