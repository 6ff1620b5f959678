"""What a run shows at its end: a small table, and its curves as a picture."""

from pathlib import Path

from clip_min.files import replacing


def table(rows: dict[str, dict]) -> str:
    """Name -> scores (as `evaluate` gives them), one line each; n/a where there is no number."""
    columns = ["all"] if any(s["all"] is not None for s in rows.values()) else []
    columns = columns or ["base", "novel", "hm"]
    width = max(len(name) for name in rows) + 2
    lines = [" " * width + "".join(f"{c.upper() if c == 'hm' else c:>8}" for c in columns)]
    for name, scores in rows.items():
        cells = ("n/a" if scores[c] is None else f"{scores[c]:.2f}" for c in columns)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)


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
            f"training accuracy is only {train:.1f} %: it has not learned its own training images; "
            "try more steps (--min-steps) or a larger --lr"
        )
    return found


def save_curves(log: list[dict], path: Path) -> None:
    """Loss and, where there is one, validation accuracy over gradient steps, as a PNG."""
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
