"""A grid of runs, for each data set, number of shots and seed; its tables, JSON file and plot.

    --shots 1,2,4 --seeds 1,2,3      nine runs in separate folders, and their mean ± std
    --dataset dtd,eurosat            the same on each data set, and the mean over data sets

The spread is the sample standard deviation over seeds (n - 1); a single seed has none. The mean
over data sets averages accuracies; as in publications, HM is computed from the mean base and the
mean novel accuracy, also among all names ("joint").
"""

import argparse
import json
import statistics
from pathlib import Path

from clip_min import UserError
from clip_min.files import read_json, replacing, write_text
from clip_min.typed import expect
from fewshot.metrics import harmonic_mean
from fewshot.run import set_aside

SCORES = dict.fromkeys(("base", "novel", "hm", "all"), float | None)
JOINT = dict.fromkeys(("base", "novel", "hm"), float)
# Scores in a table and their headings, if there are two halves.
SHOWN = {"base": "base", "novel": "novel", "hm": "HM", "joint_hm": "all names"}


def read_results(file: Path) -> dict:
    """The scores in a run's results.json; "joint" is None in earlier versions."""
    kind = {**SCORES, "zero_shot": SCORES}
    results = read_json(file, "remove the run's folder to run it again", kind)
    for scores, place in ((results, ""), (results["zero_shot"], "zero_shot.")):
        if scores.setdefault("joint", None) is not None:
            expect(scores["joint"], JOINT, str(file), f"{place}joint")
        expect(scores.get("val"), float | None, str(file), f"{place}val")
        for key in (*SCORES, "val"):
            if (value := scores.get(key)) is not None and not 0 <= value <= 100:
                raise UserError(f"{file}: {place}{key} is {value:g}, expected 0 to 100 (percent)")
    return results


def numbers(text: str, words: tuple[str, ...] = ()) -> list[int | str]:
    """The type of a flag: "1,2,4" -> [1, 2, 4]; one of `words` is returned unchanged."""
    try:
        values = (value.strip() for value in text.split(","))
        return list(dict.fromkeys(n if n in words else int(n) for n in values))
    except ValueError:
        message = f"invalid value: {text!r}; expected a number, or several as 1,2,4"
        raise argparse.ArgumentTypeError(message) from None


def summarise(results: dict[tuple[int, int], dict]) -> dict:
    """(shots, seed) -> scores of a run  =>  summaries over seeds.

    {"seeds": [1, 2], "zero_shot": {"base": {"mean", "std", "values"}, …}, "shots": {"4": {…}, …}}
    Missing scores are left out (novel, if a method cannot name new classes).
    """
    shots = list(dict.fromkeys(s for s, _ in results))
    runs = {s: [result for (of, _), result in results.items() if of == s] for s in shots}
    return {
        "seeds": list(dict.fromkeys(seed for _, seed in results)),
        # The test pictures may depend on the seed, but not on the shots.
        "zero_shot": spread([result["zero_shot"] for result in runs[shots[0]]]),
        "shots": {str(s): spread(runs[s]) for s in shots},
    }


def spread(runs: list[dict]) -> dict[str, dict]:
    """Scores of runs with several seeds  =>  {"base": {"mean", "std", "values"}, …, "joint_hm"}"""
    found = {}
    for part in (*SCORES, "val", *(f"joint_{part}" for part in JOINT)):
        values = [_number(run, part) for run in runs]
        if None not in values:  # left out, if a run of an earlier version lacks it
            std = statistics.stdev(values) if len(values) > 1 else None
            found[part] = {"mean": statistics.mean(values), "std": std, "values": values}
    return found


def _number(scores: dict, part: str) -> float | None:
    """One of the scores of `evaluate`; "joint_hm": the HM of "joint"."""
    if part in SCORES:
        return scores[part]
    if part == "val":  # on validation images; missing in earlier versions
        return scores.get("val")
    return scores["joint"] and scores["joint"][part.removeprefix("joint_")]


def counted(shots: int | str) -> str:
    """counted(1) is "1 shot", counted("all") "all shots"."""
    return f"{shots} shot{'s' if str(shots) != '1' else ''}"


def rows(method: str, summary: dict) -> dict[str, dict]:
    """Spreads by name: "zero-shot", "lora, 4 shots", …"""
    named = {"zero-shot": summary["zero_shot"]}
    for shots, scores in summary["shots"].items():
        named[f"{method}, {counted(shots)}"] = scores
    return named


def mean(spreads: list[dict]) -> dict[str, dict]:
    """The spreads of several data sets  =>  their mean, for scores that all data sets have."""
    means = {}
    for part in ("base", "novel", "all", "val", "joint_base", "joint_novel"):
        values = [spread[part]["mean"] for spread in spreads if part in spread]
        if len(values) == len(spreads):
            means[part] = statistics.mean(values)
    for of in ("", "joint_"):
        if f"{of}novel" in means:
            means[f"{of}hm"] = harmonic_mean(means[f"{of}base"], means[f"{of}novel"])
    return {part: {"mean": value, "std": None} for part, value in means.items()}


