"""Test a trained run again, test zero-shot CLIP, or classify pictures of your own.

python eval.py --run runs/demo/demo/lora-s10-seed1            the table training printed
python eval.py --run DIR --dataset other                      the run on another data set
python eval.py --run DIR --dataset coop-11                    on several, and their mean
python eval.py --run DIR --image a.jpg b.jpg FOLDER           top 5 classes with probabilities
python eval.py --run DIR --image a.jpg --classes "rose,tulip" among other classes
python eval.py --method zero_shot --dataset demo              CLIP as it is
"""

import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch, which takes from it how threads wait.
from clip_min import CLIP, UserError, crop, normalize, weights  # isort: skip
import torch
from torch import Tensor
from tqdm import tqdm

from clip_min.errors import nearest
from fewshot import cache, datasets, grid
from fewshot.batches import autocast
from fewshot.catalogue import IMPLIED, chosen
from fewshot.experiment import Experiment, evaluate, named, run_script
from fewshot.flags import Parser, add_flags, pick
from fewshot.folder import find_pictures
from fewshot.pictures import open_image
from fewshot.record import kept, summary
from fewshot.report import table
from fewshot.run import Run
from fewshot.task import Task, make_test
from fewshot.transductive import Queries
from methods import METHODS, Method
from methods.class_prompts import unread
from methods.interop.load import described, trained

# Flags beside --run: where things are now, and what --dataset may say of the other data set.
MOVED = ("device", "data_root", "split_file", "base_classes", "model")
OTHER = ("dataset", "split", "template", "skip_bad_images")
# All that pictures of one's own are classified by; a run knows the last six.
PICTURES = ("image", "classes", "device", "model", "image_size", "template", "templates")
PICTURES += ("prompts", "precision", "threads")
BATCH = 64  # pictures in memory at once


def main() -> None:
    given = parse(sys.argv[1:])
    if "run" in given:
        run = Run.open(Path(given["run"]))
        moved = {key: given[key] for key in MOVED if key in given}
        try:
            experiment = Experiment(**{**run.config["experiment"], "device": "", **moved})
        except TypeError as error:
            raise UserError(f"{run.path}/config.json: not a config of a run ({error})") from None
        described(run)  # which says at once if it is not one
    else:
        nearest("--method", given["method"], ["zero_shot"])
        more = {"classes": "all"} if "image" in given else {}  # there, --classes names them
        asked = given.get("dataset", Experiment.dataset)
        each = [IMPLIED.get(asked, {}) | given | more | {"dataset": name} for name in chosen(asked)]
        run, experiments = None, [Experiment(**pick(Experiment, flags)) for flags in each]
        experiment = experiments[0]
    if "image" in given:
        classify(run, experiment, given)
    elif run is None:
        show_mean({each.dataset: test_zero_shot(each, given) for each in experiments})
    elif "dataset" in given:
        transfer(run, experiment, given)
    else:
        test(run, experiment, given)


def test(run: Run, experiment: Experiment, given: dict) -> None:
    """Print the table that training printed."""
    record = kept(run.path, run.config)
    clip, task = experiment.load(cache.chosen(given), record=record)
    experiment.prepare(clip)
    for note in task.notes:
        print(f"note: {note}")
    run.check_model(weights.fingerprint(clip))
    if not (run.path / "results.json").exists():
        print("note: no results.json; if this training has not ended, its best epoch yet is tested")
    if run.config["classnames"] != {part: t.classnames for part, t in task.tests.items()}:
        raise UserError(
            f"{run.path}: the data set's classes are no longer those it was trained and "
            "tested on; give the right one with --data-root, or train again"
        )
    if not record and "data" in run.config and run.config["data"] != summary(task.record("")):
        raise UserError(
            f"{run.path}: the data are not those it was trained and tested on, and which of them "
            "it has seen cannot be told without its data.json; put that back"
        )
    compare(run, clip, task)


