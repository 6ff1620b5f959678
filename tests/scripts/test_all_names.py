"""Every method among all names at once, and what a run keeps of its answers to test pictures."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import byhand
import pytest
import torch
from safetensors.torch import load_file, save_file

import clip_min
from clip_min import CLIP, CLIPConfig, UserError
from clip_min.model import VisionTower
from fewshot import predictions
from fewshot.batches import Batches
from fewshot.pictures import Pictures, Reader
from fewshot.predictions import predict_task, score
from fewshot.task import Task
from fewshot.task import Test as Part  # pytest would take the name for a test
from methods import METHODS
from methods.support import WithSupport

NAMES = {
    "base": ["rose", "red tulip", "ox-eye daisy", "bird of paradise"],
    "novel": ["sweet pea", "moon orchid", "tiger lily", "dahlia", "red rose", "fern"],
}
ALL = [name for names in NAMES.values() for name in names]
SIZES = {"base": 70, "novel": 9}  # pictures: of base more than a batch
VARIANTS = {
    "zero_shot": [{"templates": "a {}.|the {}!"}],
    "clip_adapter": [{"adapters": "both"}, {"depth_head": True}],
    "projection": [{"activation": "relu"}],
    "gda": [{"novel": "neighbours"}],
    "coop": [{"class_specific": True}, {"position": "front"}, {"depth_head": True}],
    "vpt": [{"head": "linear"}, {"deep": True}],
    "finetune": [{"train": "last-1"}],
    "lora": [{"blocks": "1", "towers": "image"}],
}
CASES = [
    pytest.param(name, settings, id=f"{name} {settings or ''}")
    for name in METHODS
    if not METHODS[name].transductive
    for settings in [{}, *VARIANTS.get(name, [])]
]


def learned(name: str, settings: dict, features: int = 3):
    """A method of the base names that has learned something, whatever it is."""
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(32, 32, 8, 64, 2, 2, 64, 2, 2)).eval()
    kind = METHODS[name]
    method = kind(clip, NAMES["base"], "a photo of a {}.", kind.Settings(**settings))
    if isinstance(method, WithSupport):  # images of three of the four base classes
        features = torch.randn(6, 32)
        labels = torch.tensor([0, 1, 2, 0, 1, 2])
        method.remember(SimpleNamespace(encoded=lambda _: features, labels=labels))
    with torch.no_grad():
        for tensor in method.adapter_state().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape)
    return method.eval()


@pytest.fixture
def task() -> Task:
    rng, tests = torch.Generator().manual_seed(3), {}
    for part, names in NAMES.items():
        pixels = torch.randint(0, 256, (SIZES[part], 3, 32, 32), generator=rng, dtype=torch.uint8)
        labels = torch.randint(0, len(names), (SIZES[part],), generator=rng)
        batches = Batches(Pictures(pixels, labels), pixels, Reader(32, folder=None))
        tests[part] = Part(names, batches)
    return Task(NAMES["base"], "a photo of a {}.", None, None, tests, [])


def straightforward(method, names: list[str], test: Part) -> torch.Tensor:
    """Logits (N, K) of a method made for these names, one picture at a time."""
    known = method.for_classes(names) if method.names_unseen else method
    pixels = test.batches.pixels
    with known.inference():
        rows = [known(clip_min.normalize(one, config=method.clip.config)[None]) for one in pixels]
    return torch.cat(rows)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_one_pass_answers_as_a_method_for_each_list_of_names(name, settings, task, monkeypatch):
    method, seen = learned(name, settings), []
    expected = {}
    for part, test in task.tests.items() if method.names_unseen else [("base", task.tests["base"])]:
        expected[part] = {"": straightforward(method, test.classnames, test)}
        if method.names_unseen:
            expected[part]["joint_"] = straightforward(method, ALL, test)
    real = VisionTower.embed
    monkeypatch.setattr(VisionTower, "embed", lambda t, x: seen.append(len(x)) or real(t, x))
    found = predict_task(method, task)
    pictures = sum(SIZES[part] for part in expected)
    # Of vectors in the middle of the towers `keeps` looks at one picture, to know their size.
    assert pictures <= sum(seen) <= pictures + len(expected), "more than one pass of the tower"
    assert found.keys() == expected.keys()
    for part, kinds in expected.items():
        of = found[part]
        for kind, logits in kinds.items():
            top = getattr(of, f"{kind}top")
            assert top.dtype == torch.int32
            assert torch.equal(top, logits.topk(min(5, logits.shape[1])).indices.int())
            probabilities = logits.softmax(dim=1).gather(1, top.long())
            torch.testing.assert_close(
                getattr(of, f"{kind}probabilities"), probabilities.float(), atol=1e-5, rtol=1e-4
            )
        assert torch.equal(of.labels, task.tests[part].batches.labels.int())
    scores = score(found, NAMES)
    if not method.names_unseen:
        assert scores["joint"] is None
        return
    right = {}
    for part, first in (("base", 0), ("novel", 4)):
        labels = task.tests[part].batches.labels
        own, joint = (expected[part][kind].argmax(dim=1) for kind in ("", "joint_"))
        assert scores[part] == pytest.approx(100 * (own == labels).double().mean().item())
        right[part] = 100 * (joint == labels + first).double().mean().item()
        assert scores["joint"][part] == pytest.approx(right[part])
    total = sum(right.values())
    hm = 2 * right["base"] * right["novel"] / total if total else 0
    assert scores["joint"]["hm"] == pytest.approx(hm)


def test_gaussians_of_neighbours_depend_on_which_classes_are_new(task):
    """Here a base class has no images and so is new among all names: columns would be wrong."""
    method = learned("gda", {"novel": "neighbours"})
    test = task.tests["novel"]
    apart = straightforward(method, NAMES["novel"], test)
    assert (straightforward(method, ALL, test)[:, 4:] - apart).abs().max() > 1e-3
    assert not method.logits_apart


# ------------------------------------------------------------------------------------ a run's file


def by_hand(tensors: dict, row: str, names: dict[str, list[str]]) -> dict:
    """Accuracies from the tensors of a file, a picture at a time."""
    found, first = {"joint": {}, "classes": {}}, 0
    for part in ("base", "novel"):
        labels, top = tensors[f"{part}/labels"].tolist(), tensors[f"{row}/{part}/top"].tolist()
        joint = tensors[f"{row}/{part}/joint_top"].tolist()
        right = [guesses[0] == label for guesses, label in zip(top, labels, strict=True)]
        found[part] = 100 * sum(right) / len(right)
        jointly = [g[0] == first + label for g, label in zip(joint, labels, strict=True)]
        found["joint"][part] = 100 * sum(jointly) / len(jointly)
        for k, name in enumerate(names[part]):
            of = [r for r, label in zip(right, labels, strict=True) if label == k]
            found["classes"][name] = 100 * sum(of) / len(of)
        first += len(names[part])
    return found


def hm(of: dict) -> float:
    return 2 * of["base"] * of["novel"] / (of["base"] + of["novel"])


def test_every_accuracy_of_a_run_follows_from_its_predictions(trained):
    results = json.loads((trained.path / "results.json").read_text())
    names = json.loads((trained.path / "config.json").read_text())["classnames"]
    kept = load_file(trained.path / predictions.FILE)
    for row, scores in (("lora", results), ("zero-shot", results["zero_shot"])):
        found = by_hand(kept, row, names)
        for part in ("base", "novel"):
            assert scores[part] == pytest.approx(found[part])
            assert scores["joint"][part] == pytest.approx(found["joint"][part])
        assert scores["hm"] == pytest.approx(hm(found))
        assert scores["joint"]["hm"] == pytest.approx(hm(found["joint"]))
    classes = {n: c["accuracy"] for p in results["parts"].values() for n, c in p["classes"].items()}
    assert classes == by_hand(kept, "lora", names)["classes"]
    rows = predictions.read(trained.path / predictions.FILE, names)
    for row, scores in (("lora", results), ("zero-shot", results["zero_shot"])):
        for key, value in score(rows[row], names).items():
            if key != "parts" or row == "lora":
                assert scores[key] == value  # to the bit


def test_predictions_are_of_the_test_pictures_in_the_order_of_the_record(trained, data):
    """Each picture of data.json, by the merged CLIP that export would write."""
    record = json.loads((trained.path / "data.json").read_text())["test"]
    config = json.loads((trained.path / "config.json").read_text())
    names = config["classnames"]
    everything = [name for of in names.values() for name in of]
    rows = predictions.read(trained.path / predictions.FILE, names)
    assert list(rows) == ["lora", "zero-shot"]
    ways = {"lora": byhand.merged_clip(trained.path), "zero-shot": clip_min.load(config["model"])}
    counts = [len(rows["lora"][part].labels) for part in names]
    assert sum(counts) == len(record)
    for part, files in (("base", record[: counts[0]]), ("novel", record[counts[0] :])):
        for row, clip in ways.items():
            of = rows[row][part]
            assert [names[part][k] for k in of.labels.tolist()] == [name for _, name, _ in files]
            paths = [data / file for file, *_ in files]
            for kind, among in (("", names[part]), ("joint_", everything)):
                logits = byhand.logits(clip, paths, among)
                best = logits.topk(min(5, len(among)))
                top, likely = (getattr(of, f"{kind}{k}") for k in ("top", "probabilities"))
                assert top.tolist() == best.indices.tolist()
                expected = logits.softmax(dim=1).gather(1, best.indices)
                torch.testing.assert_close(likely, expected, atol=1e-4, rtol=1e-3)


def test_equal_runs_leave_equal_predictions(trained, train, tmp_path):
    again = train(tmp_path)
    one, two = (path / predictions.FILE for path in (trained.path, again))
    assert one.read_bytes() == two.read_bytes()


def test_all_classes_together_are_one_part(train, tmp_path):
    run = train(tmp_path, "--classes", "all")
    names = json.loads((run / "config.json").read_text())["classnames"]
    kept = load_file(run / predictions.FILE)
    of = [f"{row}/all/{kind}" for row in ("lora", "zero-shot") for kind in ("probabilities", "top")]
    assert sorted(kept) == ["all/labels", *of]
    scores = score(predictions.read(run / predictions.FILE, names)["lora"], names)
    assert scores["all"] == json.loads((run / "results.json").read_text())["all"]


def test_a_run_of_zero_shot_keeps_its_own_templates_beside_the_plain_one(
    script, data, model, tmp_path
):
    where = ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path)
    more = ("--method", "zero_shot", "--templates", "no {} here|a {}, or not")
    assert script("train", *more, *where).code == 0
    (file,) = tmp_path.rglob(predictions.FILE)
    names = json.loads((file.parent / "config.json").read_text())["classnames"]
    rows = predictions.read(file, names)
    assert list(rows) == ["zero-shot", "zero_shot"]
    one, two = (rows[row]["base"].probabilities for row in rows)
    assert not torch.equal(one, two)


def test_tasks_that_are_labelled_jointly_leave_no_predictions(script, data, model, tmp_path):
    where = ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path)
    result = script("train", "--method", "em_dirichlet", "--tasks", 2, "--k-eff", 2, *where)
    assert result.code == 0, result.err
    assert not list(tmp_path.rglob(predictions.FILE))
    assert result.out.count(" n/a\n") == 2


DAMAGES = [
    "missing",
    "cut",
    "class",
    "label",
    "shape",
    "type",
    "nan",
    "part",
    "half",
    "lost",
    "joint",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_predictions_of_something_else_are_one_line(damage, trained, tmp_path):
    file = Path(shutil.copy(trained.path / predictions.FILE, tmp_path))
    names = json.loads((trained.path / "config.json").read_text())["classnames"]
    kept = load_file(file)
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        if damage == "class":
            kept["lora/base/joint_top"][2, 3] = 5
        elif damage == "label":
            kept["novel/labels"][0] = -1
        elif damage == "shape":
            kept["lora/base/top"] = kept["lora/base/top"][1:]
        elif damage == "type":
            kept["lora/base/top"] = kept["lora/base/top"].float()
        elif damage == "nan":
            kept["lora/base/probabilities"][0, 0] = torch.nan
        elif damage == "part":
            kept["lora/all/top"] = kept["lora/base/top"].clone()
        elif damage == "joint":
            del kept["lora/novel/joint_top"]
        elif damage == "half":
            del kept["lora/base/top"]
        else:
            del kept["base/labels"]
        save_file(kept, file)
    with pytest.raises(UserError, match=predictions.FILE) as error:
        predictions.read(file, names)
    assert "\n" not in str(error.value)
