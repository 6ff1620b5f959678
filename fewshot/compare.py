"""Compare several methods on the same pictures: estimated time, a table, and a recommendation.

Methods are compared by accuracy on validation images, a column of the table. All other accuracies
are on test images, which are never used for a choice.
"""

import contextlib
import io
import itertools
import math
import statistics
import time
from pathlib import Path

import torch

from fewshot import grid
from fewshot.loop import NotFinite, State, gradient_step, shuffled
from fewshot.predictions import ZERO_SHOT
from fewshot.schedule import Length, curve, duration, validation_seconds
from fewshot.task import Task


def seconds_of(method, task: Task) -> float:
    """Estimate the seconds in which `method` trains and is tested. The method is used up.

    It takes three gradient steps of each stage and classifies a batch of validation images. Closed
    forms are not timed.
    """
    if not hasattr(method.settings, "epochs"):
        return 0.0
    trained = 0.0

    def tried(method, train, val) -> float:
        nonlocal trained
        s, each = method.settings, validation_seconds(method, val)
        length, state = Length.of(s, train, method.first_stage), State(method, train)
        batches = itertools.cycle(shuffled(train, s.batch_size, 0, 0))
        method.train()
        spent = 0.0
        for start, end in itertools.pairwise(sorted({0, length.switch, length.total})):  # stages
            for step in range(start, min(start + 3, end)):  # the last counts: the first are slower
                started = time.perf_counter()
                gradient_step(method, train, next(batches), state, length, step)
                one = time.perf_counter() - started
            spent += (end - start) * one
        rounds = math.ceil(length.total / length.round) if length.chooses else 0
        images = len(curve(train, val)) + len(val)
        trained += (spent + rounds * images * each) * max(1, len(s.points()))
        method.eval()
        return 0.0

    quiet = contextlib.redirect_stdout(io.StringIO())
    gpu = [method.clip.device] if method.clip.device.type == "cuda" else []
    with quiet, torch.random.fork_rng(gpu), contextlib.suppress(NotFinite):  # the run reports it
        method.fit(task.train, task.val, tried)
    tested = sum(len(test.batches) for test in task.tests.values())
    return trained + tested * validation_seconds(method, task.val)


def within(budget: float, seconds: dict[str, float]) -> list[str]:
    """The methods that fit into `budget` seconds, fastest first; in the given order."""
    left, fitting = budget, set()
    for name in sorted(seconds, key=seconds.get):
        if seconds[name] > left:
            break
        left -= seconds[name]
        fitting.add(name)
    return [name for name in seconds if name in fitting]


def announce(seconds: dict[str, float], kept: list[str]) -> str:
    """The estimate, and the methods that were left out, in one or two lines."""
    each = {name: duration(s) if s else "not timed" for name, s in seconds.items()}  # closed forms
    listed = ", ".join(f"{name} {each[name]}" for name in kept)
    text = f"about {duration(sum(seconds[name] for name in kept))}: {listed}"
    out = [f"{name} (about {duration(s)})" for name, s in seconds.items() if name not in kept]
    return text + (f"\nleft out, since they do not fit: {', '.join(out)}" if out else "")


