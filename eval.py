"""Test a trained run again, test zero-shot CLIP, or classify pictures of your own.

python eval.py --run runs/demo/demo/lora-s10-seed1            the table training printed
python eval.py --run DIR --dataset other                      the run on another data set
python eval.py --run DIR --image a.jpg b.jpg                  top 5 classes with probabilities
python eval.py --run DIR --image a.jpg --classes "rose,tulip" among other classes
python eval.py --method zero_shot --dataset demo              CLIP as it is
"""

import sys
from pathlib import Path

import torch

from clip_min import UserError, crop, normalize, weights
from fewshot import cache, datasets
from fewshot.experiment import Experiment, evaluate, nearest, run_script
from fewshot.flags import Parser, add_flags, pick
from fewshot.images import autocast, open_image
from fewshot.report import table
from fewshot.run import Run
from fewshot.task import make_test
from fewshot.transductive import Queries
from methods import METHODS

# What may differ from what a run was made with, and what --dataset other takes besides.
MOVED = ("device", "data_root", "split_file", "base_classes", "model")
OTHER = ("dataset", "split", "template", "skip_bad_images")


def main() -> None:
    given = parse(sys.argv[1:])
    if "run" in given:
        run = Run.open(Path(given["run"]))
        moved = {key: given[key] for key in MOVED if key in given}
        try:
            experiment = Experiment(**{**run.config["experiment"], "device": "", **moved})
            method_class = METHODS[nearest("method", run.config["method"], METHODS)]
            settings = method_class.Settings(**run.config["settings"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{run.path}/config.json: not a config of a run ({error})") from None
    else:
        nearest("--method", given["method"], ["zero_shot"])
        run, method_class = None, METHODS["zero_shot"]
        settings = method_class.Settings(**pick(method_class.Settings, given))
        experiment = Experiment(**pick(Experiment, given))
    if "image" in given:
        classify(run, method_class, settings, experiment, given)
    elif run is not None and "dataset" in given:
        transfer(run, method_class, settings, experiment, given)
    else:
        test(run, method_class, settings, experiment, given)


def test(run: Run | None, method_class, settings, experiment: Experiment, given: dict) -> None:
    """Print the table of zero-shot CLIP and of the run."""
    clip, task = experiment.load(cache.place(given.get("cache", "")))
    for note in task.notes:
        print(f"note: {note}")
    if run is not None:
        check_model(run, clip)
        if run.config["classnames"] != {part: t.classnames for part, t in task.tests.items()}:
            raise UserError(
                f"{run.path}: the data set's classes are no longer those it was trained and "
                "tested on; give the right one with --data-root, or train again"
            )
    queries = Queries.of(method_class, settings, experiment.seed)
    unadapted = METHODS["zero_shot"].plain(clip, task.classnames, experiment.template)
    rows = {"zero-shot": evaluate(unadapted, task, queries)}  # first: some methods change this CLIP
    if run is not None:
        method = method_class(clip, task.classnames, experiment.template, settings)
        method.load_adapter(run.load_adapter())
        rows[run.config["method"]] = evaluate(method, task, queries)
    elif settings != method_class.Settings():
        method = method_class(clip, task.classnames, experiment.template, settings)
        rows["zero-shot, templates"] = evaluate(method, task)
    print_rows(rows, queries)


def print_rows(rows: dict[str, dict], queries: Queries | None) -> None:
    if queries:
        print(queries.describe(list(rows.values())[-1]))
    print(table(rows))


def transfer(run: Run, method_class, settings, experiment: Experiment, given: dict) -> None:
    """Print the table of a run on all classes of a data set that it has not learned from.

    The names and the template are that data set's; what was learned is the run's.
    """
    other = Experiment(**pick(Experiment, given | {"model": experiment.model, "classes": "all"}))
    dataset = other.load_dataset()
    template = other.template or dataset.template
    clip = weights.load(other.model, other.device)
    check_model(run, clip)
    folder = cache.place(given.get("cache", ""))
    size, device = clip.config.image_size, torch.device(other.device)
    task = make_test(dataset, size, device, other.skip_bad_images, folder, experiment.precision)
    for note in task.notes:
        print(f"note: {note}")
    images = len(task.tests["all"].batches)
    print(f"{other.dataset}: {len(task.classnames)} classes, {images} test images; {template!r}")
    queries = Queries.of(method_class, settings, experiment.seed)
    unadapted = METHODS["zero_shot"].plain(clip, task.classnames, template)
    rows = {"zero-shot": evaluate(unadapted, task, queries)}  # first: some methods change this CLIP
    method = method_class(clip, learned_classes(run), template, settings)
    method.load_adapter(run.load_adapter())
    rows[run.config["method"]] = evaluate(method.for_classes(task.classnames), task, queries)
    print_rows(rows, queries)


def classify(run: Run | None, method_class, settings, experiment: Experiment, given: dict) -> None:
    """Print the five likeliest classes of each picture."""
    clip = weights.load(experiment.model, experiment.device)
    if run is None:
        learned, known = [], []
    else:
        check_model(run, clip)
        learned = learned_classes(run)
        known = [name for names in run.config["classnames"].values() for name in names]
    if "classes" in given:
        known = [name.strip() for name in given["classes"].split(",") if name.strip()]
    if not known:
        raise UserError('--image: say which classes to choose from: --classes "rose,tulip"')
    method = method_class(
        clip, learned or known, experiment.template or "a photo of a {}.", settings
    )
    if run is not None:
        method.load_adapter(run.load_adapter())
    if method.names_unseen or "classes" in given:
        method = method.for_classes(known)
    images = [crop(open_image(Path(path)), clip.config.image_size) for path in given["image"]]
    with method.inference(), autocast(clip.device, experiment.precision):
        for path, pixels in zip(given["image"], images, strict=True):
            x = normalize(pixels[None].to(clip.device))  # (1, 3, n, n)
            x = clip.encode_image(x) if method.input == "features" else x
            best = method(x)[0].softmax(-1).topk(min(5, len(method.classnames)))
            print(path)
            for probability, i in zip(*best, strict=True):
                print(f"  {100 * probability:6.2f} %  {method.classnames[i]}")


def learned_classes(run: Run) -> list[str]:
    parts = run.config["classnames"]
    return parts.get("base") or parts["all"]


def check_model(run: Run, clip) -> None:
    found, made = weights.fingerprint(clip), run.config["fingerprint"]
    if found != made:
        raise UserError(
            f"{run.path}: was trained on {run.config['model']} with fingerprint {made}, but the "
            f"model here has {found}; give the right one with --model"
        )


def parse(argv: list[str]) -> dict:
    parser = Parser(description=f"{__doc__}\ndata sets:\n{datasets.listed()}")
    parser.add_argument("--run", metavar="DIR", help="a folder that train.py left")
    parser.add_argument("--method", help="zero_shot: test CLIP as it is, without a run")
    parser.add_argument("--image", metavar="FILE", nargs="+", help="pictures to classify")
    parser.add_argument("--cache", help=cache.HELP)
    add_flags(parser.add_argument_group("experiment"), Experiment)
    add_flags(parser.add_argument_group("zero_shot"), METHODS["zero_shot"].Settings)
    # --classes means names here when there are pictures to classify, so choices are checked below.
    classes = next(a for a in parser._actions if a.dest == "classes")
    classes.choices, classes.metavar = None, "NAMES"
    classes.help = 'with --image: names to choose from, "a,b,c"; else base-novel or all'
    given = parser.parse(argv)
    if ("run" in given) == ("method" in given):
        raise UserError("give either --run DIR or --method zero_shot; see --help")
    if "run" in given:
        read = {"run", "image", "cache", *MOVED}
        read |= {"classes"} if "image" in given else set()
        read |= {*OTHER} if "dataset" in given and "image" not in given else set()
        for name in sorted(given.keys() - read):
            raise UserError(f"--{name.replace('_', '-')}: a run knows its own; leave it out")
    if "classes" in given and "image" not in given:
        nearest("--classes", given["classes"], ["base-novel", "all"])
    return given


if __name__ == "__main__":
    run_script(main)
