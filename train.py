"""Adapt CLIP to a few labelled images and test it on classes it has and has not seen.

python train.py --method lora                                 the demo task, offline, a minute
python train.py --method lora --dataset folder --data-root DIR
python train.py --method lora --dataset flowers102            downloads data and model
python train.py --method lora --shots 1,2,4 --seeds 1,2,3     nine runs, and their mean ± std
python train.py --method lora --dataset coop-11               eleven data sets, and their mean
python train.py --method lora --help                          that method's settings
"""

import functools
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# Before torch, which takes from it how threads wait.
from clip_min import UserError, weights  # isort: skip
import torch

from clip_min.errors import nearest
from clip_min.files import read_json, write_text
from fewshot import cache, datasets, grid
from fewshot.catalogue import IMPLIED, chosen
from fewshot.experiment import Experiment, evaluate, peak_memory_mb, run_script
from fewshot.flags import Parser, add_flags, changes, pick
from fewshot.loop import descend
from fewshot.metrics import train_accuracy
from fewshot.record import summary
from fewshot.report import doubts, save_curves, table
from fewshot.run import Run, provenance, set_aside
from fewshot.task import Task
from fewshot.transductive import Queries
from generate import add_synthetic
from methods import METHODS, Method, Settings, TrainingSettings
from methods.class_prompts import unread
from methods.disef import DISEFSettings
from methods.interop.init_from import load_into
from methods.templates import PromptSettings

# The recipes that were made for a data set, and are taken on it; elsewhere "default" is.
MADE_FOR = {"demo": ("demo",), "flowers102": ("notebook", "improved")}

# Flags that most people change; --help shows them first.
OFTEN = ("dataset", "data_root", "model", "shots", "seed", "epochs", "lr", "batch_size")
OFTEN += ("image_rank", "text_rank")


@dataclass
class Plan:
    """What the command line asks for: a method, and a run for each data set, shots and seed."""

    method: str
    data: str  # one data set, or several: "coop-11"
    recipe: str
    usual: Settings  # the recipe's
    settings: Settings  # the same, as flags have changed them
    experiments: list[Experiment]
    out: Path
    init_from: Path | None
    resume: bool
    cache: Path | None


def main(argv: list[str] | None = None) -> None:
    plan = parse(argv or sys.argv[1:])
    first = plan.experiments[0]
    print(f"{plan.method} on {plan.data}, model {first.model}, {first.device}")
    differs = changes(plan.settings, plan.usual)
    print(f"recipe {plan.recipe}{', with ' if differs else ''}{differs}")
    # The first of each data set: one that is missing is told before hours of training.
    firsts = [e for e in plan.experiments if (e.shots, e.seed) == (first.shots, first.seed)]
    for experiment in firsts if len(firsts) > 1 else ():
        experiment.load_dataset()
    results: dict[str, dict] = {e.dataset: {} for e in firsts}
    for number, experiment in enumerate(plan.experiments, 1):
        if len(plan.experiments) > 1:
            print(f"\nrun {number}/{len(plan.experiments)}: {experiment.folder(plan.method)}")
        results[experiment.dataset][experiment.shots, experiment.seed] = train(plan, experiment)
    for experiment in firsts:
        if len(runs := results[experiment.dataset]) > 1:
            summarise(plan, experiment, runs)
    if len(results) > 1:
        summarise_data_sets(plan, results)