def summarise(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Method -> results of its runs, one for each seed  =>  summaries, best on validation first.

    The row "zero-shot" is zero-shot CLIP. Each row has the spreads of its scores (`grid.spread`),
    and the means of "parameters", "seconds" (of training) and "peak_memory_mb", None for zero-shot.
    """
    first = next(iter(runs.values()))
    rows = {ZERO_SHOT: [result["zero_shot"] for result in first], **runs}
    found = {}
    for name, results in rows.items():
        costs = {cost: [r.get(cost) for r in results] for cost in COSTS}
        means = {k: None if None in v else statistics.mean(v) for k, v in costs.items()}
        found[name] = {**grid.spread(results), **means}
    return dict(sorted(found.items(), key=lambda row: -row[1]["val"]["mean"]))


COSTS = {"parameters": "parameters", "seconds": "seconds", "peak_memory_mb": "MB"}


def table(rows: dict[str, dict]) -> str:
    """`summarise`'s rows as a table; n/a if a method cannot name the classes."""
    scores = {"all": "test"} if "all" in rows[ZERO_SHOT] else grid.SHOWN
    shown = {"val": "validation", **scores, **COSTS}
    lines = [["", *shown.values()]]
    for name, row in rows.items():
        cells = [grid.cell(row.get(column)) for column in shown if column not in COSTS]
        costs = [(row[cost], 1 if cost == "seconds" else 0) for cost in COSTS]
        costs = ["" if value is None else f"{value:,.{digits}f}" for value, digits in costs]
        lines.append([name, *cells, *costs])
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join(
        "".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()
        for name, *cells in lines
    )


def advice(rows: dict[str, dict], images: int, by_name: set[str]) -> str:
    """Which of `summarise`'s methods to take, and why.

    images: the number of validation images. by_name: methods whose training also changes the
    predictions for new names.
    """
    val = {name: row["val"]["mean"] for name, row in rows.items()}  # the best first
    took = {name: row["seconds"] or 0.0 for name, row in rows.items()}
    called = {name: "zero-shot CLIP" if name == ZERO_SHOT else name for name in rows}
    best, *others = rows
    share = val[best] / 100
    error = 100 * math.sqrt(share * (1 - share) / images)
    text = f"Take {called[best]}: it is best on the {images} validation images, {val[best]:.1f} %."
    near = [
        name for name in others if val[best] - val[name] <= error and took[name] < took[best] / 2
    ]
    if near:
        name = min(near, key=took.get)
        text += (
            f" Within the standard error, {error:.1f} points, is {called[name]}, "
            f"{val[name]:.1f} %, in {took[name]:.1f} s of training instead of {took[best]:.1f} s."
        )
    later = [name for name in rows if name in by_name]
    if "novel" in rows[ZERO_SHOT] and later and best not in (*by_name, ZERO_SHOT):
        text += (
            " Validation images show only base classes; of the methods that also learn for new "
            f"names, {called[later[0]]} is best on them, {val[later[0]]:.1f} %."
        )
    return text


def show(
    results: dict, folders: dict[str, Path], together: Path, settings: dict, by_name: set[str]
) -> None:
    """Print a table and advice for each data set and number of shots, and write them as JSON.

    results: data set -> method -> (shots, seed) -> results.json. folders: data set -> its folder;
    together: the folder for all. settings: method -> recipe and settings. by_name: see `advice`.
    """
    tables: dict[str, dict[str, dict]] = {}  # shots -> data set -> rows
    for dataset, methods in results.items():
        drawn = list(next(iter(methods.values())))
        shots, seeds = (list(dict.fromkeys(of)) for of in zip(*drawn, strict=True))
        found = {}
        for s in shots:
            rows = summarise(
                {m: [r for (of, _), r in runs.items() if of == s] for m, runs in methods.items()}
            )
            images = next(iter(methods.values()))[s, seeds[0]]["val_images"]
            found[str(s)] = {"rows": rows, "advice": advice(rows, images, by_name)}
            tables.setdefault(str(s), {})[dataset] = rows
            seeds_are = f", mean ± standard deviation of seeds {', '.join(map(str, seeds))}"
            print(f"\n{dataset}, {grid.counted(s)}{seeds_are if len(seeds) > 1 else ''}")
            print(f"{table(rows)}\n{found[str(s)]['advice']}")
        content = {"methods": settings, "seeds": seeds, "shots": found}
        print(f"comparison: {grid.keep(folders[dataset], 'compare', shots, seeds, content)}")
    if len(results) > 1:
        means = {s: mean_of_data_sets(list(of.values())) for s, of in tables.items()}
        for s, rows in means.items():
            print(f"\nmean of {len(results)} data sets, {grid.counted(s)}\n{table(rows)}")
        content = {"methods": settings, "seeds": seeds, "datasets": list(results), "shots": means}
        print(f"data sets: {grid.keep(together, 'compare', shots, seeds, content)}")


def mean_of_data_sets(tables: list[dict[str, dict]]) -> dict[str, dict]:
    """`summarise`'s rows for several data sets  =>  their means, best on validation first."""
    found = {}
    for name in tables[0]:
        costs = {cost: [rows[name][cost] for rows in tables] for cost in COSTS}
        means = {k: None if None in v else statistics.mean(v) for k, v in costs.items()}
        found[name] = {**grid.mean([rows[name] for rows in tables]), **means}
    return dict(sorted(found.items(), key=lambda row: -row[1]["val"]["mean"]))
