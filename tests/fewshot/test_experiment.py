"""An experiment's settings, where its run belongs, how it is scored, and how a script ends."""

import contextlib
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clip_min import UserError
from clip_min.errors import Note
from fewshot import demo
from fewshot import experiment as module
from fewshot.batches import Batches
from fewshot.experiment import Experiment, evaluate, peak_memory_mb, run_script
from fewshot.pictures import Reader
from fewshot.task import Task
from fewshot.task import Test as Part  # pytest would take the name for a test

SMALL = SimpleNamespace(parameters=lambda: [torch.zeros(1)])  # a CLIP, as far as threads go
LARGE = SimpleNamespace(parameters=lambda: [torch.zeros(1).expand(10**8)])


@pytest.mark.parametrize(
    ("dataset", "model"), [("demo", "demo"), ("folder", "ViT-B/16"), ("flowers102", "ViT-B/16")]
)
def test_a_data_set_implies_a_model_unless_one_is_given(dataset, model):
    assert Experiment(dataset).model == model
    assert Experiment(dataset, model="my.safetensors").model == "my.safetensors"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("dataset", "fodler", "did you mean folder"),
        ("shots", 0, "1 or more"),
        ("shots", -3, "1 or more"),
        ("shots", "many", "1 or more, or all"),
        ("seed", -1, "0 to 4294967295"),
        ("seed", 2**32, "0 to 4294967295"),
        ("device", "warp", "cannot be used"),
        ("device", "cuda:99", "cannot be used"),
        ("device", "meta", "cannot be used"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_that_names_its_flag(field, value, expected):
    with pytest.raises(UserError, match=f"--{field} {value}: ") as error:
        Experiment(**{field: value})
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_there_is_told_before_pictures_are_read(monkeypatch):
    monkeypatch.setattr(Experiment, "load_dataset", lambda _: pytest.fail("were read"))
    with pytest.raises(UserError, match="ViT-B/61: neither a weights file nor .* ViT-B/16"):
        Experiment(model="ViT-B/61").load()


@pytest.mark.parametrize(("device", "chosen"), [("cpu", []), ("cuda", []), ("cuda:1", ["cuda:1"])])
def test_the_gpu_asked_for_is_the_one_whose_memory_is_measured(device, chosen, monkeypatch):
    found = []
    monkeypatch.setattr(torch, "empty", lambda size, device: None)  # a GPU that is there
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    Experiment(device=device).prepare(SMALL)
    assert found == chosen


def test_fp32_is_fp32_in_the_patch_embedding_of_a_gpu_too(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    Experiment().prepare(SMALL)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_nothing_is_set_before_it_is_prepared_and_loading_changes_no_setting(request, monkeypatch):
    black = torch.zeros(1020, 3, 64, 64, dtype=torch.uint8), torch.arange(1020) // 10
    monkeypatch.setattr(demo, "split", lambda name: black)
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(2)
    torch.backends.cudnn.allow_tf32 = True
    experiment = Experiment(shots=1, device="cpu")
    before = asdict(experiment)
    clip, task = experiment.load(None)
    assert asdict(experiment) == before
    assert task.template == "a photo of a {}, a type of flower."
    assert replace(experiment, template="my {}").load(None)[1].template == "my {}"
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == (2, True)
    experiment.prepare(clip)
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == (1, False)
    replace(experiment, threads=2).prepare(clip)
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(module, "THREADS", 3)
    experiment.prepare(clip)
    experiment.prepare(LARGE)  # in the same process, after a small model
    assert torch.get_num_threads() == 3


def test_a_gpu_that_the_run_does_not_use_is_not_touched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    touched = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: touched.append(1))
    module.forget_peak()
    assert not touched
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    module.forget_peak()
    assert touched


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({}, "demo/demo/lora-s10-seed1"),
        ({"shots": 4, "seed": 7}, "demo/demo/lora-s4-seed7"),
        ({"shots": "all"}, "demo/demo/lora-sall-seed1"),
        ({"dataset": "flowers102"}, "flowers102/ViT-B-16/lora-s10-seed1"),
        ({"model": "ViT-L/14@336px"}, "demo/ViT-L-14@336px/lora-s10-seed1"),
        ({"model": "sub/mine.v2.safetensors"}, "demo/mine.v2/lora-s10-seed1"),
        ({"model": "sub/open_clip_model.safetensors"}, "demo/sub/lora-s10-seed1"),
        ({"model": "model.safetensors"}, "demo/here/lora-s10-seed1"),
        ({"model": "sub"}, "demo/sub/lora-s10-seed1"),
        ({"model": "laion/CLIP-X"}, "demo/laion-CLIP-X/lora-s10-seed1"),
        ({"model": "../here/sub/pytorch_model.bin"}, "demo/sub/lora-s10-seed1"),
        ({"classes": "all"}, "demo-all/demo/lora-s10-seed1"),
        ({"dataset": "folder", "data_root": "/x/birds/"}, "birds/ViT-B-16/lora-s10-seed1"),
        ({"dataset": "folder", "data_root": "."}, "here/ViT-B-16/lora-s10-seed1"),
        ({"dataset": "folder", "data_root": "sub/.."}, "here/ViT-B-16/lora-s10-seed1"),
    ],
)
def test_a_run_belongs_under_data_model_method_shots_and_seed(
    settings, folder, tmp_path, monkeypatch
):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for file in ("mine.v2.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"):
        Path("sub", file).touch()
    Path("model.safetensors").touch()
    assert Experiment(**settings).folder("lora") == Path(folder)