def train(plan: Plan, experiment: Experiment) -> dict:
    """One run, to its folder -> its results.json."""
    clip, task = experiment.load(plan.cache)
    experiment.prepare(clip)
    tested = [name for test in task.tests.values() for name in test.classnames]
    for note in task.notes + unread(getattr(plan.settings, "prompts", None), tested):
        print(f"note: {note}")
    counts = ", ".join(f"{len(t.batches)} {part}" for part, t in task.tests.items())
    print(
        f"{len(task.classnames)} classes to learn from {len(task.train)} images "
        f"({len(task.val)} for validation); test images: {counts}"
    )
    torch.manual_seed(experiment.seed)
    names, template, settings = task.classnames, task.template, plan.settings
    method = METHODS[plan.method](clip, names, template, settings)
    if plan.init_from:
        load_into(method, plan.init_from)
    unadapted = METHODS["zero_shot"].plain(clip, names, template)
    for tested, test in itertools.product((unadapted, method), task.tests.values()):
        if tested.names_unseen:
            tested.for_classes(test.classnames)  # a name too long for a prompt is told now
    synthetic = {}
    if isinstance(settings, DISEFSettings):
        with torch.random.fork_rng():  # what is random in training does not depend on it
            if (filter := settings.filter) == "lora":
                filter = lora_run(plan, experiment, task)
            settings, task.train, made = add_synthetic(settings, experiment, task, plan.out, filter)
        method.settings = settings  # which now say where these images lie
        print(f"{made['images']} synthetic images join them")
        synthetic = {"synthetic": made}

    record = task.record(experiment.data_root)
    filled = {"template": task.template, "threads": torch.get_num_threads()}  # if left open
    config = {
        "method": plan.method,
        "recipe": plan.recipe,
        "settings": asdict(settings),
        "experiment": asdict(experiment) | filled,
        "model": experiment.model,
        "fingerprint": weights.fingerprint(clip),
        "init_from": str(plan.init_from) if plan.init_from else None,
        "classnames": {part: test.classnames for part, test in task.tests.items()},
        "data": summary(record),
        **provenance(),
    }
    path = plan.out / experiment.folder(plan.method)
    run = None
    if plan.resume and (len(plan.experiments) == 1 or (path / "config.json").exists()):
        run = Run.resume(path, config)
        if len(plan.experiments) > 1 and (path / "results.json").exists():
            print("finished before")
            hint = "remove the run's folder to run it again"
            return read_json(path / "results.json", hint, grid.RESULTS)

    resume = run is not None
    run = run or Run.start(path, config)  # only now: a mistake in a setting leaves no folder
    if "data" in run.config:
        write_text(run.path / "data.json", json.dumps(record) + "\n")
    started = time.perf_counter()
    method.fit(
        task.train,
        task.val,
        functools.partial(descend, run=run, seed=experiment.seed, resume=resume),
    )
    seconds = run.log[-1]["seconds"] if run.log else time.perf_counter() - started
    fitted = {}
    if run.log:
        fitted = {"steps": run.log[-1]["step"], "train": train_accuracy(method, task.train)}
        for doubt in doubts(**fitted):
            print(f"note: {doubt}")
    run.save_adapter(method.adapter_state(), last=True)
    if run.log:
        save_curves(run.log, run.path / "curves.png")

    queries = Queries.of(METHODS[plan.method], settings, experiment.seed)
    zero_shot = evaluate(unadapted, task, queries)
    scores = evaluate(method, task, queries)
    parameters = sum(p.numel() for p in method.parameters() if p.requires_grad)
    memory = peak_memory_mb()  # of this process: in a grid, of all runs until here
    brief = {name: zero_shot[name] for name in ("base", "novel", "hm", "all")}
    measured = {"parameters": parameters, "seconds": seconds, "peak_memory_mb": memory}
    results = {**scores, "zero_shot": brief, **fitted, **measured, **synthetic}
    run.write_json("results.json", results)

    if queries:
        print(queries.describe(scores))
    print(table({"zero-shot": zero_shot, plan.method: scores}))
    print(f"{parameters:,} trained parameters, {seconds:.1f} s training, {memory:,.0f} MB at peak")
    print(f"adapter: {run.path / 'adapter.safetensors'}")
    return results


def summarise(plan: Plan, first: Experiment, results: dict[tuple[int, int], dict]) -> None:
    """Mean and spread over the seeds: a table, a JSON file and a plot, beside the runs."""
    summary = grid.summarise(results)
    file = keep(plan, (plan.out / first.folder(plan.method)).parent, summary, summary)
    grid.save_plot(plan.method, summary, file.with_suffix(".png"))
    print(f"\nmean ± standard deviation, seeds {', '.join(map(str, summary['seeds']))}")
    print(grid.table(plan.method, summary))
    print(f"grid: {file}")