def table(method: str, summary: dict) -> str:
    """A table: a line for zero-shot CLIP, and one for each number of shots."""
    return _lines(rows(method, summary), _columns(summary["zero_shot"]))


def table_of_data_sets(of: dict[str, dict[str, dict]]) -> str:
    """Data set -> its `rows`  =>  a line for each data set, and a line of means: in a single table
    if each row is one number, otherwise in a table for each row.
    """
    labels = list(next(iter(of.values())))
    of = {**of, "mean": {k: mean([spreads[k] for spreads in of.values()]) for k in labels}}
    parts = _columns(of["mean"]["zero-shot"])
    if parts == ["all"]:
        return _lines(
            {name: {k: s[k].get("all") for k in labels} for name, s in of.items()}, labels
        )
    tables = (_lines({name: s[k] for name, s in of.items()}, parts) for k in labels)
    return "\n\n".join(f"{k}\n{lines}" for k, lines in zip(labels, tables, strict=True))


def _lines(scores: dict[str, dict], columns: list[str]) -> str:
    """name -> column -> score, as a table; n/a for missing scores."""
    first = max(len(name) for name in scores) + 2
    width = max(16, *(len(column) + 2 for column in columns))
    lines = [" " * first + "".join(f"{_title(column):>{width}}" for column in columns)]
    for name, of in scores.items():
        cells = (cell(of.get(column)) for column in columns)
        lines.append(f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def _columns(zero_shot: dict[str, dict]) -> list[str]:
    """The columns of a table: one number, or those of two halves."""
    return ["all"] if "all" in zero_shot else list(SHOWN)


def _title(part: str) -> str:
    return SHOWN.get(part, part)


def cell(score: dict | None) -> str:
    """A spread as text: "81.20 ± 0.41"."""
    if score is None:
        return "n/a"
    return f"{score['mean']:.2f}" + ("" if score["std"] is None else f" ± {score['std']:.2f}")


def save_plot(method: str, summary: dict, path: Path) -> None:
    """Accuracy against shots, with the spread; dashed: zero-shot CLIP."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(summary["shots"])
    counts = [int(number) for number in labels if number != "all"]
    shots = [2 * max(counts, default=1) if n == "all" else int(n) for n in labels]
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    zero_shot = summary["zero_shot"]
    for i, part in enumerate(part for part in _columns(zero_shot) if part in zero_shot):
        scores = [spread.get(part) for spread in summary["shots"].values()]
        if None not in scores:
            means = [score["mean"] for score in scores]
            stds = [score["std"] or 0 for score in scores]
            axes.errorbar(
                shots, means, stds, marker="o", capsize=3, color=f"C{i}", label=_title(part)
            )
        axes.axhline(zero_shot[part]["mean"], color=f"C{i}", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, labels)
    axes.set(xlabel="images a class", ylabel="accuracy (%)", title=method)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def show(folder: Path, method: str, settings: dict, summary: dict) -> None:
    """Print mean and spread over seeds, and write them to `folder` as JSON and as a plot."""
    found = {"method": method, **settings, **summary}
    file = keep(folder, f"{method}-grid", summary["shots"], summary["seeds"], found)
    save_plot(method, summary, file.with_suffix(".png"))
    print(f"\nmean ± standard deviation, seeds {', '.join(map(str, summary['seeds']))}")
    print(table(method, summary))
    print(f"grid: {file}")


def show_data_sets(folder: Path, method: str, settings: dict, summaries: dict[str, dict]) -> None:
    """The same for several data sets (name -> `summarise`) and their mean, in one JSON file."""
    of = {dataset: rows(method, summary) for dataset, summary in summaries.items()}
    means = {k: mean([rows[k] for rows in of.values()]) for k in next(iter(of.values()))}
    found = {"method": method, **settings, "datasets": summaries, "mean": means}
    one = next(iter(summaries.values()))
    file = keep(folder, f"{method}-grid", one["shots"], one["seeds"], found)
    print(f"\n{table_of_data_sets(of)}")
    print(f"data sets: {file}")


def keep(folder: Path, name: str, shots, seeds, content: dict) -> Path:
    """Write a summary as JSON -> the file; an earlier summary is renamed."""
    drawn = "-".join(map(str, shots)), "-".join(map(str, seeds))
    file = folder / "{}-s{}-seed{}.json".format(name, *drawn)
    text = json.dumps(content, indent=2) + "\n"
    if file.exists() and file.read_bytes() != text.encode():
        for earlier in (file, file.with_suffix(".png")):
            if earlier.exists():
                set_aside(earlier, "grid")
    write_text(file, text)
    return file
