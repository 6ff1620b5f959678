"""train.py's command line: the methods to train, their settings, and the data."""

import argparse
import functools
import math
import re
import typing
from dataclasses import dataclass, fields
from pathlib import Path

from clip_min import UserError
from clip_min.errors import unknown
from fewshot import cache, datasets, grid
from fewshot.catalogue import DATASETS, GROUPS, IMPLIED
from fewshot.experiment import Experiment
from fewshot.flags import Parser, add_flags, listed, pick
from methods import METHODS, BaseSettings, Method, TrainingSettings
from methods.disef import DISEFSettings
from methods.templates import PromptSettings

# Recipes made for a data set, which are used on it; elsewhere "default" is used.
MADE_FOR = {"demo": ("demo",), "flowers102": ("notebook", "improved")}

# --method all: the methods without joint labels and synthetic images.
COMPARED = [
    name
    for name, method in METHODS.items()
    if name != "zero_shot" and not method.transductive
    if not issubclass(method.Settings, DISEFSettings)
]

# The flags that most people change, shown first by --help.
OFTEN = ["dataset", "data_root", "model", "shots", "seed", "epochs", "lr", "batch_size"]
OFTEN += ["image_rank", "text_rank"]


@dataclass
class Plan:
    """The runs of one method that the command line asks for: for each data set, shots and seed."""

    method: str
    data: str  # one data set, or several: "coop-11"
    recipe: str
    usual: BaseSettings  # the recipe's
    settings: BaseSettings  # the recipe's, changed by flags
    experiments: list[Experiment]
    out: Path
    init_from: Path | None
    resume: bool
    cache: Path | None
    several: bool  # one of several runs? Then --resume skips those that have ended
    report: bool = False  # write a report page for each run


def parse(argv: list[str], about: str) -> tuple[list[Plan], float]:
    """-> a plan for each method, and the time limit for all together, in seconds.

    There are two passes, since --method decides which other flags exist.
    """
    first = Parser(add_help=False)
    for flag in ("--method", "--model", "--dataset", "--data-root", "--recipe", "--prompts"):
        first.add_argument(flag)
    known, _ = first.parse_known_args(argv)
    titles = "\n".join(f"  {name:<14}{m.title}" for name, m in METHODS.items())
    about = f"{about}\nmethods:\n{titles}\n\ndata sets:\n{datasets.LISTED}"
    parser = Parser(usage="%(prog)s --method METHOD [FLAG VALUE …]", description=about)
    often = parser.add_argument_group("common settings")
    often.add_argument(
        "--method", help="method to train, from the list above; several, as a,b; or all"
    )
    often.add_argument("--out", help="parent of the run folders [runs]")
    often.add_argument("--seeds", type=grid.numbers, help="several seeds, as 1,2,3: a run for each")
    add_flags(often, Experiment, only=OFTEN)
    shots = next(a for a in parser._actions if a.dest == "shots")
    shots.type = functools.partial(grid.numbers, words=("all",))
    shots.help = f"{shots.help}; several, as 1,2,4: a run for each"
    names = []
    if known.method is not None:
        names = listed("--method", known.method, METHODS, {"all": COMPARED})
        if len(names) > 1:
            check_together(names)
        named = {key: value for key, value in vars(known).items() if value is not None}
        data = named.get("dataset", Experiment.dataset)
        several = listed("--dataset", data, DATASETS, GROUPS)
        defaults = Experiment(**pick(Experiment, named | {"dataset": several[0]}))
        if known.prompts is not None and known.method != "all":
            check_prompts(names)
        recipes = {n: recipe_for(METHODS[n], data, defaults.model) for n in names}
        if known.recipe is not None:
            of = {n: "--recipe" if len(names) == 1 else f"{n}: --recipe" for n in names}
            for n in names:
                if known.recipe not in METHODS[n].recipes:
                    raise unknown(of[n], known.recipe, METHODS[n].recipes)
            recipes = dict.fromkeys(names, known.recipe)
        presets = {n: METHODS[n].preset(recipes[n], defaults.model) for n in names}
        add_settings(parser, often, recipes, presets)
    rest = [f.name for f in fields(Experiment) if f.name not in OFTEN]
    add_flags(parser.add_argument_group("experiment"), Experiment, only=rest)
    group = parser.add_argument_group("run")
    group.add_argument("--recipe", help="named defaults for the method's settings")
    group.add_argument("--resume", action="store_true", help="continue runs that were interrupted")
    group.add_argument("--report", action="store_true", help="write the page of each run")
    group.add_argument(
        "--budget", type=seconds_in, help="run only as many of the methods as fit in 90s, 10m, 2h"
    )
    add_flags(group, cache.Flags)
    group.add_argument(
        "--init-from",
        metavar="PATH",
        help="start from an adapter: a run's or a PEFT folder, or a file of CLIP-LoRA or loralib",
    )
    if known.method is None:
        parser.parse(argv)  # --help ends here
        raise UserError(f"--method is missing; give one of {', '.join(METHODS)}")

    given = parser.parse(argv)
    if "seed" in given and "seeds" in given:
        raise UserError("--seed and --seeds: give one of them")
    if "templates" in given and "prompts" in given:
        raise UserError("--templates and --prompts: give one of them")
    if len(names) == 1 and "budget" in given:
        raise UserError("--budget needs several methods, as --method lora,coop; leave it out")
    if len(names) > 1 and "init_from" in given:
        raise UserError("--init-from works with a single method; leave it out, or name one")
    common = IMPLIED.get(data, {}) | pick(Experiment, given)
    experiments = [
        Experiment(**{**common, "dataset": dataset, "shots": shots, "seed": seed})
        for dataset in several
        for shots in given.get("shots", [defaults.shots])
        for seed in given.get("seeds", [given.get("seed", defaults.seed)])
    ]
    plans = [
        Plan(
            method=name,
            data=data,
            recipe=recipes[name],
            usual=METHODS[name].Settings(**presets[name]),
            settings=settings_of(name, presets[name], given),
            experiments=experiments,
            out=Path(given.get("out", "runs")),
            init_from=Path(given["init_from"]).expanduser() if "init_from" in given else None,
            resume=given["resume"],
            cache=cache.chosen(given),
            several=len(names) * len(experiments) > 1,
            report=given["report"],
        )
        for name in names
    ]
    return plans, given.get("budget", math.inf)