def summarise_data_sets(plan: Plan, results: dict[str, dict[tuple[int, int], dict]]) -> None:
    """The same of each data set and their mean: tables and one JSON file, DATA/MODEL/…"""
    summaries = {dataset: grid.summarise(runs) for dataset, runs in results.items()}
    of = {dataset: grid.rows(plan.method, summary) for dataset, summary in summaries.items()}
    means = {k: grid.mean([rows[k] for rows in of.values()]) for k in next(iter(of.values()))}
    first = plan.experiments[0]
    data, model, _ = first.folder(plan.method).parts
    folder = plan.out / data.replace(first.dataset, plan.data, 1) / model
    one = next(iter(summaries.values()))
    file = keep(plan, folder, one, {"datasets": summaries, "mean": means})
    print(f"\n{grid.table_of_data_sets(of)}")
    print(f"data sets: {file}")


def keep(plan: Plan, folder: Path, of: dict, summary: dict) -> Path:
    """Write a summary as JSON, and keep another that is in its place -> the file."""
    settings = {"recipe": plan.recipe, "settings": asdict(plan.settings)}
    shots, seeds = "-".join(of["shots"]), "-".join(map(str, of["seeds"]))
    file = folder / f"{plan.method}-grid-s{shots}-seed{seeds}.json"
    text = json.dumps({"method": plan.method, **settings, **summary}, indent=2) + "\n"
    if file.exists() and file.read_bytes() != text.encode():
        for earlier in (file, file.with_suffix(".png")):
            if earlier.exists():
                set_aside(earlier, "grid")
    write_text(file, text)
    return file


def lora_run(plan: Plan, experiment: Experiment, task: Task) -> Path:
    """The run of LoRA's defaults, of this seed; on the demo task, trained now if there is none."""
    path = plan.out / experiment.folder("lora")
    if experiment.dataset != "demo":
        return path
    recipe = recipe_for(METHODS["lora"], "demo", experiment.model)
    settings = METHODS["lora"].Settings(**METHODS["lora"].preset(recipe, experiment.model))
    if not (path / "results.json").exists():
        print(f"synthetic images are filtered by the LoRA run {path}, which is trained first:")
        known = ("lora", "demo", recipe, settings, settings)
        train(Plan(*known, [experiment], plan.out, None, False, plan.cache), experiment)
        return path
    config = Run.open(path).config
    found = {**config["settings"], **config["experiment"], "init_from": config.get("init_from")}
    wanted = {**asdict(settings), "init_from": None, "template": task.template}
    same = ("model", "shots", "seed", "classes", "base_classes", "precision")
    wanted |= {key: getattr(experiment, key) for key in same}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"{path}: is the run that filters synthetic images, but was trained with "
                f"{key} {found.get(key)}, not {value}; move it away, or give another --out"
            )
    return path


def recipe_for(method: type[Method], data: str, model: str) -> str:
    """The recipe that is taken if none is named: one made for the data, or the default."""
    of_its_world = (data == "demo") == (model == "demo")
    wanted = MADE_FOR.get(data, ()) if of_its_world else ()
    return next(r for r in (*wanted, "default", *method.recipes) if r in method.recipes)