def transfer(run: Run, experiment: Experiment, given: dict) -> None:
    """Print the tables of a run on data sets that it has not learned from, and their mean.

    Of several, the one that it learned from is left out, as in the published protocols.
    """
    names = chosen(given["dataset"])
    others = [name for name in names if name != experiment.dataset] if len(names) > 1 else names
    more = IMPLIED.get(given["dataset"], {}) | given
    show_mean({name: on_other(run, experiment, more | {"dataset": name}) for name in others})


def show_mean(tables: dict[str, dict[str, dict]]) -> None:
    """Print the tables of several data sets as one, with their mean."""
    if len(tables) > 1:
        of = {name: {k: grid.spread([s]) for k, s in rows.items()} for name, rows in tables.items()}
        print(f"\n{grid.table_of_data_sets(of)}")


def on_other(run: Run, experiment: Experiment, given: dict) -> dict[str, dict]:
    """Print and return the table of a run on all classes of another data set.

    The names and the template are that data set's; what was learned is the run's.
    """
    known = {"model": experiment.model, "classes": "all", "precision": experiment.precision}
    other = Experiment(**pick(Experiment, given | known))
    clip = weights.load(other.model, other.device, image_size=experiment.image_size)
    other.prepare(clip)
    dataset = other.load_dataset()
    run.check_model(weights.fingerprint(clip))
    reader, record = other.reader(clip, cache.chosen(given)), kept(run.path, run.config)
    task = make_test(dataset, reader, record=record)
    for note in task.notes:
        print(f"note: {note}")
    sizes = f"{len(task.classnames)} classes, {len(task.tests['all'].batches)} test images"
    print(f"{other.dataset}: {sizes}; {task.template!r}")
    return compare(run, clip, task)


def compare(run: Run, clip: CLIP, task: Task) -> dict[str, dict]:
    """Print and return the table of zero-shot CLIP and of the run on `task`."""
    queries = Queries.of(*described(run), run.config["experiment"]["seed"])
    unadapted = METHODS["zero_shot"].plain(clip, task.classnames, task.template)
    rows = {"zero-shot": evaluate(unadapted, task, queries)[0]}
    method = trained(run, clip, task.template)
    if task.classnames != run.learned and (
        method.names_unseen or not {*task.classnames} <= {*run.learned}
    ):
        method = method.for_classes(task.classnames)
    rows[run.config["method"]] = evaluate(method, task, queries)[0]
    if queries:
        print(queries.describe(rows[run.config["method"]]))
    print(table(rows))
    return rows


def test_zero_shot(experiment: Experiment, given: dict) -> dict[str, dict]:
    """Print and return the table of CLIP as it is and, if any are given, with templates."""
    clip, task = experiment.load(cache.chosen(given), record={})  # nothing is learned
    experiment.prepare(clip)
    zero_shot = METHODS["zero_shot"]
    settings = zero_shot.Settings(**pick(zero_shot.Settings, given))
    for note in task.notes + unread(settings.prompts, task.tested_names):
        print(f"note: {note}")
    names, template = task.classnames, task.template
    rows = {"zero-shot": evaluate(zero_shot.plain(clip, names, template), task)[0]}
    if kind := next((kind for kind in ("templates", "prompts") if given.get(kind)), None):
        several = zero_shot(clip, names, template, settings)
        rows[f"zero-shot, {kind}"] = evaluate(several, task)[0]
    print(table(rows))
    return rows


def classify(run: Run | None, experiment: Experiment, given: dict) -> None:
    """Print the five likeliest classes of each picture."""
    files = [file for path in given["image"] for file in pictures_in(Path(path))]
    clip = weights.load(experiment.model, experiment.device, image_size=experiment.image_size)
    experiment.prepare(clip)
    if "classes" in given:
        known = named(given["classes"])
    elif run is not None:
        known = [name for names in run.config["classnames"].values() for name in names]
    else:
        raise UserError('--image: say which classes to choose from: --classes "rose,tulip"')
    if run is None:
        zero_shot, template = METHODS["zero_shot"], experiment.template or "a photo of a {}."
        settings = zero_shot.Settings(**pick(zero_shot.Settings, given))
        method = zero_shot(clip, known, template, settings)
    else:
        method = trained(run, clip)
    if method.names_unseen or "classes" in given:
        method = method.for_classes(known)
    skipped: list[str] = []
    with method.inference(), autocast(clip.device, experiment.precision):
        batches = inputs(method, files, skipped)
        if method.transductive and len(files) > 1:
            print(f"note: {run.config['method']} labels these {len(files)} pictures jointly")
            parts = list(batches)
            batches = [([f for part, _ in parts for f in part], torch.cat([x for _, x in parts]))]
        for read, x in batches:
            for path, row in zip(read, method.classify(x).softmax(-1), strict=True):  # x -> (B, K)
                tqdm.write(str(path))  # above the progress bar
                for probability, i in zip(*row.topk(min(5, len(row))), strict=True):
                    tqdm.write(f"  {100 * probability:6.2f} %  {method.classnames[i]}")
    for why in skipped:
        print(f"note: skipped, {why}")


