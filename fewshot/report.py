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


def save_curves(log: list[dict], path: Path) -> None:
    """Loss and validation accuracy over epochs, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    epochs = [line["epoch"] for line in log]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(epochs, [line["loss"] for line in log], marker=".")
    left.set(xlabel="epoch", ylabel="training loss")
    right.plot(epochs, [line["val"] for line in log], marker=".", color="tab:green")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
