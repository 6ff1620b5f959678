"""Every method from the command line: it trains, repeats, learns, and is tested again."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clip_min
from fewshot import demo
from fewshot.batches import Batches
from fewshot.pictures import Pictures, Reader
from methods import METHODS, TrainingSettings
from methods.support import WithSupport

SHORT = ("--epochs", 2, "--batch-size", 4)
VARIANTS = {  # what a method can do beside its defaults, and whether it then names novel classes
    "zero_shot": [(("--templates", "a {}.|the {}"), True)],
    "linear_probe": [((), False), (("--c", 0.1), False)],
    "clip_adapter": [
        ((), True),
        (("--recipe", "jclip", "--learn-ratio"), True),
        (("--depth-head",), True),
    ],
    "projection": [((), True), (("--objective", "contrastive", "--activation", "relu"), True)]
    + [((*flags, "--tower-lr", 1e-4), True) for flags in ((), ("--head", "attention"))],
    "tip_adapter": [((), True), (("--recipe", "paper", "--views", 2), True)],
    "tip_adapter_f": [((), True), (("--recipe", "paper", "--views", 2), True)],
    "gda": [((), True), (("--recipe", "paper", "--views", 2), True)],
    "prolip": [((), True), (("--penalty", 0.5), True)],
    "cross_modal": [((), False), (("--recipe", "paper"), False)],
    "lp_plus_plus": [((), False), (("--start", "published", "--steps", 25), False)],
    "vpt": [
        (("--n-tokens", 3, "--deep"), True),
        (("--n-tokens", 3, "--recipe", "paper", "--warmup-epochs", 1), False),
        (("--recipe", "mri"), False),
    ],
    "two_stage": [((), True), (("--first-stage", 0.2, "--layer-norms", "blocks"), True)],
    "kgcoop": [(("--recipe", "dept"), True)],
    "finetune": [
        ((), True),
        (("--recipe", "contrastive", "--train", "last-1"), True),
        (("--recipe", "skip-tuning", "--train", "last-1"), True),
    ],
    "em_dirichlet": [
        (("--tasks", 5, "--k-eff", 2), True),
        (("--tasks", 5, "--recipe", "few-shot", "--assignment", "hard"), True),
    ],
    "transclip": [((), True), (("--recipe", "few-shot", "--tasks", 5, "--k-eff", 2), True)],
}
CASES = [
    pytest.param(method, more, names, id=" ".join([method, *map(str, more)]))
    for method, variants in VARIANTS.items()
    for more, names in variants
]


def table_lines(out: str) -> list[str]:
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == ["base"])
    return lines[first : first + 3]


def short(method: str) -> tuple:
    return SHORT if hasattr(METHODS[method].Settings, "epochs") else ()


@pytest.fixture
def run(script, data, model, tmp_path):
    """(method, *flags) -> the folder of a short training, and what it printed."""

    def call(method: str, *more, root=data, out="runs") -> SimpleNamespace:
        where = ("--dataset", "folder", "--data-root", root, "--model", model, "--shots", 4)
        flags = (*where, *short(method), *more, "--out", tmp_path / out)
        result = script("train", "--method", method, *flags)
        assert result.code == 0, result.err
        (file,) = (tmp_path / out).rglob("results.json")
        return SimpleNamespace(path=file.parent, out=result.out)

    return call


@pytest.mark.parametrize(("method", "more", "names_novel"), CASES)
def test_it_trains_repeats_to_the_byte_and_is_tested_again(method, more, names_novel, run, script):
    one, two = (run(method, *more, out=out) for out in ("one", "two"))
    files = [(each.path / "adapter.safetensors").read_bytes() for each in (one, two)]
    assert files[0] == files[1]
    found = json.loads((one.path / "results.json").read_text())
    row = table_lines(one.out)[2].split()
    assert row[0] == method
    jointly = f"{found['joint']['hm']:.2f}" if found["joint"] else "n/a"
    assert (found["joint"] is not None) == (names_novel and not METHODS[method].transductive)
    if names_novel:
        assert row[1:] == [*(f"{found[part]:.2f}" for part in ("base", "novel", "hm")), jointly]
    else:
        assert row[1:] == [f"{found['base']:.2f}", *["n/a"] * 3]
        assert found["novel"] is found["hm"] is None
    result = script("eval", "--run", one.path)
    assert result.code == 0, result.err
    assert table_lines(result.out) == table_lines(one.out)
    jointly = "95 % intervals" in one.out or "labelled jointly" in one.out
    assert jointly == METHODS[method].transductive
    if issubclass(METHODS[method], WithSupport) and not METHODS[method].transductive:
        kept, views = load_file(one.path / "adapter.safetensors"), 1
        if method == "gda" and more:
            views = 2  # each kept
        assert kept["support"].shape == (12 * views, 32)
        assert kept["support_labels"].tolist() == sorted([0, 1, 2] * 4) * views


FEW = {  # what keeps a paper recipe short
    "lora": ("--steps-per-shot", 1),
    "two_stage": ("--steps-per-shot", 1),
    "tip_adapter": ("--views", 1),
    "tip_adapter_f": ("--views", 1),
    "gda": ("--views", 1),
    "em_dirichlet": ("--tasks", 3, "--k-eff", 2),
}


@pytest.mark.parametrize("method", [m for m in METHODS if "paper" in METHODS[m].recipes])
def test_every_paper_recipe_trains(method, run, synthetic):
    more = FEW.get(method, ())
    if method == "disef":
        more = ("--synthetic", synthetic(shots=4), "--per-class", 2)
    config = json.loads((run(method, "--recipe", "paper", *more).path / "config.json").read_text())
    assert config["recipe"] == "paper"


@pytest.mark.parametrize(
    "method",
    ["linear_probe", "tip_adapter", "tip_adapter_f", "gda", "cross_modal", "lp_plus_plus"],
)
def test_test_pictures_choose_nothing(method, run, data, draw, tmp_path):
    """What is searched or stopped early on validation stays as it is in front of other tests."""
    moved = tmp_path / "noise"
    shutil.copytree(data, moved)
    shutil.rmtree(moved / "test")
    draw(moved / "test", 3, seed=99)
    for name in ("amber_lily", "blue-bell", "cyan lotus"):
        Image.new("RGB", (40, 36), "white").save(moved / "test" / name / "0.png")
    runs = [run(method, root=root, out=root.parent.name) for root in (data, moved)]
    files = [(each.path / "adapter.safetensors").read_bytes() for each in runs]
    assert files[0] == files[1]
    results = [json.loads((each.path / "results.json").read_text()) for each in runs]
    assert results[0]["parts"] != results[1]["parts"]  # other pictures they were


@pytest.mark.parametrize("method", ["tip_adapter", "gda", "clip_adapter", "em_dirichlet"])
def test_pictures_are_classified_among_any_names(method, run, script, data):
    """A new name and a learned one."""
    path, picture = run(method).path, data / "test/blue-bell/0.png"
    result = script("eval", "--run", path, "--image", picture, "--classes", "fern,blue bell")
    assert result.code == 0, result.err
    shown = [line.split(" %  ") for line in result.out.splitlines()[1:]]
    assert sorted(name for _, name in shown) == ["blue bell", "fern"]
    assert sum(float(percent) for percent, _ in shown) == pytest.approx(100, abs=0.02)


@pytest.fixture
def other_place(data, model, tmp_path) -> tuple:
    """The flags of a run on the same task, in a folder of its own."""
    return ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path / "two")


@pytest.mark.parametrize(
    "method", ["linear_probe", "lp_plus_plus", "tip_adapter", "tip_adapter_f", "em_dirichlet"]
)
def test_what_starts_from_its_images_alone_takes_no_other_start(
    method, run, script, other_place, is_one_line
):
    made = run(method).path
    result = script("train", "--method", method, *other_place, "--init-from", made)
    assert is_one_line(result, f"--init-from {made}", "from the training images")
    assert not other_place[-1].exists()


@pytest.mark.parametrize(
    ("method", "made_with"),
    [
        ("vpt", ("--first-block", 1)),
        ("clip_adapter", ("--ratio", 0.5)),
        ("projection", ("--activation", "relu")),
    ],
)
def test_a_start_that_means_something_else_here_is_one_line_with_the_flag_to_give(
    method, made_with, run, script, other_place, is_one_line
):
    made = run(method, *made_with).path
    start = (*other_place, "--epochs", 1, "--init-from", made)
    assert is_one_line(script("train", "--method", method, *start), " ".join(map(str, made_with)))
    assert script("train", "--method", method, *start, *made_with).code == 0


def test_templates_that_cannot_be_are_one_line(script, data, model, tmp_path, is_one_line):
    where = ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path)
    for method in ("zero_shot", "clip_adapter"):
        result = script("train", "--method", method, *where, "--templates", "nowhere.txt")
        assert is_one_line(result, "--templates nowhere.txt: cannot be read as a text file")
    result = script("eval", "--method", "zero_shot", *where[:-2], "--templates", "a {}|flower")
    assert is_one_line(result, "--templates: 'flower' has no {}")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def flowers() -> SimpleNamespace:
    """Sixteen pictures of eight species of the demo task."""
    images, labels = demo.split("train")
    chosen = torch.cat([(labels == k).nonzero().flatten()[:2] for k in range(8)])
    pictures = Pictures(images[chosen], labels[chosen])
    batches = Batches(pictures, pictures.source, Reader(64, folder=None))
    return SimpleNamespace(batches=batches, names=demo.CLASSNAMES[:8])


LEARNERS = [name for name, m in METHODS.items() if issubclass(m.Settings, TrainingSettings)]


@pytest.mark.parametrize("name", LEARNERS)
def test_the_loss_falls_on_the_demo_task(name, flowers):
    """Ten steps of the demo recipe's own optimizer and rate, on sixteen pictures."""
    kind = METHODS[name]
    recipe = "demo" if "demo" in kind.recipes else next(iter(kind.recipes))
    settings = kind.Settings(**kind.recipes[recipe])
    torch.manual_seed(1)
    method = kind(clip_min.load("demo"), flowers.names, demo.TEMPLATE, settings)
    if isinstance(method, WithSupport):
        method.remember(flowers.batches)
        method.alpha.fill_(2.0)
        method.beta.fill_(4.0)
    learned = [tensor for tensor in method.adapter_state().values() if tensor.requires_grad]
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(learned, settings.lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(learned, settings.lr, eps=settings.eps)
    x = flowers.batches.inputs(method, torch.arange(16))

    def loss() -> float:
        with method.inference():
            torch.manual_seed(0)  # cross-modal draws texts
            return method.loss(x, flowers.batches.labels).item()

    before = loss()
    method.train()
    for _ in range(10):
        optimizer.zero_grad()
        method.loss(x, flowers.batches.labels).backward()
        optimizer.step()
    assert loss() < 0.98 * before