def parse(argv: list[str]) -> Plan:
    """Two passes: which method, and then its own settings beside the common ones."""
    first = Parser(add_help=False)
    first.add_argument("--method")
    first.add_argument("--model")
    first.add_argument("--dataset")
    first.add_argument("--recipe")
    first.add_argument("--prompts")
    known, _ = first.parse_known_args(argv)
    listed = "\n".join(f"  {name:<14}{m.title}" for name, m in METHODS.items())
    about = f"{__doc__}\nmethods:\n{listed}\n\ndata sets:\n{datasets.LISTED}"
    parser = Parser(usage="%(prog)s --method METHOD [FLAG VALUE …]", description=about)
    often = parser.add_argument_group("what most people change")
    often.add_argument("--method", help="the method to train, listed above")
    often.add_argument("--out", help="folder that run folders are made in [runs]")
    often.add_argument("--seeds", type=grid.numbers, help="several, as 1,2,3: a run for each")
    add_flags(often, Experiment, only=OFTEN)
    shots = next(a for a in parser._actions if a.dest == "shots")
    shots.type = functools.partial(grid.numbers, words=("all",))
    shots.help += "; several, as 1,2,4: a run for each"
    if known.method is not None:
        method = METHODS[nearest("--method", known.method, METHODS)]
        named = {key: value for key, value in vars(known).items() if value is not None}
        data = named.get("dataset", Experiment.dataset)
        defaults = Experiment(**pick(Experiment, named | {"dataset": chosen(data)[0]}))
        if (recipe := known.recipe) is None:
            recipe = recipe_for(method, data, defaults.model)
        preset = method.preset(nearest("--recipe", recipe, method.recipes), defaults.model)
        if known.prompts is not None and not issubclass(method.Settings, PromptSettings):
            raise UserError(
                f"--prompts: {known.method} ({method.title}) reads no written prompts; leave it out"
            )
        usual = method.Settings(**preset)
        shared = [f.name for f in fields(TrainingSettings) if f.name not in OFTEN]
        own = [f.name for f in fields(method.Settings) if f.name not in (*OFTEN, *shared)]
        title = f"{known.method}: recipe {recipe} of {', '.join(method.recipes)}"
        for group, names in ((often, OFTEN), (title, own), ("training", shared)):
            group = group if group is often else parser.add_argument_group(group)
            add_flags(group, method.Settings, preset, names)
    rest = [f.name for f in fields(Experiment) if f.name not in OFTEN]
    add_flags(parser.add_argument_group("experiment"), Experiment, only=rest)
    group = parser.add_argument_group("run")
    group.add_argument("--recipe", help="a named set of defaults for the method's settings")
    group.add_argument("--resume", action="store_true", help="go on with what was killed")
    cache.add_flags(group)
    group.add_argument(
        "--init-from",
        metavar="PATH",
        help="start from an adapter: a run's folder, PEFT's folder, CLIP-LoRA's or loralib's file",
    )
    if known.method is None:
        parser.parse(argv)  # --help ends here
        raise UserError(f"--method is missing; methods are {', '.join(METHODS)}")

    given = parser.parse(argv)
    if "seed" in given and "seeds" in given:
        raise UserError("--seed and --seeds: give one of them")
    if "templates" in given and "prompts" in given:
        raise UserError("--templates and --prompts: give one of them")
    if "grid" in preset:  # a flag wins over it, too
        axes = preset["grid"].split()
        preset["grid"] = " ".join(axis for axis in axes if axis.split("=")[0] not in given)
    for axis in given.get("grid", "").split():
        if (name := axis.split("=")[0]) in given:
            raise UserError(f"--{name.replace('_', '-')} and --grid {axis}: give one of them")
    settings = method.Settings(**{**preset, **pick(method.Settings, given)})
    if "epochs" in given and "min_steps" not in given:  # as many as asked for, then
        settings = replace(settings, min_steps=0)
    common = IMPLIED.get(data, {}) | pick(Experiment, given)
    experiments = [
        Experiment(**{**common, "dataset": dataset, "shots": shots, "seed": seed})
        for dataset in chosen(data)
        for shots in given.get("shots", [defaults.shots])
        for seed in given.get("seeds", [given.get("seed", defaults.seed)])
    ]
    return Plan(
        known.method,
        data,
        recipe,
        usual,
        settings,
        experiments,
        Path(given.get("out", "runs")),
        Path(given["init_from"]).expanduser() if "init_from" in given else None,
        given["resume"],
        cache.chosen(given),
    )


if __name__ == "__main__":
    run_script(main)