def check_together(names: list[str]) -> None:
    """UserError, if one of several methods cannot be compared with the others."""
    for name in names:
        if METHODS[name].transductive:
            raise UserError(
                f"--method {','.join(names)}: {name} labels test images jointly and "
                "cannot be compared with other methods; run it separately"
            )


def check_prompts(names: list[str]) -> None:
    """UserError, unless all these methods read written prompts."""
    for name in names:
        if not issubclass(METHODS[name].Settings, PromptSettings):
            title = METHODS[name].title
            raise UserError(f"--prompts: {name} ({title}) does not read prompts; leave it out")


def add_settings(parser, often, recipes: dict[str, str], presets: dict[str, dict]) -> None:
    """Add the flags of these methods: of several, only flags with the same meaning in all."""
    shared = [f.name for f in fields(TrainingSettings) if f.name not in OFTEN]
    kinds = {n: typing.get_type_hints(METHODS[n].Settings, include_extras=True) for n in recipes}
    known = [(key, kind) for of in kinds.values() for key, kind in of.items()]
    left = {key for key, kind in known if all(kind == other for k, other in known if k == key)}
    left -= {"limits", "readers"}
    groups = {"often": often, "training": None}
    for name, preset in presets.items():
        own = left.difference(OFTEN, shared)
        title = f"{name}, recipe {recipes[name]} (of {', '.join(METHODS[name].recipes)})"
        shown = preset if len(presets) == 1 else dict.fromkeys(left, "")  # defaults differ
        for group, keys in (("often", OFTEN), (title, own), ("training", shared)):
            keys = [
                f.name for f in fields(METHODS[name].Settings) if f.name in left.intersection(keys)
            ]
            if keys:
                groups[group] = groups.get(group) or parser.add_argument_group(group)
                add_flags(groups[group], METHODS[name].Settings, shown, keys)
                left.difference_update(keys)


def settings_of(name: str, preset: dict, given: dict) -> BaseSettings:
    """A method's settings: its recipe's, changed by flags."""
    if "grid" in preset:  # a flag replaces its axis of the grid
        axes = preset["grid"].split()
        preset = preset | {
            "grid": " ".join(axis for axis in axes if axis.split("=")[0] not in given)
        }
    for axis in given.get("grid", "").split():
        if (of := axis.split("=")[0]) in given:
            raise UserError(f"--{of.replace('_', '-')} and --grid {axis}: give one of them")
    kind = METHODS[name].Settings
    if issubclass(kind, TrainingSettings) and "epochs" in given:  # exactly as many as asked for
        preset = preset | {"min_steps": 0, "steps_per_shot": 0}
    return kind(**{**preset, **pick(kind, given)})


def recipe_for(method: type[Method], data: str, model: str) -> str:
    """The recipe to use if none is named: one made for the data, or the default."""
    of_its_world = (data == "demo") == (model == "demo")
    wanted = MADE_FOR.get(data, ()) if of_its_world else ()
    return next(r for r in (*wanted, "default", *method.recipes) if r in method.recipes)


def seconds_in(text: str) -> float:
    """The type of --budget: "90s" -> 90, "10m" -> 600, "2h" -> 7200; a bare number is seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"invalid value: {text!r}; expected 90s, 10m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
