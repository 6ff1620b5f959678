"""Adapt CLIP to a few labelled images, and test it on seen and unseen classes.

python train.py --method lora                                 the demo task, offline, a minute
python train.py --method lora --dataset folder --data-root DIR
python train.py --method lora --dataset flowers102            downloads data and model
python train.py --method lora --shots 1,2,4 --seeds 1,2,3     nine runs and their mean ± std
python train.py --method lora,coop,gda                        compare three methods
python train.py --method all --budget 10m                     the methods that fit in ten minutes
python train.py --method lora --dataset coop-11               eleven data sets and their mean
python train.py --method lora --help                          a method's settings
"""

import contextlib
import functools
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Before torch: clip_min sets how threads wait.
from clip_min import CLIP, UserError, tokenize, weights  # isort: skip
import torch

from clip_min.files import write_json
from clip_min.hub import locate
from fewshot import compare, grid, predictions, ranks
from fewshot.batches import NeedsPictures
from fewshot.experiment import Experiment, evaluate, forget_peak, peak_memory_mb, run_script
from fewshot.flags import changes
from fewshot.loop import descend
from fewshot.metrics import accuracy_on
from fewshot.predictions import Predictions, brief
from fewshot.record import summary
from fewshot.run import Run, provenance
from fewshot.tables import doubts, save_curves, table, uneven
from fewshot.task import Task
from fewshot.transductive import Queries
from generate import add_synthetic
from methods import METHODS, Method
from methods.class_prompts import strangers
from methods.disef import DISEFSettings
from methods.interop.command import Plan, parse, recipe_for
from methods.interop.init_from import load_into
from report import write_run

# Data set -> method -> (shots, seed) -> results.json
Results = dict[str, dict[str, dict[tuple[int | str, int], dict]]]


@dataclass
class World:
    """An experiment's task and CLIP: pictures are read and encoded once for all methods."""

    experiment: Experiment
    clip: CLIP
    task: Task

    @classmethod
    def of(cls, experiment: Experiment, folder: Path | None) -> "World":
        clip, task = experiment.load(folder)
        experiment.prepare(clip)
        for note in task.notes:
            print(f"note: {note}")
        tested = ", ".join(f"{len(t.batches)} {part}" for part, t in task.tests.items())
        print(
            f"{len(task.classnames)} classes to learn from {len(task.train)} images "
            f"({len(task.val)} for validation); test images: {tested}"
        )
        counts = task.train.labels.cpu().bincount(minlength=len(task.classnames))
        if counts.max() >= 2 * counts.min():
            print(uneven(counts, task.classnames))
        for test in task.tests.values():  # raises now, if a name is too long for a prompt
            tokenize([task.template.replace("{}", name) for name in test.classnames])
        return cls(experiment, clip, task)

    @functools.cached_property
    def unadapted(self) -> Method:
        names, template = self.task.classnames, self.task.template
        return METHODS["zero_shot"].plain(self.clip, names, template)

    @functools.cached_property
    def zero_shot(self) -> tuple[dict, dict[str, Predictions]]:
        """The scores of zero-shot CLIP, and its predictions."""
        scores, found = evaluate(self.unadapted, self.task)
        return {**scores, "val": accuracy_on(self.unadapted, self.task.val)}, found


def main(argv: list[str] | None = None) -> None:
    plans, budget = parse(argv or sys.argv[1:], __doc__)
    names, plan = ", ".join(plan.method for plan in plans), plans[0]
    first = plan.experiments[0]
    names = names if len(plans) < 6 else f"{len(plans)} methods"
    print(f"{names} on {plan.data}, model {first.model}, {first.device}")
    for plan in plans:
        of = f"{plan.method}: " if len(plans) > 1 else ""
        changed = plan.settings != plan.usual and changes(plan.settings, plan.usual)
        print(f"{of}recipe {plan.recipe}{', with ' + changed if changed else ''}")
    # The first of each data set, so that a missing one is an error before hours of training.
    firsts = [e for e in plan.experiments if (e.shots, e.seed) == (first.shots, first.seed)]
    if len(firsts) > 1 or ranks.size > 1:
        with ranks.first_alone():
            for experiment in firsts:
                experiment.load_dataset()
                locate(experiment.model)
    plans, world = fitting(plans, budget) if len(plans) > 1 else (plans, None)
    pairs = [(experiment, plan) for experiment in plans[0].experiments for plan in plans]
    done, own = {}, list(enumerate(pairs, 1))
    spread = 1 < ranks.size <= len(pairs)
    if spread:
        print(f"{ranks.size} processes take separate runs; only the runs of process 0 print")
        own = ranks.mine(own)
    with ranks.apart() if spread else contextlib.nullcontext():
        for number, (experiment, plan) in own:
            if plan.several:
                print(f"\nrun {number}/{len(pairs)}: {experiment.folder(plan.method)}")
            if world is None or world.experiment is not experiment:
                world = None  # free its pictures before others are read
                world = World.of(experiment, plan.cache)
            done[number] = train(plan, world)
    for others in ranks.together(done) if spread else ():
        done |= others
    results: Results = {e.dataset: {plan.method: {} for plan in plans} for e in firsts}
    for number, (e, plan) in enumerate(pairs, 1):
        results[e.dataset][plan.method][e.shots, e.seed] = done[number]
    if plan.several and ranks.rank == 0:
        summarise(plans, firsts, results)


