"""Test a trained run again, test zero-shot CLIP, or classify pictures of your own.

python eval.py --run runs/demo/demo/lora-s10-seed1            the table that training printed
python eval.py --run DIR --dataset other                      the run on another data set
python eval.py --run DIR --dataset coop-11                    on several, and their mean
python eval.py --run DIR --image a.jpg b.jpg FOLDER           top 5 classes with probabilities
python eval.py --run DIR --image FOLDER --csv out.csv         the same, as a table
python eval.py --run DIR --image a.jpg --classes "rose,tulip" among other classes
python eval.py --run DIR --image a.jpg --explain out.png      where the class token looks
python eval.py --run DIR --keep-share 0,0.25,0.5,0.75,1       interpolated with zero-shot CLIP
python eval.py --method zero_shot --dataset demo              zero-shot CLIP
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# Before torch: clip_min sets how threads wait.
from clip_min import CLIP, UserError, weights  # isort: skip
import torch
from tqdm import tqdm

from clip_min.errors import unknown
from clip_min.files import write_json, write_text
from fewshot import cache, datasets, grid, ranks
from fewshot.catalogue import DATASETS, GROUPS, IMPLIED
from fewshot.experiment import BLIND, MOVED, Experiment, evaluate, named, run_script
from fewshot.flags import Parser, add_flags, listed, pick
from fewshot.pictures import Reader
from fewshot.predictions import brief
from fewshot.record import kept, summary
from fewshot.run import Run, set_aside
from fewshot.shares import NOTE, numbers, save_curve, shown
from fewshot.tables import table
from fewshot.task import Task, make_test
from fewshot.transductive import Queries
from methods import METHODS
from methods.class_prompts import strangers
from methods.interop.classify import Answer, Classifier, pictures_in
from methods.interop.classify import write as write_table
from methods.interop.load import described, trained
from methods.wise_ft import keep_share
from reports.rollout import explain

# Flags that describe another --dataset, allowed with --run.
OTHER = ("dataset", "split", "template", "skip_bad_images")
# Flags for classifying your own pictures; a run has its own values for the last six.
PICTURES = ("image", "classes", "device", "model", "csv", "threshold", "explain")
PICTURES += ("image_size", "template", "templates", "prompts", "precision", "threads")


def main() -> None:
    given = parse(sys.argv[1:])
    if "run" in given:
        run = Run.open(Path(given["run"]))
        moved = {key: given[key] for key in MOVED if key in given}
        try:
            experiment = Experiment(**{**run.config["experiment"], "device": "", **moved})
        except TypeError as error:
            raise UserError(f"{run.path}/config.json: not a config of a run ({error})") from None
        described(run)  # raises at once, if it is not a run
    else:
        if given["method"] != "zero_shot":
            raise unknown("--method", given["method"], ["zero_shot"])
        more = {"classes": "all"} if "image" in given else {}  # with --image, --classes holds names
        asked = given.get("dataset", Experiment.dataset)
        names = listed("--dataset", asked, DATASETS, GROUPS)
        each = [IMPLIED.get(asked, {}) | given | more | {"dataset": name} for name in names]
        run, experiments = None, [Experiment(**pick(Experiment, flags)) for flags in each]
        experiment = experiments[0]
    if "image" in given:
        classify(run, experiment, given)
    elif run is None:
        check_there(experiments)
        data, model, _ = experiment.folder("zero_shot").parts
        folder = Path("runs") / data.replace(experiment.dataset, asked.replace(" ", ""), 1) / model
        tables = {each.dataset: test_zero_shot(each, given) for each in experiments}
        show_mean(tables, folder / "zero_shot-eval.json")
    elif "dataset" in given:
        transfer(run, experiment, given)
    else:
        test(run, experiment, given)


def test(run: Run, experiment: Experiment, given: dict) -> None:
    """Print the table that training printed, from a new test."""
    record = kept(run.path, run.config)
    clip, task = experiment.load(cache.chosen(given), record=record)
    experiment.prepare(clip)
    for note in task.notes:
        print(f"note: {note}")
    run.check_model(weights.fingerprint(clip))
    if not (run.path / "results.json").exists():
        print("note: no results.json; an unfinished run is tested at its best checkpoint so far")
    if run.config["classnames"] != {part: t.classnames for part, t in task.tests.items()}:
        raise UserError(
            f"{run.path}: the data set's classes are no longer those of the run; give the right "
            "data set with --data-root, or train again"
        )
    if not record and "data" in run.config and run.config["data"] != summary(task.record("")):
        raise UserError(
            f"{run.path}: the data have changed since training, and without its data.json it is "
            "unknown which pictures the run has seen; put data.json back"
        )
    shares = given.get("keep_share", [])
    rows = compare(run, clip, task, shares)
    if len(shares) > 1 and ranks.rank == 0:
        curve = dict(zip(shares, [*rows.values()][1:], strict=True))
        points = [{"share": share, **brief(scores)} for share, scores in curve.items()]
        name, file = run.config["method"], run.path / "keep_share.json"
        write_json(file, {"method": name, "accuracies_of": "test images", "points": points})
        save_curve(name, curve, file.with_suffix(".png"))
        print(f"curve: {file.with_suffix('.png')}")


def transfer(run: Run, experiment: Experiment, given: dict) -> None:
    """Print the tables of a run on other data sets, and their mean.

    As in the published protocols, the data set that the run learned from is left out.
    """
    names = listed("--dataset", given["dataset"], DATASETS, GROUPS)
    names = [name for name in names if name != experiment.dataset] if len(names) > 1 else names
    known = {"model": experiment.model, "classes": "all", "precision": experiment.precision}
    flags = IMPLIED.get(given["dataset"], {}) | given | known
    others = [Experiment(**pick(Experiment, flags | {"dataset": name})) for name in names]
    check_there(others)
    tables = {other.dataset: on_other(run, experiment, other, given) for other in others}
    show_mean(tables, run.path / f"eval-{given['dataset'].replace(' ', '')}.json")


def check_there(experiments: list[Experiment]) -> None:
    """UserError, if one of several data sets is missing, before hours of work on the others."""
    for experiment in experiments if len(experiments) > 1 else ():
        experiment.load_dataset()


def show_mean(tables: dict[str, dict[str, dict]], file: Path) -> None:
    """Print the tables of several data sets as one, with their mean, and write them to a file."""
    if len(tables) < 2 or ranks.rank:
        return
    of = {name: {k: grid.spread([s]) for k, s in rows.items()} for name, rows in tables.items()}
    print(f"\n{grid.table_of_data_sets(of)}")
    mean = {k: grid.mean([rows[k] for rows in of.values()]) for k in next(iter(of.values()))}
    scores = {name: {k: brief(s) for k, s in rows.items()} for name, rows in tables.items()}
    text = json.dumps({"datasets": scores, "mean": mean}, indent=2) + "\n"
    if file.exists() and file.read_bytes() != text.encode():
        set_aside(file, "table")
    write_text(file, text)
    print(f"data sets: {file}")


def on_other(run: Run, experiment: Experiment, other: Experiment, given: dict) -> dict[str, dict]:
    """Print and return the table of a run on all classes of another data set.

    Names and template come from that data set, the learned tensors from the run.
    """
    with ranks.first_alone():
        clip = weights.load(other.model, other.device, image_size=experiment.image_size)
        dataset = other.load_dataset()
    other.prepare(clip)
    run.check_model(weights.fingerprint(clip))
    how = (other.skip_bad_images, cache.chosen(given), other.precision, clip.config)
    reader = Reader(clip.config.image_size, torch.device(other.device), *how)
    record = kept(run.path, run.config)
    task = make_test(dataset, reader, record=record)
    for note in task.notes:
        print(f"note: {note}")
    sizes = f"{len(task.classnames)} classes, {len(task.tests['all'].batches)} test images"
    print(f"{other.dataset}: {sizes}; {task.template!r}")
    return compare(run, clip, task, given.get("keep_share", []))


def compare(run: Run, clip: CLIP, task: Task, shares: list[float]) -> dict[str, dict]:
    """Print and return the table of zero-shot CLIP and of the run on `task`; with `shares`, of the
    run with each of these shares of the learned change.
    """
    name, method = run.config["method"], trained(run, clip, task.template)
    known = method
    if task.classnames != run.learned and (
        method.names_unseen or not {*task.classnames} <= {*run.learned}
    ):
        known = method.for_classes(task.classnames)  # shares the tensors
    if shares:
        learned = {key: tensor.detach().clone() for key, tensor in method.adapter_state().items()}
        keep_share(method, learned, shares[0])  # raises before any work
    queries = Queries.of(*described(run), run.config["experiment"]["seed"])
    unadapted = METHODS["zero_shot"].plain(clip, task.classnames, task.template)
    rows = {"zero-shot": evaluate(unadapted, task, queries)[0]}
    for share in shares or [None]:
        if share is not None:
            method.load_adapter(keep_share(method, learned, share))
        row = name if share is None else f"{name}, {shown(share)} kept"
        rows[row] = evaluate(known, task, queries)[0]
    if queries:
        print(queries.describe(rows[name]))
    print(table(rows))
    if shares:
        print(NOTE)
    return rows


def test_zero_shot(experiment: Experiment, given: dict) -> dict[str, dict]:
    """Print and return the table of zero-shot CLIP and, if any are given, with templates."""
    clip, task = experiment.load(cache.chosen(given), record={})  # no training
    experiment.prepare(clip)
    zero_shot = METHODS["zero_shot"]
    settings = zero_shot.Settings(**pick(zero_shot.Settings, given))
    for note in task.notes + strangers(settings.prompts or {}, task.tested_names):
        print(f"note: {note}")
    names, template = task.classnames, task.template
    rows = {"zero-shot": evaluate(zero_shot.plain(clip, names, template), task)[0]}
    if kind := next((kind for kind in ("templates", "prompts") if given.get(kind)), None):
        several = zero_shot(clip, names, template, settings)
        rows[f"zero-shot, {kind}"] = evaluate(several, task)[0]
    print(table(rows))
    return rows


def classify(run: Run | None, experiment: Experiment, given: dict) -> None:
    """Print the five likeliest classes of each picture, or write them to a file."""
    files = [file for path in given["image"] for file in pictures_in(Path(path))]
    if "explain" in given and len(files) != 1:
        raise UserError(f"--explain: draws one picture, but --image has {len(files)}; give one")
    if "explain" in given and same_file(Path(given["explain"]), files[0]):
        raise UserError(f"--explain {given['explain']}: is the picture itself; give another name")
    clip = weights.load(experiment.model, experiment.device, image_size=experiment.image_size)
    experiment.prepare(clip)
    if run is None and experiment.model == "demo":
        print(f"note: {BLIND}")
    if "classes" in given:
        known = named(given["classes"])
    elif run is not None:
        known = [name for names in run.config["classnames"].values() for name in names]
    else:
        raise UserError('--image: needs the classes to choose from; give --classes "rose,tulip"')
    if run is None:
        zero_shot, template = METHODS["zero_shot"], experiment.template or "a photo of a {}."
        settings = zero_shot.Settings(**pick(zero_shot.Settings, given))
        method = zero_shot(clip, known, template, settings)
    else:
        method = trained(run, clip, share=given.get("keep_share", [None])[0])
    if method.names_unseen or "classes" in given:
        method = method.for_classes(known)
    if "explain" in given:
        asked = {"zero-shot": method}
        if run is not None:
            plain = METHODS["zero_shot"].plain(clip, method.classnames, run.template)
            asked = {"zero-shot": plain, run.config["method"]: method}
        explain(asked, files[0], Path(given["explain"]))
        print(f"explained: {given['explain']}")
    if method.transductive and len(files) > 1:
        print(f"note: {run.config['method']} labels these {len(files)} pictures jointly")
    answers = Classifier(method, experiment.precision).classify(files)
    answers = some_read(tqdm(answers, total=len(files), unit=" pictures", disable=None))
    threshold = given.get("threshold", 0.0)
    if "csv" in given:
        count, unknown, unread = write_table(answers, Path(given["csv"]), threshold)
        said = [f"{count:,} pictures"]
        said += [f"{unknown:,} none of the classes"] if threshold else []
        said += [f"{unread:,} could not be read"] if unread else []
        print(f"{', '.join(said)}: {given['csv']}")
        return
    skipped = []
    for answer in answers:
        if answer.error:
            skipped.append(answer.error)
            continue
        tqdm.write(str(answer.path))  # above the progress bar
        if answer.probabilities[0] < threshold:
            tqdm.write(f"  none of the classes (below {100 * threshold:.2f} %)")
        for name, probability in zip(answer.names, answer.probabilities, strict=True):
            tqdm.write(f"  {100 * probability:6.2f} %  {name}")
    for why in skipped:
        print(f"note: skipped, {why}")


def same_file(path: Path, other: Path) -> bool:
    """Whether both are one file, whatever it is called."""
    return path.exists() and other.exists() and path.samefile(other)


def some_read(answers: Iterable[Answer]) -> Iterator[Answer]:
    """The same answers; UserError, if no picture could be read."""
    errors, count = [], 0
    for count, answer in enumerate(answers, 1):
        errors += [answer.error] if answer.error and len(errors) == count - 1 else []
        yield answer
    if errors and len(errors) == count:
        more = f" (and {count - 1} more, which are all)" if count > 1 else ""
        raise UserError(f"{errors[0]}{more}")


def parse(argv: list[str]) -> dict:
    parser = Parser(description=f"{__doc__}\ndata sets:\n{datasets.LISTED}")
    parser.add_argument("--run", metavar="DIR", help="a run folder of train.py")
    parser.add_argument("--method", help="zero_shot: test zero-shot CLIP, without a run")
    parser.add_argument("--image", metavar="FILE", nargs="+", help="pictures or folders of them")
    parser.add_argument("--explain", metavar="PNG", help="draw where the class token looks")
    parser.add_argument(
        "--keep-share",
        metavar="A,…",
        type=numbers,
        help="interpolate between zero-shot CLIP (0) and the run (1); several numbers: a curve, "
        "written to the run's folder",
    )
    parser.add_argument("--csv", metavar="FILE", help="write a row for each picture, .csv or .json")
    parser.add_argument(
        "--threshold", type=float, help="below this probability, the answer is none of the classes"
    )
    add_flags(parser, cache.Flags)
    add_flags(parser.add_argument_group("experiment"), Experiment)
    add_flags(parser.add_argument_group("zero_shot"), METHODS["zero_shot"].Settings)
    # With --image, --classes holds names, so its choices are checked below.
    classes = next(a for a in parser._actions if a.dest == "classes")
    classes.choices, classes.metavar = None, "NAMES"
    classes.help = 'with --image: names to choose from, "a,b,c" or a file; else base-novel or all'
    given = parser.parse(argv)
    if ("run" in given) == ("method" in given):
        raise UserError("give either --run DIR or --method zero_shot; see --help")
    if "explain" in given and "image" not in given:
        raise UserError("--explain: works only with --image; add --image, or leave it out")
    if "templates" in given and "prompts" in given:
        raise UserError("--templates and --prompts: give one of them")
    if "image" in given and ranks.size > 1:
        raise UserError("--image: works in a single process; start it without torchrun")
    if not all(given.get("image", ["."])):
        raise UserError("--image: a name is empty; give pictures or folders of them")
    if not given.get("explain", ".png").lower().endswith(".png"):
        raise UserError(f"--explain {given['explain']}: expected a file name with .png")
    if "image" in given:
        for name in sorted(given.keys() - {"run", "method", "keep_share", *PICTURES}):
            raise UserError(f"--{name.replace('_', '-')}: has no effect with --image; leave it out")
        if not given.get("csv", ".csv").endswith((".csv", ".json")):
            raise UserError(f"--csv {given['csv']}: expected a file name with .csv or .json")
        if not 0 <= given.get("threshold", 0) <= 1:
            raise UserError(f"--threshold {given['threshold']}: expected 0 to 1")
    for name in sorted(given.keys() & {"shots", "shots_file"}) if "run" not in given else ():
        flag = name.replace("_", "-")
        raise UserError(
            f"--{flag} {given[name]}: has no effect on zero-shot CLIP, which learns nothing; "
            "leave it out"
        )
    for name in sorted(given.keys() & {"csv", "threshold"}) if "image" not in given else ():
        raise UserError(f"--{name}: works only with --image; leave it out")
    if "keep_share" in given and "run" not in given:
        raise UserError("--keep-share: works only with --run DIR; leave it out")
    if len(given.get("keep_share", [])) > 1 and given.keys() & {"image", "dataset"}:
        raise UserError("--keep-share: with --image or --dataset, give one number")
    if "run" in given:
        read = {"run", "keep_share"}
        read |= {*PICTURES[:7]} if "image" in given else {"cache", "cache_gb", *MOVED}
        if "dataset" in given:  # all of its classes are tested
            read = read - {"base_classes"} | {*OTHER}
        for name in sorted(given.keys() - read):
            raise UserError(f"--{name.replace('_', '-')}: a run has its own; leave it out")
    kinds = ["base-novel", "all"]
    if "image" not in given and given.get("classes", "all") not in kinds:
        raise unknown("--classes", given["classes"], kinds)
    return given


if __name__ == "__main__":
    run_script(main, shared=True)
