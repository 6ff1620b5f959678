"""Means and spreads of a grid, against numpy, and what is printed of them."""

import argparse
import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from clip_min import UserError
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


def score(base, novel=None, all_=None, joint=None) -> dict:
    """joint: what each half loses where all names are chosen from."""
    hm = None if novel is None else 2 * base * novel / (base + novel)
    joint = joint and {k: score(base - joint, novel - joint)[k] for k in ("base", "novel", "hm")}
    return {"base": base, "novel": novel, "hm": hm, "all": all_, "joint": joint}


@pytest.fixture
def results():
    """2 numbers of shots x 3 seeds; zero-shot depends on the seed, as when it splits the data."""
    rng = np.random.default_rng(0)
    return {
        (shots, seed): score(*rng.uniform(50, 99, 2), joint=9)
        | {"zero_shot": score(60 + seed, 70 - seed, joint=5)}
        for shots in (1, 16)
        for seed in (1, 2, 5)
    }


def test_means_and_sample_deviations_are_numpys(results):
    found = grid.summarise(results)
    assert found["seeds"] == [1, 2, 5]
    assert list(found["shots"]) == ["1", "16"]
    for shots in (1, 16):
        joint = ["joint_base", "joint_novel", "joint_hm"]
        assert list(found["shots"][str(shots)]) == ["base", "novel", "hm", *joint]
        for part in ("base", "novel", "hm", *joint):
            key = part.removeprefix("joint_")
            values = [
                (run["joint"] if key != part else run)[key]
                for run in (results[shots, seed] for seed in (1, 2, 5))
            ]
            cell = found["shots"][str(shots)][part]
            assert cell["values"] == values
            assert cell["mean"] == pytest.approx(np.mean(values))
            assert cell["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["zero_shot"]["base"]["values"] == [61, 62, 65]


def test_the_table_shows_mean_and_spread_and_no_number_where_there_is_none(results):
    for result in results.values():
        result |= dict.fromkeys(("novel", "hm", "joint"))  # it cannot name new classes
    lines = grid.table("coop", grid.summarise(results)).splitlines()
    assert lines[0].split() == ["base", "novel", "HM", "all", "names"]
    values = [results[1, seed]["base"] for seed in (1, 2, 5)]
    assert lines[1].startswith("zero-shot")
    assert "62.67 ± 2.08" in lines[1]
    assert lines[2].startswith("coop, 1 shot ")
    assert lines[2].split()[3:] == [
        *(f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}".split()),
        *["n/a"] * 3,
    ]
    assert lines[3].startswith("coop, 16 shots ")
    assert len({len(line) for line in lines}) == 1


def test_among_all_names_there_is_a_mean_only_if_every_run_has_one(results):
    shown = grid.table("lora", grid.summarise(results)).splitlines()
    values = [results[16, seed]["joint"]["hm"] for seed in (1, 2, 5)]
    assert shown[-1].endswith(f"  {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}")
    results[16, 2]["joint"] = None  # of an earlier version
    again = grid.table("lora", grid.summarise(results)).splitlines()
    assert again[:-1] == shown[:-1]
    assert again[-1].endswith("  n/a")


def test_one_seed_has_a_mean_and_no_spread():
    found = grid.summarise(
        {(s, 3): {**score(80.0, 60.0), "zero_shot": score(50.0, 50.0)} for s in (1, 2)}
    )
    assert found["shots"]["2"]["base"] == {"mean": 80.0, "std": None, "values": [80.0]}
    assert "±" not in grid.table("lora", found)


@pytest.fixture
def drawn(monkeypatch):
    """What plots show: label -> (shots, means, deviations); "ticks" -> (places, texts)."""
    found = {}
    draw, mark = Axes.errorbar, Axes.set_xticks

    def errorbar(axes, x, y, yerr, *, label, **options):
        found[label] = list(x), list(y), list(yerr)
        return draw(axes, x, y, yerr, label=label, **options)

    def set_xticks(axes, places, texts):
        found["ticks"] = list(places), list(texts)
        return mark(axes, places, texts)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    monkeypatch.setattr(Axes, "set_xticks", set_xticks)
    return found


def test_a_plot_shows_means_and_deviations_over_shots(results, drawn, tmp_path):
    grid.save_plot("lora", grid.summarise(results), tmp_path / "deep/plot.png")
    with Image.open(tmp_path / "deep/plot.png") as image:
        assert len(image.getcolors(100_000)) > 10
    assert list(drawn) == ["base", "novel", "HM", "all names", "ticks"]
    assert drawn["ticks"] == ([1, 16], ["1", "16"])
    for label, part in (("base", "base"), ("novel", "novel"), ("HM", "hm"), ("all names", "hm")):
        shots, means, deviations = drawn[label]
        assert shots == [1, 16]
        for i, number in enumerate(shots):
            of = [results[number, seed] for seed in (1, 2, 5)]
            values = [(run["joint"] if label == "all names" else run)[part] for run in of]
            assert means[i] == pytest.approx(np.mean(values))
            assert deviations[i] == pytest.approx(np.std(values, ddof=1))


def test_all_shots_have_a_row_and_stand_last_in_the_plot(drawn, tmp_path):
    results = {
        (shots, 3): {**score(base, 60.0), "zero_shot": score(50.0, 50.0)}
        for shots, base in ((4, 70.0), (16, 80.0), ("all", 90.0))
    }
    found = grid.summarise(results)
    assert grid.table("lora", found).splitlines()[-1].startswith("lora, all shots ")
    grid.save_plot("lora", found, tmp_path / "plot.png")
    places, means, deviations = drawn["base"]
    assert places[:2] == [4, 16]
    assert places[2] > 16
    assert (means, deviations) == ([70, 80, 90], [0, 0, 0])
    assert drawn["ticks"] == (places, ["4", "16", "all"])


# CoCoOp's table of zero-shot CLIP, base and novel; its row of means is 69.34, 74.22, 71.70
PUBLISHED = {
    "imagenet": (72.43, 68.14),
    "caltech101": (96.84, 94.00),
    "oxford_pets": (91.17, 97.26),
    "stanford_cars": (63.37, 74.89),
    "flowers102": (72.08, 77.80),
    "food101": (90.10, 91.22),
    "fgvc_aircraft": (27.19, 36.29),
    "sun397": (69.36, 75.35),
    "dtd": (53.24, 59.90),
    "eurosat": (56.48, 64.05),
    "ucf101": (70.53, 77.50),
}


def test_the_mean_over_data_sets_is_the_published_one():
    summaries = {
        name: grid.summarise(
            {(16, 1): {**score(base + 1, novel), "zero_shot": score(base, novel, joint=10)}}
        )
        for name, (base, novel) in PUBLISHED.items()
    }
    of = {name: grid.rows("lora", summary) for name, summary in summaries.items()}
    zero_shot, ours = (t.splitlines() for t in grid.table_of_data_sets(of).split("\n\n"))
    assert zero_shot[:2] == ["zero-shot", f"{'base':>31}{'novel':>16}{'HM':>16}{'all names':>16}"]
    assert [line.split()[0] for line in zero_shot[2:]] == [*PUBLISHED, "mean"]
    assert zero_shot[3].split() == ["caltech101", "96.84", "94.00", "95.40", "85.40"]
    assert zero_shot[-1].split()[:4] == ["mean", "69.34", "74.22", "71.70"]
    base, novel = (np.mean([row[i] for row in PUBLISHED.values()]) - 10 for i in range(2))
    assert zero_shot[-1].split()[4] == f"{2 * base * novel / (base + novel):.2f}"
    assert ours[0] == "lora, 16 shots"
    assert ours[-1].split()[:3] == ["mean", "70.34", "74.22"]
    assert ours[-1].split()[4] == "n/a"


def test_one_number_a_run_is_one_table_of_data_sets():
    runs = {
        name: {(16, 1): {**score(None, None, top), "zero_shot": score(None, None, top - 9)}}
        for name, top in (("dtd", 50.0), ("eurosat", 60.0))
    }
    of = {name: grid.rows("lora", grid.summarise(results)) for name, results in runs.items()}
    lines = grid.table_of_data_sets(of).splitlines()
    assert [line.split() for line in lines] == [
        ["zero-shot", "lora,", "16", "shots"],
        ["dtd", "41.00", "50.00"],
        ["eurosat", "51.00", "60.00"],
        ["mean", "46.00", "55.00"],
    ]


def test_a_score_that_a_data_set_lacks_has_no_mean():
    probe = {"base": 90.0, "novel": None, "hm": None, "all": None, "joint": None}
    runs = {(4, 1): {**probe, "zero_shot": score(70.0, 60.0)}}
    shown = grid.table_of_data_sets({"dtd": grid.rows("linear_probe", grid.summarise(runs))})
    assert shown.splitlines()[-1].split() == ["mean", "90.00", *["n/a"] * 3]


@pytest.mark.parametrize("place", ["", "zero_shot."])
def test_a_validation_accuracy_that_is_no_number_is_named(place, tmp_path):
    scores = {"base": 50.0, "novel": None, "hm": None, "all": None, "joint": None, "val": 40.0}
    found = {**scores, "zero_shot": dict(scores)}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(found))
    assert grid.read_results(file) == found
    (found["zero_shot"] if place else found)["val"] = [40.0]
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=rf"results.json: {place}val is \[40.0\], expected a f"):
        grid.read_results(file)
