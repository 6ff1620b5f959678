"""The output at the end of a run: a small table, and a plot of its curves."""

from pathlib import Path

from torch import Tensor

from clip_min.errors import some
from clip_min.files import replacing


def table(rows: dict[str, dict]) -> str:
    """Name -> scores (from `evaluate`), as lines of a table; n/a for missing scores.

    "all names": the HM of base and novel pictures, each among the names of both halves.
    """
    shown = {"base": "base", "novel": "novel", "hm": "HM", "joint": "all names"}
    if any(scores["all"] is not None for scores in rows.values()):
        shown = {"all": "all"}
    first = max(len(name) for name in rows) + 2
    widths = {column: max(8, len(title) + 2) for column, title in shown.items()}
    lines = [" " * first + "".join(f"{title:>{widths[c]}}" for c, title in shown.items())]
    for name, scores in rows.items():
        numbers = {**scores, "joint": scores["joint"] and scores["joint"]["hm"]}
        cells = {c: "n/a" if numbers[c] is None else f"{numbers[c]:.2f}" for c in shown}
        lines.append(f"{name:<{first}}" + "".join(f"{cells[c]:>{widths[c]}}" for c in shown))
    return "\n".join(lines + _classes_alike(rows))


def _classes_alike(rows: dict[str, dict]) -> list[str]:
    """Means over classes of accuracy and F1, if some classes have many more test images than others
    and dominate accuracy; otherwise nothing.
    """
    parts = {
        p: of for s in rows.values() for p, of in s.get("parts", {}).items() if "macro_f1" in of
    }
    counts = [of["images_a_class"] for of in parts.values()]
    least, most = min((c[0] for c in counts), default=0), max((c[1] for c in counts), default=0)
    if most < 1.5 * least or not parts:
        return []
    first = max(len(name) for name in rows) + 2
    lines = [f"test images per class: {least} to {most}; means over classes, accuracy and F1:"]
    lines += [" " * first + "".join(f"{part:>8}{'F1':>8}" for part in parts)]
    for name, scores in rows.items():
        found = [scores.get("parts", {}).get(part) for part in parts]
        cells = [["n/a"] * 2 if f is None else [f"{f[k]:.2f}" for k in MACRO] for f in found]
        lines.append(f"{name:<{first}}" + "".join(f"{c:>8}" for pair in cells for c in pair))
    return lines


MACRO = ("macro_accuracy", "macro_f1")


def uneven(counts: Tensor, classnames: list[str]) -> str:
    """A line on classes with very different numbers of training images, `counts` (K,)."""
    if none := [classnames[k] for k in (counts == 0).nonzero().flatten().tolist()]:
        return f"note: no training image of {len(none)} classes: {some(none, 5)}"
    few, many = counts.argmin(), counts.argmax()
    ends = " to ".join(f"{counts[k]} ({classnames[k]})" for k in (few, many))
    about = "with gradient steps, --balance gives classes equal weight in the loss"
    return f"training images per class: {ends}; {about}"


def doubts(steps: int, train: float) -> list[str]:
    """Signs that a method has hardly learned: few gradient steps, low training accuracy (%)."""
    found = []
    if steps < 100:
        found.append(
            f"only {steps} gradient steps, expected 100 or more; for longer training, add "
            "--min-steps 500 --patience 0"
        )
    if train < 70:
        found.append(
            f"training accuracy is only {train:.1f} %: the method has not learned its own training "
            "images; try more steps (--min-steps) or a larger --lr"
        )
    return found


def save_curves(log: list[dict], path: Path) -> None:
    """Plot the loss and, if there is one, validation accuracy over gradient steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"loss": "training loss", "val": "validation accuracy (%)"}
    shown = {key: label for key, label in shown.items() if key in log[0]}
    figure, axes = plt.subplots(1, len(shown), figsize=(8, 3), layout="constrained", squeeze=False)
    for i, (key, label) in enumerate(shown.items()):
        steps = [line["step"] for line in log]
        axes[0, i].plot(steps, [line[key] for line in log], marker=".", color=f"C{2 * i}")
        axes[0, i].set(xlabel="gradient step", ylabel=label)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