def fitting(plans: list[Plan], budget: float) -> tuple[list[Plan], World]:
    """Print the estimated time of several methods, and return those that fit in `budget` seconds,
    and the largest of their worlds, with which the time was measured.
    """
    experiments = plans[0].experiments
    world = World.of(max(experiments, key=lambda e: (e.shots == "all", e.shots)), plans[0].cache)
    seconds, clip, task = {}, world.clip, world.task
    for plan in plans:
        torch.manual_seed(0)
        method = METHODS[plan.method](clip, task.classnames, task.template, plan.settings)
        try:
            if task.train.pictures.features is not None:
                task.train.check(method)
            one = ranks.same(compare.seconds_of(method, task))
        except NeedsPictures as why:
            print(f"left out: {why}")
            continue
        seconds[plan.method] = len(experiments) * one
    if not seconds:
        raise UserError("each of these methods needs the pictures themselves; see --dataset folder")
    kept = compare.within(budget, seconds)
    print(compare.announce(seconds, kept))
    if not kept:
        raise UserError(f"--budget: {budget:g} s are too short for any of these methods; give more")
    return [plan for plan in plans if plan.method in kept], world


def summarise(plans: list[Plan], firsts: list[Experiment], results: Results) -> None:
    """Tables, files and plots of several runs, beside their folders."""
    settings = {p.method: {"recipe": p.recipe, "settings": asdict(p.settings)} for p in plans}
    folders = [(plans[0].out / e.folder(plans[0].method)).parent for e in firsts]
    together = folders[0].parent.parent / folders[0].parent.name.replace(
        firsts[0].dataset, plans[0].data, 1
    )
    together /= folders[0].name
    if len(plans) > 1:
        of = dict(zip(results, folders, strict=True))
        compare.show(results, of, together, settings, set(filter(learns_names, settings)))
        return
    method = plans[0].method
    summaries = {dataset: grid.summarise(of[method]) for dataset, of in results.items()}
    for folder, found in zip(folders, summaries.values(), strict=True):
        if len(plans[0].experiments) > len(firsts):
            grid.show(folder, method, settings[method], found)
    if len(summaries) > 1:
        grid.show_data_sets(together, method, settings[method], summaries)


def learns_names(method: str) -> bool:
    """Whether training changes its predictions for unseen classes."""
    return METHODS[method].names_unseen and METHODS[method].reaches_unseen


