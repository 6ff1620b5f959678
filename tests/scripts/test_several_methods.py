"""Several methods in one command: each run is the one it is alone; a table ends them."""

import json
from pathlib import Path

import pytest

from fewshot.experiment import Experiment
from fewshot.metrics import accuracy_on
from fewshot.run import Run
from methods.interop.load import trained

BASE = Path("noise/tiny")
NAMES = ["lora", "coop", "tip_adapter", "linear_probe"]
FEW = ("--epochs", 3, "--batch-size", 4, "--patience", 0, "--shots", 4)


@pytest.fixture(scope="module")
def where(data, model) -> list:
    return ["--dataset", "folder", "--data-root", data, "--model", model]


@pytest.fixture(scope="module")
def together(script, where, tmp_path_factory):
    """A comparison that went well: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("together")
    more = ("--lr", 0.01, "--image-rank", 4)  # the rank is LoRA's alone
    result = script("train", "--method", ",".join(NAMES), *where, *FEW, *more, "--out", out)
    assert result.code == 0, result.err
    return out, result.out


@pytest.mark.parametrize("name", NAMES)
def test_each_run_is_the_one_it_is_alone(name, together, script, where, tmp_path):
    own = {"lora": (*FEW, "--lr", 0.01, "--image-rank", 4), "coop": (*FEW, "--lr", 0.01)}
    own = own.get(name, ("--shots", 4))
    result = script("train", "--method", name, *where, *own, "--out", tmp_path)
    assert result.code == 0, result.err
    found = [out / BASE / f"{name}-s4-seed1" for out in (together[0], tmp_path)]
    for file in ("adapter.safetensors", "predictions.safetensors", "data.json"):
        one, other = ((folder / file).read_bytes() for folder in found)
        assert one == other
    one, other = (json.loads((folder / "results.json").read_text()) for folder in found)
    for varies in ("seconds", "peak_memory_mb"):
        assert one.pop(varies) >= 0
        assert other.pop(varies) >= 0
    assert one == other


def test_the_validation_accuracy_is_that_of_the_saved_adapter(script, tmp_path):
    """Of Tip-Adapter-F, which searches α and β once more after its last epoch."""
    flags = ("--method", "tip_adapter_f", "--shots", 2, "--seed", 3, "--epochs", 1)
    result = script("train", *flags, "--out", tmp_path)
    assert result.code == 0, result.err
    path = tmp_path / "demo/demo/tip_adapter_f-s2-seed3"
    found = json.loads((path / "results.json").read_text())["val"]
    run = Run.open(path)
    clip, task = Experiment(**run.config["experiment"]).load(None)
    assert accuracy_on(trained(run, clip), task.val) == found
    logged = max(json.loads(line)["val"] for line in (path / "log.jsonl").open())
    assert logged != found  # else this test could not fail


def test_it_tells_how_long_it_takes_and_ends_with_a_table_and_advice(together):
    out, printed = together
    lines = printed.splitlines()
    assert lines[0].startswith("lora, coop, tip_adapter, linear_probe on folder, model ")
    assert "lora: recipe default, with lr 0.01, epochs 3" in printed
    assert "tip_adapter: recipe default\n" in printed
    told = next(i for i, line in enumerate(lines) if line.startswith("about "))
    assert all(name in lines[told] for name in NAMES)
    assert told < lines.index("run 1/4: noise/tiny/lora-s4-seed1")
    file = out / BASE / "compare-s4-seed1.json"
    assert lines[-1] == f"comparison: {file}"
    found = json.loads(file.read_text())
    assert found["methods"].keys() == {*NAMES}
    assert found["methods"]["lora"]["settings"]["image_rank"] == 4
    rows, advice = (found["shots"]["4"][key] for key in ("rows", "advice"))
    assert lines[-2] == advice
    assert rows.keys() == {*NAMES, "zero-shot"}
    val = [row["val"]["mean"] for row in rows.values()]
    assert val == sorted(val, reverse=True)
    assert advice.startswith(f"Take {next(iter(rows)).replace('zero-shot', 'zero-shot CLIP')}: ")
    for name in NAMES:
        run = json.loads((out / BASE / f"{name}-s4-seed1/results.json").read_text())
        assert rows[name]["base"]["mean"] == run["base"]
        assert rows[name]["val"]["mean"] == run["val"]
        assert rows["zero-shot"]["val"]["mean"] == run["zero_shot"]["val"]


def test_seeds_and_shots_give_a_table_for_each_number_of_shots(script, where, tmp_path):
    flags = ("--method", "coop,gda", "--shots", "2,4", "--seeds", "1,2", "--epochs", 1)
    result = script("train", *where, *flags, "--out", tmp_path)
    assert result.code == 0, result.err
    assert "run 8/8: " in result.out
    assert "\nfolder, 2 shots, mean ± standard deviation of seeds 1, 2\n" in result.out
    assert "\nfolder, 4 shots, mean ± standard deviation of seeds 1, 2\n" in result.out
    found = json.loads((tmp_path / BASE / "compare-s2-4-seed1-2.json").read_text())
    assert found["shots"].keys() == {"2", "4"}
    assert len(found["shots"]["2"]["rows"]["coop"]["val"]["values"]) == 2
    again = script("train", *where, *flags, "--out", tmp_path, "--resume")
    assert again.code == 0, again.err
    assert again.out.count("finished before") == 8
    assert again.out.splitlines()[-12:] == result.out.splitlines()[-12:]


def test_several_data_sets_end_with_their_mean(script, published, model, tmp_path):
    flags = ("--method", "gda,zero_shot", "--dataset", "dtd,food101", "--classes", "all")
    flags += ("--data-root", published, "--model", model, "--shots", 1, "--out", tmp_path)
    result = script("train", *flags)
    assert result.code == 0, result.err
    assert "\nmean of 2 data sets, 1 shot\n" in result.out
    file = tmp_path / "dtd,food101-all/tiny/compare-s1-seed1.json"
    found = json.loads(file.read_text())
    assert found["datasets"] == ["dtd", "food101"]
    each = [
        json.loads((tmp_path / f"{name}-all/tiny/gda-s1-seed1/results.json").read_text())["all"]
        for name in found["datasets"]
    ]
    assert found["shots"]["1"]["gda"]["all"]["mean"] == pytest.approx(sum(each) / 2)


def test_a_budget_leaves_out_what_does_not_fit(script, where, tmp_path, is_one_line):
    flags = ("--method", "lora,gda", *FEW[-2:], "--out", tmp_path)
    result = script("train", *where, *flags, "--budget", "0.001s")
    assert result.code == 0, result.err
    assert "left out, since they do not fit: lora (about " in result.out
    assert [path.name for path in (tmp_path / BASE).glob("*-seed1")] == ["gda-s4-seed1"]
    assert is_one_line(
        script("train", *where, "--method", "lora,coop", "--budget", "0", "--out", tmp_path),
        "--budget: 0 s are too short",
    )


def test_all_is_every_method_that_can_be_compared():
    from methods import METHODS
    from methods.interop.command import COMPARED as found

    for name in METHODS:
        apart = METHODS[name].transductive or name in ("zero_shot", "disef", "disef_f1")
        assert (name in found) == (not apart)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--method", "lora,cop"), ("--method", "cop", "did you mean coop?")),
        (
            ("--method", "lora,em_dirichlet"),
            ("em_dirichlet labels test images jointly", "run it separately"),
        ),
        (("--method", "lora,gda", "--recipe", "notebook"), ("gda: --recipe notebook: unknown",)),
        (("--method", "lora,gda", "--init-from", "x"), ("--init-from works with a single method",)),
        (("--method", "lora", "--budget", "5m"), ("--budget needs several methods",)),
        (("--method", "lora,gda", "--budget", "soon"), ("--budget", "'soon'", "90s, 10m or 2h")),
        (("--method", "lora,gda", "--n-ctx", "4"), ("unknown argument --n-ctx",)),
        (("--method", "gda,lora", "--lr", "-1"), ("--lr -1.0",)),
    ],
)
def test_what_is_wrong_is_told_in_a_line(flags, said, script, where, is_one_line, tmp_path):
    assert is_one_line(script("train", *where, *flags, "--out", tmp_path), *said)
    assert list(tmp_path.iterdir()) == []
