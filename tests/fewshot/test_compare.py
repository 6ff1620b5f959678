"""The table of several methods, what it advises, and what fits in a time."""

import math

import pytest

from fewshot.compare import advice, announce, mean_of_data_sets, show, summarise, table, within
from fewshot.schedule import duration


def scores(val, base, novel) -> dict:
    joint = None if novel is None else {"base": base - 5, "novel": novel - 5, "hm": 40.0}
    hm = None if novel is None else 2 * base * novel / (base + novel)
    return {"val": val, "base": base, "novel": novel, "hm": hm, "all": None, "joint": joint}


def result(val, base, novel=50.0, seconds=10.0) -> dict:
    """A results.json, as far as it is read."""
    costs = {"parameters": 1234, "seconds": seconds, "peak_memory_mb": 900.0}
    return {**scores(val, base, novel), **costs, "zero_shot": scores(30.0, 20.0, 50.0)}


def rows(**methods) -> dict:
    return summarise({name: [found] for name, found in methods.items()})


def test_rows_are_means_in_the_order_of_validation_not_of_test():
    found = summarise(
        {
            "worse": [result(60, 99), result(62, 99)],
            "better": [result(70, 40, seconds=1), result(74, 50, seconds=2)],
        }
    )
    assert list(found) == ["better", "worse", "zero-shot"]
    assert found["better"]["val"] == {"mean": 72, "std": pytest.approx(8**0.5), "values": [70, 74]}
    assert found["better"]["seconds"] == 1.5
    assert found["zero-shot"]["base"]["mean"] == 20
    assert found["zero-shot"]["parameters"] is None


def test_the_table_says_n_a_where_new_names_cannot_be_named():
    lines = table(rows(probe=result(80, 90, novel=None), lora=result(70, 60))).splitlines()
    assert lines[0].split()[:2] == ["validation", "base"]
    costs = ["1,234", "10.0", "900"]
    assert lines[1].split() == ["probe", "80.00", "90.00", "n/a", "n/a", "n/a", *costs]
    assert lines[3].split() == ["zero-shot", "30.00", "20.00", "50.00", "28.57", "40.00"]
    assert len({line.index(".00") for line in lines[1:]}) == 1  # columns stand under each other


def test_all_classes_have_one_test_column():
    of = {"base": None, "novel": None, "hm": None, "joint": None, "all": 77.0}
    found = result(80, 1) | of
    found["zero_shot"] = {"val": 1.0, **of}
    lines = table(rows(lora=found)).splitlines()
    assert lines[0].split() == ["validation", "test", "parameters", "seconds", "MB"]
    assert lines[1].split()[:3] == ["lora", "80.00", "77.00"]


def test_advice_goes_by_validation_and_names_what_is_as_good_in_less_time():
    found = rows(slow=result(80, 1), quick=result(78.5, 99, seconds=2), far=result(60, 99, 50, 1))
    text = advice(found, 100, {"slow", "quick", "far"})
    assert text.startswith("Take slow: it is best on the 100 validation images, 80.0 %.")
    error = 100 * math.sqrt(0.8 * 0.2 / 100)  # of a share of 100 images
    assert f"{error:.1f} points, is quick, 78.5 %, in 2.0 s of training instead of 10.0 s" in text
    assert "new names" not in text
    assert "quick" not in advice(found, 10_000, set(found))  # there 1.5 points are many


def test_advice_names_another_where_the_best_learns_nothing_of_new_names():
    found = rows(probe=result(90, 1, novel=None), gda=result(85, 1), lora=result(70, 1))
    text = advice(found, 100, {"lora"})
    assert text.startswith("Take probe")
    assert text.endswith("that also learn for new names, lora is best on them, 70.0 %.")


def test_clip_as_it_is_may_be_the_best():
    assert advice(rows(lora=result(10, 99)), 50, {"lora"}).startswith("Take zero-shot CLIP: ")


def test_advice_counts_the_validation_images_of_its_own_number_of_shots(tmp_path, capsys):
    def two(val, seconds):  # by shots and seed
        each = {(1, 1): 10, (16, 1): 1000}
        return {key: result(val, 1, seconds=seconds) | {"val_images": n} for key, n in each.items()}

    results = {"flowers": {"slow": two(80, 10), "quick": two(70, 1)}}
    show(results, {"flowers": tmp_path}, tmp_path, {"slow": {}, "quick": {}}, set())
    advice_of = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Take")]
    assert "best on the 10 validation images" in advice_of[0]
    assert "is quick" in advice_of[0]
    assert "best on the 1000 validation images" in advice_of[1].replace(",", "")
    assert "quick" not in advice_of[1]  # there 10 points are more than the error


def test_what_fits_in_a_time_is_the_shortest_first():
    seconds = {"a": 50.0, "b": 5.0, "c": 20.0, "d": 30.0}
    assert within(60, seconds) == ["b", "c", "d"]
    assert within(4, seconds) == []
    assert within(math.inf, seconds) == list(seconds)
    assert announce(seconds, ["b", "c", "d"]) == (
        "about 55 s: b 5 s, c 20 s, d 30 s\nleft out, since they do not fit: a (about 50 s)"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (40, "40 s"), (400, "7 min"), (5000, "83 min"), (40000, "11.1 h")],
)
def test_a_duration_is_said_in_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text


def test_the_mean_of_data_sets_is_of_means_and_hm_of_these():
    one, two = rows(lora=result(80, 90, 60)), rows(lora=result(60, 70, 40))
    found = mean_of_data_sets([one, two])
    assert found["lora"]["val"]["mean"] == 70
    assert found["lora"]["hm"]["mean"] == pytest.approx(2 * 80 * 50 / 130)
    assert found["lora"]["seconds"] == 10


def test_a_closed_form_is_said_to_be_not_timed():
    assert announce({"lora": 40.0, "gda": 0.0}, ["lora", "gda"]) == (
        "about 40 s: lora 40 s, gda not timed"
    )