def train(plan: Plan, world: World) -> dict:
    """Do a run, write its folder -> the content of results.json."""
    forget_peak()
    experiment, task = world.experiment, world.task
    torch.manual_seed(experiment.seed)
    kind, settings = METHODS[plan.method], plan.settings
    method = kind(world.clip, task.classnames, task.template, settings)
    if task.train.pictures.features is not None:
        task.train.check(method)
    if prompts := getattr(settings, "prompts", None):
        for note in strangers(prompts, task.tested_names):
            print(f"note: {note}")
    if plan.init_from:
        load_into(method, plan.init_from)
    for test in task.tests.values() if method.names_unseen else ():
        method.for_classes(test.classnames)  # raises now, if a name does not fit
    synthetic = {}
    if isinstance(settings, DISEFSettings):
        gpu = [world.clip.device] if world.clip.device.type == "cuda" else []
        with torch.random.fork_rng(gpu):  # keeps training's random numbers independent of it
            if (filter := settings.filter) == "lora":
                filter = lora_run(plan, world)
            made = add_synthetic(settings, experiment, world.clip, task, plan.out, filter)
            settings, joined, made = made
        task = replace(task, train=joined)
        method.settings = settings  # with the folder of these images
        print(f"{made['images']} synthetic images are added")
        synthetic = {"synthetic": made}

    record = task.record(experiment.data_root)
    filled = {"template": task.template, "threads": torch.get_num_threads()}  # if not given
    config = {
        "method": plan.method,
        "recipe": plan.recipe,
        "settings": asdict(settings),
        "experiment": asdict(experiment) | filled,
        "model": experiment.model,
        "fingerprint": weights.fingerprint(world.clip),
        "init_from": str(plan.init_from) if plan.init_from else None,
        "classnames": {part: test.classnames for part, test in task.tests.items()},
        "data": summary(record),
        **provenance(),
    }
    path = plan.out / experiment.folder(plan.method)
    run = None
    if plan.resume and ranks.same(not plan.several or (path / "config.json").exists()):
        run = Run.resume(path, config)
        if plan.several and (path / "results.json").exists():
            print("finished before")
            if plan.report and not (path / "report.html").exists():
                print(f"it has no page yet: python report.py {shlex.quote(str(path))}")
            return grid.read_results(path / "results.json")

    resume = run is not None
    run = run or Run.start(path, config)  # only now: a wrong setting must not leave a folder
    if "data" in run.config and ranks.rank == 0:
        write_json(run.path / "data.json", record, indent=None, ensure_ascii=True)
    started = time.perf_counter()
    method.fit(
        task.train,
        task.val,
        functools.partial(descend, run=run, seed=experiment.seed, resume=resume),
    )
    if ranks.size > 1:
        ranks.agree(method.adapter_state().values())
    seconds = run.log[-1]["seconds"] if run.log else time.perf_counter() - started
    fitted = {}
    if run.log:
        fitted = {"steps": run.log[-1]["step"], "train": accuracy_on(method, task.train.some(500))}
        for doubt in doubts(**fitted):
            print(f"note: {doubt}")
    fitted |= {"val": validated(method, task, run.log), "val_images": len(task.val)}
    run.save_adapter(method.adapter_state(), last=True)
    if run.log and ranks.rank == 0:
        save_curves(run.log, run.path / "curves.png")

    queries = Queries.of(kind, settings, experiment.seed)
    scores, after = evaluate(method, task, queries)
    zero_shot, before = world.zero_shot
    if queries:
        zero_shot, before = evaluate(world.unadapted, task, queries)
    parameters = sum(p.numel() for p in method.parameters() if p.requires_grad)
    memory = peak_memory_mb()
    measured = {"parameters": parameters, "seconds": seconds, "peak_memory_mb": memory}
    results = {**scores, "zero_shot": brief(zero_shot), **fitted, **measured, **synthetic}
    if after:
        rows = {predictions.ZERO_SHOT: before, plan.method: after}
        run.write_tensors(predictions.FILE, predictions.tensors(rows))
    run.write_json("results.json", results)

    if queries:
        print(queries.describe(scores))
    print(table({"zero-shot": zero_shot, plan.method: scores}))
    print(f"{parameters:,} trained parameters, {seconds:.1f} s training, {memory:,.0f} MB at peak")
    print(f"adapter: {run.path / 'adapter.safetensors'}")
    if plan.report and ranks.rank == 0:
        with ranks.apart():
            print(f"report: {write_run(run.path, task, world.unadapted, method)}")
    else:
        print(f"report: python report.py {shlex.quote(str(run.path))}")
    return results


def validated(method: Method, task: Task, log: list[dict]) -> float | None:
    """The validation accuracy of the saved adapter, measured if it is not in the log; None, if
    images are labelled jointly.
    """
    if method.transductive:
        return None
    if log and "best" in method.settings.keep and not method.searches_last:
        return max(line["val"] for line in log)
    return accuracy_on(method, task.val)


def lora_run(plan: Plan, world: World) -> Path:
    """LoRA's default run with this seed; on the demo task, trained now if there is none."""
    experiment = world.experiment
    path = plan.out / experiment.folder("lora")
    if experiment.dataset != "demo":
        return path
    recipe = recipe_for(METHODS["lora"], "demo", experiment.model)
    settings = METHODS["lora"].Settings(**METHODS["lora"].preset(recipe, experiment.model))
    if not ranks.same((path / "results.json").exists()):
        print(f"synthetic images are filtered by the LoRA run {path}, which is trained first:")
        known = ("lora", "demo", recipe, settings, settings, [experiment], plan.out)
        train(Plan(*known, None, False, plan.cache, False), world)
        return path
    config = Run.open(path).config
    found = {**config["settings"], **config["experiment"], "init_from": config.get("init_from")}
    wanted = {**asdict(settings), "init_from": None, "template": world.task.template}
    same = ("model", "shots", "seed", "classes", "base_classes", "precision")
    wanted |= {key: getattr(experiment, key) for key in same}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"{path}: is the run that filters synthetic images, but was trained with "
                f"{key} {found.get(key)}, not {value}; move it away, or give another --out"
            )
    return path


if __name__ == "__main__":
    run_script(main, resume="add --resume to the same command", shared=True)
