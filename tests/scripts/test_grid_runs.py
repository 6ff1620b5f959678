"""A grid of --shots and --seeds: each run is the one it is alone, and a killed grid goes on."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

import fewshot.run
from methods.interop.command import Plan, parse

BASE = Path("noise/tiny")
GRID = ("--shots", "2,4", "--seeds", "1,2")
NAMES = [f"lora-s{shots}-seed{seed}" for shots in (2, 4) for seed in (1, 2)]


def plan_of(argv: list[str]) -> Plan:
    ((plan,), _) = parse(argv, "")
    return plan


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(script, flags, tmp_path_factory):
    """A grid that went well: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("grid")
    result = script("train", *flags, "--out", out, *GRID)
    assert result.code == 0, result.err
    return out, result.out


def test_every_run_of_a_grid_is_the_one_it_is_alone(whole, train, trained, tmp_path):
    out, _ = whole
    folders = sorted(path.name for path in (out / BASE).iterdir() if path.is_dir())
    assert folders == NAMES
    adapter = "adapter.safetensors"
    assert (out / BASE / "lora-s4-seed1" / adapter).read_bytes() == (
        trained.path / adapter
    ).read_bytes()
    alone = train(tmp_path, "--shots", 2, "--seed", 2)  # after others, in one process
    assert (out / BASE / alone.name / adapter).read_bytes() == (alone / adapter).read_bytes()
    left = {path.name for path in (out / BASE / alone.name).iterdir()}
    assert left == {path.name for path in trained.path.iterdir()}


def test_the_summary_is_mean_and_spread_of_the_runs(whole):
    out, printed = whole
    file = out / BASE / "lora-grid-s2-4-seed1-2.json"
    summary = json.loads(file.read_text())
    assert file.with_suffix(".png").stat().st_size > 5000
    lines = printed.splitlines()
    assert lines[-1] == f"grid: {file}"
    assert lines[-6] == "mean ± standard deviation, seeds 1, 2"
    for row, shots in ((-3, 2), (-2, 4)):
        runs = [results(out / BASE / f"lora-s{shots}-seed{seed}") for seed in (1, 2)]
        shown = []
        for part in ("base", "novel", "hm", "joint_hm"):
            values = [run["joint"]["hm"] if part == "joint_hm" else run[part] for run in runs]
            mean, std = statistics.mean(values), statistics.stdev(values)
            assert summary["shots"][str(shots)][part]["mean"] == pytest.approx(mean)
            shown += [f"{mean:.2f}", "±", f"{std:.2f}"]
        assert lines[row].split() == ["lora,", str(shots), "shots", *shown]
    zero_shot = results(out / BASE / "lora-s2-seed1")["zero_shot"]
    assert lines[-4].split()[:2] == ["zero-shot", f"{zero_shot['base']:.2f}"]


def test_a_grid_that_was_killed_goes_on_and_repeats_nothing(
    whole, script, flags, tmp_path, monkeypatch
):
    real, epochs = fewshot.run.Run.log_round, []

    def killed(run, entry):
        real(run, entry)
        epochs.append((run.path.name, entry["epoch"]))
        if epochs[-1] == ("lora-s2-seed2", 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(fewshot.run.Run, "log_round", killed)
    result = script("train", *flags, "--out", tmp_path, *GRID)
    assert result.code == 130
    assert "interrupted" in result.err
    assert not list(tmp_path.rglob("*grid*"))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("lora-s2-seed1/*")}

    epochs.clear()
    monkeypatch.setattr(
        fewshot.run.Run, "log_round", lambda run, e: epochs.append(run.path.name) or real(run, e)
    )
    result = script("train", *flags, "--out", tmp_path, *GRID, "--resume")
    assert result.code == 0, result.err
    assert "lora-s2-seed1" not in epochs
    assert set(epochs) == set(NAMES[1:])
    assert result.out.count("finished before") == 1
    assert {path: path.stat().st_mtime_ns for path in times} == times
    for name in NAMES:
        mine, theirs = (out / BASE / name / "adapter.safetensors" for out in (tmp_path, whole[0]))
        assert mine.read_bytes() == theirs.read_bytes()
    assert not list(tmp_path.rglob("*.old*"))

    epochs.clear()  # and once more: nothing is left to do, and the table is the same
    again = script("train", *flags, "--out", tmp_path, *GRID, "--resume")
    assert epochs == []
    assert again.out.splitlines()[-6:-1] == whole[1].splitlines()[-6:-1]


def test_runs_of_before_all_names_were_scored_have_no_such_number(whole, script, flags, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "old")
    for run in (out / BASE).glob("lora-s4-*"):
        (run / "predictions.safetensors").unlink()
        old = results(run)
        del old["joint"], old["zero_shot"]["joint"]
        (run / "results.json").write_text(json.dumps(old))
    again = script("train", *flags, "--out", out, *GRID, "--resume")
    assert again.code == 0, again.err
    before, after = (text.splitlines()[-4:-1] for text in (whole[1], again.out))
    assert after[:2] == before[:2]
    assert after[2].split() == [*before[2].split()[:-3], "n/a"]
    old["joint"] = {"base": "high", "novel": 1.0, "hm": 1.0}
    (run / "results.json").write_text(json.dumps(old))
    again = script("train", *flags, "--out", out, *GRID, "--resume")
    assert again.code == 2
    assert "results.json: joint.base is 'high'" in again.err


