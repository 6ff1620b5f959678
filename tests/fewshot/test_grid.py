"""Means and spreads of a grid, against numpy, and what is printed of them."""

import argparse

import numpy as np
import pytest
from PIL import Image

from fewshot import grid


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4", [4]), ("1,2,4", [1, 2, 4]), ("8, 2", [8, 2]), ("1,1,2", [1, 2]), ("-3,0", [-3, 0])],
)
def test_numbers_are_read_in_their_order_and_once(text, expected):
    assert grid.numbers(text) == expected


@pytest.mark.parametrize("text", ["", "x", "1,", "1.5", "1;2"])
def test_what_is_no_list_of_numbers_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="several as 1,2,4"):
        grid.numbers(text)


def score(base, novel=None, all_=None) -> dict:
    hm = None if novel is None else 2 * base * novel / (base + novel)
    return {"base": base, "novel": novel, "hm": hm, "all": all_}


@pytest.fixture
def results():
    """2 numbers of shots x 3 seeds; zero-shot depends on the seed, as when it splits the data."""
    dice = np.random.default_rng(0)
    return {
        (shots, seed): score(*dice.uniform(50, 99, 2)) | {"zero_shot": score(60 + seed, 70 - seed)}
        for shots in (1, 16)
        for seed in (1, 2, 5)
    }


def test_means_and_sample_deviations_are_numpys(results):
    found = grid.summarise(results)
    assert found["seeds"] == [1, 2, 5]
    assert list(found["shots"]) == ["1", "16"]
    for shots in (1, 16):
        assert list(found["shots"][str(shots)]) == ["base", "novel", "hm"]
        for part in ("base", "novel", "hm"):
            values = [results[shots, seed][part] for seed in (1, 2, 5)]
            cell = found["shots"][str(shots)][part]
            assert cell["values"] == values
            assert cell["mean"] == pytest.approx(np.mean(values))
            assert cell["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["zero_shot"]["base"]["values"] == [61, 62, 65]


def test_the_table_shows_mean_and_spread_and_no_number_where_there_is_none(results):
    for result in results.values():
        result["novel"] = result["hm"] = None  # of a method that cannot name new classes
    lines = grid.table("coop", grid.summarise(results)).splitlines()
    assert lines[0].split() == ["base", "novel", "HM"]
    values = [results[1, seed]["base"] for seed in (1, 2, 5)]
    assert lines[1].startswith("zero-shot")
    assert "62.67 ± 2.08" in lines[1]
    assert lines[2].startswith("coop, 1 shot ")
    assert lines[2].split()[3:] == [
        *(f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}".split()),
        "n/a",
        "n/a",
    ]
    assert lines[3].startswith("coop, 16 shots ")
    assert len({len(line) for line in lines}) == 1


def test_one_seed_has_a_mean_and_no_spread():
    found = grid.summarise(
        {(s, 3): {**score(80.0, 60.0), "zero_shot": score(50.0, 50.0)} for s in (1, 2)}
    )
    assert found["shots"]["2"]["base"] == {"mean": 80.0, "std": None, "values": [80.0]}
    assert "±" not in grid.table("lora", found)


def test_a_plot_is_drawn(results, tmp_path):
    grid.save_plot("lora", grid.summarise(results), tmp_path / "deep/plot.png")
    with Image.open(tmp_path / "deep/plot.png") as image:
        assert len(image.getcolors(100_000)) > 10


def test_all_shots_have_a_row_and_stand_last_in_the_plot(tmp_path):
    results = {(s, 3): {**score(80.0, 60.0), "zero_shot": score(50.0, 50.0)} for s in (4, "all")}
    found = grid.summarise(results)
    assert grid.table("lora", found).splitlines()[-1].startswith("lora, all shots ")
    grid.save_plot("lora", found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()