NAMES = [f"6-{k}" for k in range(6)] + [f"7-{k}" for k in range(7)]  # of base and of novel


class Rigged:
    """Says, of every picture, the class that its first value names; but that of the second, if it
    may choose it.
    """

    encoder = None  # nothing is kept
    names_unseen = logits_apart = True

    def __init__(self, classnames):
        self.classnames = classnames

    def for_classes(self, classnames):
        return Rigged(classnames)

    @contextlib.contextmanager
    def inference(self):
        yield

    def encode(self, images):
        return images

    def classify(self, images):
        numbers = torch.tensor([NAMES.index(name) for name in self.classnames])  # (K,)
        first, second = (images[:, i, 0, 0].mul(100).round()[:, None] for i in range(2))  # (B, 1)
        return (numbers == first) * 1.0 + (numbers == second) * 2.0 - numbers / 100


@pytest.fixture
def task(monkeypatch):
    """Six base and seven novel classes; what is guessed and what is true are both given.

    A base picture is also drawn to the novel class of this number, a novel one to a base class; 9:
    to none.
    """

    def test(part: int, guesses: list[int], labels: list[int], drawn: list[int]) -> Part:
        own, others = (0, 6) if part == 6 else (6, 0)  # where each half begins
        pixels = torch.zeros(len(labels), 3, 2, 2)
        pixels[:, 0, 0, 0] = (own + torch.tensor(guesses)) / 100
        pixels[:, 1, 0, 0] = torch.tensor([99 if k == 9 else others + k for k in drawn]) / 100
        batches = Batches(SimpleNamespace(labels=torch.tensor(labels)), pixels, Reader(2))
        monkeypatch.setattr(batches, "images", lambda chosen, augment="none": pixels[chosen])
        return Part([name for name in NAMES if name.startswith(f"{part}-")], batches)

    tests = {
        "base": test(6, [0, 0, 1, 2, 2, 5, 5, 3], [0, 1, 1, 2, 2, 5, 0, 4], [3, 3] + [9] * 6),
        "novel": test(7, [0, 1, 2, 3, 4], [0, 1, 2, 6, 0], [9, 0, 5, 5, 9]),
    }
    return Task(tests["base"].classnames, "a {}", None, None, tests, [])


def test_scores_are_percentages_of_each_part_among_its_own_names(task):
    scores, _ = evaluate(Rigged(task.classnames), task)
    assert scores["base"] == pytest.approx(100 * 5 / 8)
    assert scores["novel"] == pytest.approx(100 * 3 / 5)
    assert scores["hm"] == pytest.approx(2 * 62.5 * 60 / 122.5)
    assert scores["all"] is None
    base, novel = scores["parts"]["base"], scores["parts"]["novel"]
    assert (base["images"], novel["images"]) == (8, 5)
    assert base["top1"] == scores["base"]
    assert base["top5"] == 100  # the guess, and then the first of the others; 4 is the fifth
    assert novel["top5"] == pytest.approx(80)  # class 6 is never among five of seven
    assert list(novel["classes"]) == [f"7-{k}" for k in range(7)]
    assert base["classes"]["6-1"] == {"accuracy": 50.0, "f1": pytest.approx(200 / 3)}
    assert base["classes"]["6-3"] == {"accuracy": None, "f1": None}  # no pictures
    f1 = [c["f1"] for c in base["classes"].values() if c["f1"] is not None]
    assert base["macro_f1"] == pytest.approx(sum(f1) / 5)