def test_resuming_a_grid_with_another_setting_is_an_error(whole, script, flags, is_one_line):
    result = script("train", *flags, "--out", whole[0], *GRID, "--lr", 0.02, "--resume")
    assert is_one_line(result, "--resume", "lr 0.01, not 0.02")


def test_a_grid_with_other_settings_keeps_the_earlier_ones_table(script, flags, tmp_path):
    grid = ("--shots", 1, "--seeds", "1,2", "--epochs", 1, "--out", tmp_path)
    file = tmp_path / BASE / "lora-grid-s1-seed1-2.json"
    assert script("train", *flags, *grid).code == 0
    first = file.read_bytes()
    assert script("train", *flags, *grid, "--resume").code == 0  # the same: nothing is set aside
    assert len(list(file.parent.glob("*grid*"))) == 2
    result = script("train", *flags, *grid, "--lr", 0.02)
    assert result.code == 0, result.err
    kept = file.with_name(f"{file.name}.old1")
    assert f"an earlier grid is kept as {kept}" in result.out
    assert kept.read_bytes() == first
    assert json.loads(file.read_text())["settings"]["lr"] == 0.02
    assert len(list(file.parent.glob("*grid*"))) == 4


def test_one_number_each_is_a_run_and_no_grid(script, flags, tmp_path, trained):
    result = script("train", *flags, "--out", tmp_path, "--shots", "4", "--seeds", "1")
    assert [path.name for path in (tmp_path / BASE).iterdir()] == ["lora-s4-seed1"]

    def untimed(out: str) -> list[str]:
        """What was printed, without seconds, memory and the run's place."""
        return [re.sub(r" +[\d.]+ s$", "", line) for line in out.splitlines()[:-3]]

    assert untimed(result.out) == untimed(trained.out)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--seed", "1", "--seeds", "1,2"), "--seed and --seeds: give one of them"),
        (("--seeds", "1,all"), "--seeds: invalid value: '1,all'; expected a number, or several"),
        (("--shots", "1,x"), "--shots: invalid value: '1,x'; expected a number, or several"),
        (("--shots", "4,0"), "--shots 0: expected 1 or more"),
        (("--seeds", "1,-2"), "--seed -2: expected 0 to"),
    ],
)
def test_a_wrong_grid_is_one_line_before_anything_runs(
    more, said, script, flags, tmp_path, is_one_line
):
    assert is_one_line(script("train", *flags, *more, "--out", tmp_path), said)
    assert list(tmp_path.iterdir()) == []


def test_the_experiments_of_a_plan_are_every_pair():
    plan = plan_of(["--method", "lora", "--shots", "1,16", "--seeds", "3,4"])
    pairs = [(experiment.shots, experiment.seed) for experiment in plan.experiments]
    assert pairs == [(1, 3), (1, 4), (16, 3), (16, 4)]
    plan = plan_of(["--method", "lora", "--shots", "1,2,all"])
    assert [experiment.shots for experiment in plan.experiments] == [1, 2, "all"]
    (alone,) = plan_of(["--method", "lora", "--seed", "7"]).experiments
    assert (alone.shots, alone.seed) == (10, 7)


# ------------------------------------------------------------------------------- several data sets


def test_several_data_sets_are_the_runs_alone_their_table_and_one_json(
    script, flags, model, published, tmp_path
):
    where = ("--data-root", published, "--classes", "all", "--seeds", "1,2")
    several = [*flags, *where, "--dataset", "dtd,food101", "--out", tmp_path]  # the last one holds
    result = script("train", *several)
    assert (result.code, result.err) == (0, "")
    assert "lora on dtd,food101, model" in result.out
    file = tmp_path / "dtd,food101-all/tiny/lora-grid-s4-seed1-2.json"
    assert result.out.splitlines()[-1] == f"data sets: {file}"
    summary, means = json.loads(file.read_text()), []
    shown = [line.split() for line in result.out.splitlines()[-5:-1]]
    assert shown[0] == ["zero-shot", "lora,", "4", "shots"]
    for name, line in zip(("dtd", "food101"), shown[1:], strict=False):
        runs = [results(tmp_path / f"{name}-all/tiny/lora-s4-seed{seed}") for seed in (1, 2)]
        found = summary["datasets"][name]
        assert found["shots"]["4"]["all"]["values"] == [run["all"] for run in runs]
        means.append(statistics.mean(run["all"] for run in runs))
        assert (line[0], f"{means[-1]:.2f}") == (name, line[4])
    assert summary["mean"]["lora, 4 shots"]["all"]["mean"] == pytest.approx(statistics.mean(means))
    assert shown[3][0] == "mean"
    assert shown[3][2] == f"{statistics.mean(means):.2f}"
    adapter = tmp_path / "food101-all/tiny/lora-s4-seed2/adapter.safetensors"
    before = adapter.read_bytes()
    (adapter.parent / "results.json").unlink()
    again = script("train", *several, "--resume", "--report")
    assert again.out.count("finished before") == 3
    assert again.out.count("it has no page yet: python report.py ") == 3
    assert (adapter.parent / "report.html").exists()
    assert again.out.splitlines()[-5:] == result.out.splitlines()[-5:]
    assert adapter.read_bytes() == before


def test_a_data_set_that_is_missing_is_told_before_the_first_run(
    script, flags, published, tmp_path, is_one_line
):
    result = script(
        *("train", *flags, "--data-root", published, "--dataset", "dtd,sun397"),
        *("--out", tmp_path / "runs"),
    )
    assert is_one_line(
        result, "no split_zhou_SUN397.json", f"put into {published / 'sun397'}: SUN397/"
    )
    assert not (tmp_path / "runs").exists()
