"""Write a page about runs: how accurate they are, how confident, and where they fail.

python report.py runs/demo/demo/lora-s10-seed1       one run, to its report.html
python report.py runs                                all runs in a folder, compared
python report.py RUN RUN RUN --out three.html        these, compared
python report.py runs/demo/demo/synthetic_uniform_zero_shot-s10-seed1     generated images
python report.py RUN --format json                   every number of the page
python report.py RUN --quick                         without pictures and features, in a second

A page is a single file. It needs no server, no network, and no other file.
"""

import json
import sys
from pathlib import Path

from clip_min import UserError
from clip_min.files import write_text
from fewshot import cache
from fewshot.experiment import MOVED, Experiment, run_script
from fewshot.flags import Parser, add_flags
from fewshot.task import Task
from methods import METHODS, Method
from methods.interop.load import trained
from reports import figures_of_run, generated, run_page, several, several_page
from reports.album import Album
from reports.features import before_and_after
from reports.gather import Found, Tested, find, read


def main() -> None:
    given = parse(sys.argv[1:])
    paths = [Path(path) for path in given["paths"]]
    kind = given.get("format", "html")
    default = (paths[0] if len(paths) == 1 else Path()) / f"report.{kind}"
    found = find(paths)
    for reason in found.left_out.values():
        print(f"note: left out, {reason}")
    numbers, page = report(found, given)
    file = Path(given.get("out", default))
    write_text(file, page if kind == "html" else json.dumps(numbers, indent=1) + "\n")
    print(f"report: {file}")


def report(found: Found, given: dict) -> tuple[dict, str]:
    """The numbers and the page of everything that was found."""
    if len(found.runs) == 1 and not found.generated:
        (run,) = found.runs
        run.missing += [f"left out: {reason}" for reason in found.left_out.values()]
        return of_run(run, *load(run, given))
    if len(found.generated) == 1 and not found.runs and not found.left_out:
        numbers = generated.numbers(found.generated[0])
        return numbers, generated.write(numbers, found.generated[0])
    numbers = several.numbers(found)
    return numbers, several_page.write(numbers, found)


def of_run(
    run: Tested, task: Task | None, unadapted: Method | None, method: Method | None
) -> tuple[dict, str]:
    """The numbers and the page of a single run; None is not shown."""
    numbers = figures_of_run.numbers(run)
    if method is not None:
        try:
            numbers["features"] = before_and_after(unadapted, method, task)
        except UserError as error:
            run.missing.append(str(error))
    return numbers, run_page.write(numbers, Album(run.record, task))


def load(run: Tested, given: dict) -> tuple[Task | None, Method | None, Method | None]:
    """The test pictures, zero-shot CLIP and the trained method, as in eval.py. What cannot be
    loaded is None, with a line in `run.missing`.
    """
    task = unadapted = method = None
    if given["quick"]:
        run.missing.append("pictures and features were left out (--quick)")
        return task, unadapted, method
    try:
        moved = {key: given[key] for key in MOVED if key in given}
        experiment = Experiment(**{**run.experiment, "device": "", **moved})
        clip, task = experiment.load(cache.chosen(given), record=run.record)
        experiment.prepare(clip)
        names = run.config["classnames"]
        if names != {part: test.classnames for part, test in task.tests.items()}:
            raise UserError("the data set's classes are no longer those of the run")
        method = trained(run.run, clip)
        unadapted = METHODS["zero_shot"].plain(clip, run.run.learned, run.run.template)
    except (UserError, TypeError) as error:
        what = "pictures and features" if task is None else "features"
        run.missing.append(f"{what} could not be loaded: {' '.join(str(error).split())}")
    return task, unadapted, method if unadapted else None


def write_run(path: Path, task: Task, unadapted: Method, method: Method) -> Path:
    """Write the page of a run that has just ended -> its file."""
    run = read(path)
    file = path / "report.html"
    write_text(file, of_run(run, task, unadapted, method)[1])
    return file


def parse(argv: list[str]) -> dict:
    parser = Parser(description=__doc__)
    parser.add_argument("paths", metavar="PATH", nargs="+", help="runs, or folders of runs")
    parser.add_argument("--format", choices=["html", "json"], help="format of the report [html]")
    parser.add_argument("--out", metavar="FILE", help="file to write [PATH/report.html]")
    parser.add_argument("--quick", action="store_true", help="load no pictures and no model")
    add_flags(parser, cache.Flags)
    add_flags(parser.add_argument_group("where things are now"), Experiment, only=MOVED)
    return parser.parse(argv)


if __name__ == "__main__":
    run_script(main)