@pytest.mark.parametrize("apart", [True, False])
def test_among_all_names_the_other_half_may_win(task, apart, monkeypatch):
    monkeypatch.setattr(Rigged, "logits_apart", apart)
    scores, found = evaluate(Rigged(task.classnames), task)
    assert scores["joint"] == {  # of each half's right ones, that many are drawn away
        "base": pytest.approx(100 * (5 - 1) / 8),
        "novel": pytest.approx(100 * (3 - 2) / 5),
        "hm": pytest.approx(2 * 50 * 20 / 70),
    }
    assert (scores["base"], scores["novel"]) == (62.5, 60)
    assert found["base"].joint_top[:3, :3].tolist() == [[9, 0, 1], [9, 0, 1], [1, 0, 2]]
    assert found["novel"].joint_top[1].tolist() == [0, 7, 1, 2, 3]
    assert found["novel"].top[1].tolist() == [1, 0, 2, 3, 4]  # among novel names alone
    logits = torch.tensor([-k / 100 + (k == 1) for k in range(7)]) - 0.06
    expected = logits.exp() / logits.exp().sum()
    torch.testing.assert_close(found["novel"].probabilities[1], expected[[1, 0, 2, 3, 4]])
    assert found["novel"].labels.tolist() == [0, 1, 2, 6, 0]


def test_a_method_that_cannot_name_new_classes_has_no_novel_score(task, monkeypatch):
    monkeypatch.setattr(Rigged, "names_unseen", False)
    scores, found = evaluate(Rigged(task.classnames), task)
    assert scores["base"] == pytest.approx(62.5)
    assert scores["novel"] is scores["hm"] is scores["joint"] is None
    assert list(scores["parts"]) == list(found) == ["base"]
    assert found["base"].joint_top is found["base"].joint_probabilities is None


def test_all_classes_have_one_score(task):
    task.tests = {"all": task.tests["base"]}
    scores, found = evaluate(Rigged(task.classnames), task)
    assert scores["all"] == pytest.approx(62.5)
    assert scores["base"] is scores["novel"] is scores["hm"] is scores["joint"] is None
    assert found["all"].joint_top is None


def test_peak_memory_is_in_megabytes_and_never_falls():
    before = peak_memory_mb()
    held = torch.ones(100_000_000 // 4)  # 100 MB
    assert 100 < before < 50_000
    assert peak_memory_mb() >= max(before, held.nbytes / 1e6)


def ends_with(error: BaseException | None, capsys) -> tuple[int, str]:
    """Exit code and stderr of a script that raises this."""

    def main():
        if error:
            raise error

    try:
        run_script(main)
    except SystemExit as ended:
        return ended.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/train.py"])
    code, said = ends_with(UserError("this is\n  wrong"), capsys)
    assert (code, said) == (2, "train.py: error: this is wrong\n")


def test_a_script_that_ends_well_says_nothing_and_one_that_is_interrupted_how_to_go_on(capsys):
    assert ends_with(None, capsys) == (0, "")
    code, said = ends_with(KeyboardInterrupt(), capsys)
    assert code == 130
    assert said == "\ninterrupted; run the same command again to go on\n"


def as_process(code: str, root) -> subprocess.Popen:
    """A script that runs this code as its main, with a pipe as stdout."""
    text = f"from fewshot.experiment import run_script\ndef main():\n    {code}\nrun_script(main)"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", text], cwd=root, env=env, text=True, **pipes)


def test_a_line_is_in_the_log_as_soon_as_it_is_printed(root):
    script = as_process("print('epoch 1'); input()", root)
    watchdog = threading.Timer(60, script.kill)
    watchdog.start()
    assert script.stdout.readline() == "epoch 1\n"  # while it waits for input
    watchdog.cancel()
    script.communicate("\n")


def test_a_reader_that_leaves_ends_the_script_without_a_traceback_and_not_as_done(root):
    script = as_process("input(); [print('epoch') for _ in range(100_000)]", root)
    script.stdout.close()
    script.stdin.write("\n")
    script.stdin.close()
    assert (script.wait(60), script.stderr.read()) == (1, "")
    script.stderr.close()


def test_a_note_of_the_model_is_a_line_and_other_warnings_stay_what_they_are(capsys):
    def main():
        warnings.warn("QuickGELU is assumed", Note, stacklevel=1)
        warnings.warn("of a library", DeprecationWarning, stacklevel=1)

    with pytest.warns(DeprecationWarning, match="of a library") as said:
        run_script(main)
    assert capsys.readouterr().out == "note: QuickGELU is assumed\n"
    assert len(said) == 1


def test_a_mistake_of_ours_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        ends_with(ZeroDivisionError(), capsys)