def pictures_in(path: Path) -> list[Path]:
    """A picture's file, or all those below a folder; what else lies there is noted."""
    if not path.is_dir():
        return [path]
    left_out: dict[str, list[Path]] = {}
    files = find_pictures(path, left_out)
    for why, others in left_out.items():
        print(f"note: {path}: left out {len(others)} {why}")
    if not files:
        raise UserError(f"--image {path}: is a folder without pictures")
    return files


def inputs(
    method: Method, files: list[Path], skipped: list[str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """The readable files, a batch at a time, and them encoded for `method.classify`, (B, …).

    Why one could not be read is added to `skipped`; if none can, that is an error.
    """
    config = method.clip.config
    bar = tqdm(total=len(files), unit=" pictures", disable=None)  # None: only on a terminal
    for batch in (files[i : i + BATCH] for i in range(0, len(files), BATCH)):
        read, pixels = [], []
        for path in batch:
            try:
                pixels.append(crop(open_image(path), config))
                read.append(path)
            except UserError as error:
                skipped.append(str(error))
        if read:
            pixels = torch.stack(pixels).to(method.clip.device)
            x = normalize(pixels, config=config)  # (B, 3, n, n)
            yield read, method.encode(x)
        bar.update(len(batch))
    bar.close()
    if len(skipped) == len(files):
        more = f" (and {len(files) - 1} more, which are all)" if len(files) > 1 else ""
        raise UserError(f"{skipped[0]}{more}")


def parse(argv: list[str]) -> dict:
    parser = Parser(description=f"{__doc__}\ndata sets:\n{datasets.LISTED}")
    parser.add_argument("--run", metavar="DIR", help="a folder that train.py left")
    parser.add_argument("--method", help="zero_shot: test CLIP as it is, without a run")
    parser.add_argument("--image", metavar="FILE", nargs="+", help="pictures or folders of them")
    cache.add_flags(parser)
    add_flags(parser.add_argument_group("experiment"), Experiment)
    add_flags(parser.add_argument_group("zero_shot"), METHODS["zero_shot"].Settings)
    # --classes means names here when there are pictures to classify, so choices are checked below.
    classes = next(a for a in parser._actions if a.dest == "classes")
    classes.choices, classes.metavar = None, "NAMES"
    classes.help = 'with --image: names to choose from, "a,b,c" or a file; else base-novel or all'
    given = parser.parse(argv)
    if ("run" in given) == ("method" in given):
        raise UserError("give either --run DIR or --method zero_shot; see --help")
    if "templates" in given and "prompts" in given:
        raise UserError("--templates and --prompts: give one of them")
    if "image" in given:
        for name in sorted(given.keys() - {"run", "method", *PICTURES}):
            raise UserError(f"--{name.replace('_', '-')}: is not read with --image; leave it out")
    if "run" in given:
        read = {"run", *PICTURES[:4]} if "image" in given else {"run", "cache", "cache_gb", *MOVED}
        read |= {*OTHER} if "dataset" in given else set()
        for name in sorted(given.keys() - read):
            raise UserError(f"--{name.replace('_', '-')}: a run knows its own; leave it out")
    if "classes" in given and "image" not in given:
        nearest("--classes", given["classes"], ["base-novel", "all"])
    return given


if __name__ == "__main__":
    run_script(main)
