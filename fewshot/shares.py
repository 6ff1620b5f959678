"""Base and novel accuracy between zero-shot CLIP and a trained run.

    eval.py --run DIR --keep-share 0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1

The curve of WiSE-FT (arXiv:2109.01903): at 0 the method is zero-shot CLIP, at 1 the trained run.
"""

import argparse
from pathlib import Path

from clip_min.files import replacing

NOTE = "note: these accuracies are on test images: do not report a share chosen from them"


def numbers(text: str) -> list[float]:
    """The type of a flag: "0,0.5,1" -> [0.0, 0.5, 1.0]."""
    try:
        values = [float(value) for value in text.split(",")]
        if not all(0 <= value <= 1 for value in values):  # False for NaN
            raise ValueError
    except ValueError:
        message = f"invalid value: {text!r}; expected a number from 0 to 1, or several as 0,0.5,1"
        raise argparse.ArgumentTypeError(message) from None
    return list(dict.fromkeys(value + 0.0 for value in values))  # -0 is 0


def one_share(text: str) -> float:
    """The type of a flag: "0.5" -> 0.5."""
    values = numbers(text)
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"invalid value: {text!r}; expected one number")
    return values[0]


def shown(share: float) -> str:
    """0.25 -> "0.25", 1.0 -> "1"."""
    return str(share).removesuffix(".0")


def save_curve(method: str, curve: dict[float, dict], path: Path) -> None:
    """Plot share -> scores: base against novel accuracy with a point for each share; without two
    halves, accuracy against the share.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    if all(scores["novel"] is not None for scores in curve.values()):
        points = {share: (scores["novel"], scores["base"]) for share, scores in curve.items()}
        axes.set(xlabel="novel accuracy (%)", ylabel="base accuracy (%)")
    else:
        part = "all" if next(iter(curve.values()))["base"] is None else "base"
        points = {share: (share, scores[part]) for share, scores in curve.items()}
        axes.set(xlabel="share kept", ylabel="accuracy (%)")
    order = sorted(points)  # along the line, however the shares were listed
    axes.plot(*zip(*(points[share] for share in order), strict=True), marker="o")
    for share in order:
        axes.annotate(shown(share), points[share], (4, 4), textcoords="offset points", fontsize=8)
    axes.set_title(f"{method}: share of the learned change")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
