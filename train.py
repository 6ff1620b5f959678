"""Adapt CLIP to a few labelled images and test it on classes it has and has not seen.

python train.py --method lora                                 the demo task, offline, a minute
python train.py --method lora --dataset folder --data-root DIR --model ViT-B/16
python train.py --method lora --dataset flowers102            downloads data and model
python train.py --method lora --help                          that method's settings
"""

import functools
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from clip_min import UserError, weights
from fewshot.experiment import Experiment, evaluate, nearest, peak_memory_mb, run_script
from fewshot.flags import Parser, add_flags, describe, pick
from fewshot.loop import descend
from fewshot.report import save_curves, table
from fewshot.run import Run, provenance
from generate import add_synthetic
from methods import METHODS, Settings
from methods.disef import DISEFSettings


def main(argv: list[str] | None = None) -> None:
    method_name, recipe, settings, experiment, out, resume = parse(argv or sys.argv[1:])
    print(f"{method_name} on {experiment.dataset}, model {experiment.model}, {experiment.device}")
    print(f"recipe {recipe}: {describe(settings)}")

    clip, task = experiment.load()
    for note in task.notes:
        print(f"note: {note}")
    tested = ", ".join(f"{len(t.batches)} {part}" for part, t in task.tests.items())
    print(
        f"{len(task.classnames)} classes to learn from {len(task.train)} images "
        f"({len(task.val)} for validation); test images: {tested}"
    )
    synthetic = {}
    if isinstance(settings, DISEFSettings):
        filter = lora_run(experiment, out) if settings.filter == "lora" else settings.filter
        settings, task.train, made = add_synthetic(settings, experiment, task, out, filter)
        print(f"{made['images']} synthetic images join them")
        synthetic = {"synthetic": made}

    config = {
        "method": method_name,
        "recipe": recipe,
        "settings": asdict(settings),
        "experiment": asdict(experiment),
        "model": experiment.model,
        "fingerprint": weights.fingerprint(clip),
        "classnames": {part: test.classnames for part, test in task.tests.items()},
        **provenance(),
    }
    path = out / experiment.folder(method_name)
    run = Run.resume(path, config) if resume else None

    unadapted = METHODS["zero_shot"](clip, task.classnames, experiment.template, Settings())
    zero_shot = evaluate(unadapted, task)  # first: some methods add parts to this CLIP

    torch.manual_seed(experiment.seed)
    method = METHODS[method_name](clip, task.classnames, experiment.template, settings)
    run = run or Run.start(path, config)  # only now: a mistake in a setting leaves no folder
    started = time.perf_counter()
    method.fit(
        task.train,
        task.val,
        functools.partial(descend, run=run, seed=experiment.seed, resume=resume),
    )
    seconds = run.log[-1]["seconds"] if run.log else time.perf_counter() - started
    run.save_adapter(method.adapter_state())
    if run.log:
        save_curves(run.log, run.path / "curves.png")

    scores = evaluate(method, task)
    parameters = sum(tensor.numel() for tensor in method.adapter_state().values())
    memory = peak_memory_mb()
    brief = {name: zero_shot[name] for name in ("base", "novel", "hm", "all")}
    measured = {"parameters": parameters, "seconds": seconds, "peak_memory_mb": memory}
    run.write_json("results.json", {**scores, "zero_shot": brief, **measured, **synthetic})

    print(table({"zero-shot": zero_shot, method_name: scores}))
    print(f"{parameters:,} trained parameters, {seconds:.1f} s training, {memory:,.0f} MB at peak")
    print(f"adapter: {run.path / 'adapter.safetensors'}")


def lora_run(experiment: Experiment, out: Path) -> Path:
    """The LoRA run of this seed; on the demo task, trained now if there is none."""
    path = out / experiment.folder("lora")
    if experiment.dataset == "demo" and not (path / "results.json").exists():
        print(f"synthetic images are filtered by the LoRA run {path}, which is trained first:")
        flags = [f"--{key}={getattr(experiment, key)}" for key in ("model", "shots", "seed")]
        flags += [f"--{key}={getattr(experiment, key)}" for key in ("classes", "device")]
        main(["--method", "lora", *flags, "--out", str(out)])
    return path


def parse(argv: list[str]) -> tuple[str, str, Settings, Experiment, Path, bool]:
    """Two passes: which method, and then its own settings beside the common ones."""
    first = Parser(add_help=False)
    first.add_argument("--method")
    first.add_argument("--model")
    first.add_argument("--dataset")
    first.add_argument("--recipe")
    known, _ = first.parse_known_args(argv)
    listed = "\n".join(f"  {name:<12}{m.title}" for name, m in METHODS.items())
    parser = Parser(description=f"{__doc__}\nmethods:\n{listed}")
    group = parser.add_argument_group("run")
    group.add_argument("--method", help="the method to train, listed above")
    group.add_argument("--recipe", help="a named set of defaults for the method's settings")
    group.add_argument("--out", help="folder that run folders are made in [runs]")
    group.add_argument("--resume", action="store_true", help="go on with a run that was killed")
    add_flags(parser.add_argument_group("experiment"), Experiment)
    if known.method is None:
        parser.parse(argv)  # --help ends here
        raise UserError(f"--method is missing; methods are {', '.join(METHODS)}")

    method = METHODS[nearest("--method", known.method, METHODS)]
    named = {key: value for key, value in vars(known).items() if value is not None}
    defaults = Experiment(**pick(Experiment, named))
    recipe = known.recipe
    if recipe is None:
        recipes = list(method.recipes)
        recipe = "demo" if defaults.model == "demo" and "demo" in recipes else recipes[0]
    preset = method.recipes[nearest("--recipe", recipe, method.recipes)]
    title = f"{known.method}: recipe {recipe} of {', '.join(method.recipes)}"
    add_flags(parser.add_argument_group(title), method.Settings, preset)
    given = parser.parse(argv)
    settings = method.Settings(**{**preset, **pick(method.Settings, given)})
    experiment = Experiment(**pick(Experiment, given))
    return (
        known.method,
        recipe,
        settings,
        experiment,
        Path(given.get("out", "runs")),
        given["resume"],
    )


if __name__ == "__main__":
    run_script(main)
