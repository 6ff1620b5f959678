"""Methods that learn by gradient descent, killed between two epochs, end in the same bytes."""

import pytest

from fewshot.run import Run
from methods import METHODS, TrainingSettings

LEARNED_BY_DESCENT = [n for n, m in METHODS.items() if issubclass(m.Settings, TrainingSettings)]


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
@pytest.mark.parametrize("name", [*LEARNED_BY_DESCENT, "kgcoop --depth-head"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    name, augment, script, data, model, synthetic, tmp_path, monkeypatch
):
    flags = [
        *("--method", *name.split(), "--dataset", "folder", "--data-root", data, "--model", model),
        *("--shots", 2, "--epochs", 3, "--batch-size", 4, "--patience", 0, "--lr", 0.003),
        *("--augment", augment),
    ]
    if name.startswith("disef"):
        flags += ["--synthetic", synthetic(shots=2), "--per-class", 2]
        flags += ["--plan", "uniform", "--filter", "zero_shot"]
    assert script("train", *flags, "--out", tmp_path / "whole").code == 0

    saved = []

    def save_then_die(run, *arguments):
        real_save(run, *arguments)
        saved.append(1)
        if len(saved) == 2:
            raise Killed

    real_save = Run.save_resume
    monkeypatch.setattr(Run, "save_resume", save_then_die)
    with pytest.raises(Killed):
        script("train", *flags, "--out", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("results.json"))
    monkeypatch.undo()
    result = script("train", *flags, "--out", tmp_path / "killed", "--resume")
    assert result.code == 0, result.err

    whole, resumed = (
        next((tmp_path / run).rglob("adapter.safetensors")).read_bytes()
        for run in ("whole", "killed")
    )
    assert whole == resumed
