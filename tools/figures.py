"""Draw docs/figures/: the prompt tree, and where in CLIP each method acts.

    python tools/figures.py [--out docs/figures]

SVG on a light card, legible on light and dark pages. Each run writes the same files.
"""

import argparse
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from clip_min import PromptTree, tokenize  # noqa: E402
from clip_min.tokenizer import tokenizer  # noqa: E402

INK, PALE, LINE = "#1f2933", "#5b6770", "#9aa5b1"
FILL = {"text": "#dbe9fb", "image": "#fde8cf", "both": "#e3f2df", "plain": "#eef1f4"}

TEXTS = ["a photo of a rose.", "a photo of a red rose.", "a photo of a red tulip."]

# Place -> method -> what it does there. A method may act in several places.
PLACES = {
    "text input": {
        "zero_shot": "words as they are",
        "coop": "learned vectors for words",
        "cocoop": "… shifted by the image",
        "kgcoop": "learned vectors for words",
        "promptsrc": "learned tokens, deep",
    },
    "text tower": {
        "lora": "low-rank corrections",
        "disef, disef_f1": "low-rank corrections",
        "two_stage": "LayerNorms, at first",
        "finetune": "all weights, or the last",
    },
    "image input": {
        "vpt": "learned tokens, or --deep",
        "promptsrc": "learned tokens, deep",
        "disef, disef_f1": "painted images, too",
    },
    "image tower": {
        "lora": "low-rank corrections",
        "disef, disef_f1": "low-rank corrections",
        "two_stage": "LayerNorms, at first",
        "finetune": "all weights, or the last",
        "prolip": "the last projection",
    },
    "after the towers": {
        "clip_adapter": "a small network",
        "projection": "square layers",
        "tip_adapter, tip_adapter_f": "images that vote",
        "gda": "a Gaussian a class",
        "linear_probe": "rows from images alone",
        "cross_modal": "rows from names and images",
        "lp_plus_plus": "images' rows plus names'",
        "two_stage": "rows, in the end",
    },
    "the loss": {
        "kgcoop": "stay near written prompts",
        "promptsrc": "stay near frozen CLIP",
        "prolip": "stay near the projection",
        "disef, disef_f1": "painted images count less",
        "projection": "or contrastive",
        "finetune": "or contrastive",
    },
    "the labels": {
        "em_dirichlet": "of a batch, jointly",
        "transclip": "of all images, jointly",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, drawing in (("prompt_tree", prompt_tree()), ("methods", methods())):
        (out / f"{name}.svg").write_text(drawing, encoding="utf-8")
        print(out / f"{name}.svg")


def svg(width: int, height: int, title: str, description: str, parts: list[str]) -> str:
    """A drawing on its card, with what a screen reader says of it."""
    font = "font-family='Helvetica, Arial, sans-serif'"
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' "
        f"height='{height}' role='img' aria-labelledby='title desc' {font}>\n"
        f"<title id='title'>{escape(title)}</title>\n<desc id='desc'>{escape(description)}</desc>\n"
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' "
        f"markerHeight='7' orient='auto'><path d='M0 0 8 4 0 8z' fill='{PALE}'/></marker></defs>\n"
    )
    card = box(0.5, 0.5, width - 1, height - 1, "#ffffff", radius=10)
    return "\n".join([head + card, *parts, "</svg>"]) + "\n"


def box(x: float, y: float, w: float, h: float, fill: str, radius: int = 6) -> str:
    return (
        f"<rect x='{x:g}' y='{y:g}' width='{w:g}' height='{h:g}' rx='{radius}' fill='{fill}' "
        f"stroke='{LINE}'/>"
    )


def text(x: float, y: float, words: str, size: int = 13, colour=INK, anchor="start", bold=False):
    weight = " font-weight='bold'" if bold else ""
    return (
        f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{colour}' text-anchor='{anchor}'"
        f"{weight}>{escape(words)}</text>"
    )


def path(*points: tuple[float, float], tip: bool = True) -> str:
    """A line through points, with an arrow's tip at its end."""
    route = " L".join(f"{x:g} {y:g}" for x, y in points)
    end = " marker-end='url(#tip)'" if tip else ""
    return f"<path d='M{route}' fill='none' stroke='{PALE}' stroke-width='1.5'{end}/>"


# ------------------------------------------------------------------------------- the prompt tree


def prompt_tree() -> str:
    """TEXTS padded, one a row; and below them, the tree that PromptTree makes of them."""
    tokens = tokenize(TEXTS)
    (chunk,) = PromptTree(tokens).chunks
    start, end = int(tokens[0, 0]), int(tokens.max())
    words = {start: "[start]", end: "[end]"}
    label = [words.get(t) or tokenizer().decode([t]).strip() for t in chunk.tokens.tolist()]
    sees = chunk.mask == 0
    # A node's parent is the nearest of those it sees: the last before it in the row.
    parent = [max((j for j in range(i) if sees[i, j]), default=None) for i in range(len(label))]
    leaves = chunk.ends.tolist()
    # A node stands on the row of the first prompt that it leads to.
    row = [next(r for r, leaf in enumerate(leaves) if sees[leaf, i]) for i in range(len(label))]

    step, high, left = 92, 34, 20
    parts = [text(left, 34, "Three prompts of 77 tokens, padding included", 15, bold=True)]
    lengths = (tokens.argmax(dim=1) + 1).tolist()
    for r, (prompt, length) in enumerate(zip(tokens.tolist(), lengths, strict=True)):
        y = 50 + 40 * r
        shown = [words.get(t) or tokenizer().decode([t]).strip() for t in prompt[:length]]
        for c in range(9):
            x, inside = left + step * c, c < length
            parts.append(box(x, y, 76, 28, FILL["text"] if inside else FILL["plain"]))
            what = shown[c] if inside else "0"
            parts.append(text(x + 38, y + 19, what, 13, INK if inside else PALE, "middle"))
        parts.append(text(left + step * 9 - 6, y + 19, f"… {77 - length} zeros", 12, PALE))
    top = 216
    count = f"The same as one tree of {len(label)} tokens: each beginning once, no padding"
    parts.append(text(left, top, count, 15, bold=True))
    place = [
        (left + step * int(p), top + 18 + 46 * r) for p, r in zip(chunk.positions, row, strict=True)
    ]
    for i, (x, y) in enumerate(place):
        if parent[i] is None:
            continue
        px, py = place[parent[i]]
        turn = x - 8  # out of the parent, down to the row, into the child
        parts.append(
            path(
                (px + 76, py + high / 2),
                (turn, py + high / 2),
                (turn, y + high / 2),
                (x, y + high / 2),
                tip=False,
            )
        )
    for i, (x, y) in enumerate(place):
        parts.append(box(x, y, 76, high, FILL["both" if i in leaves else "text"]))
        parts.append(text(x + 38, y + 22, label[i], 13, INK, "middle"))
    low = top + 18 + 46 * len(TEXTS) + 16
    note = (
        "A token sees itself and the tokens on its path from [start]: "
        "those it would see if its prompt stood alone."
    )
    parts.append(text(left, low, note, 13, PALE))
    parts.append(
        text(
            left,
            low + 20,
            "Each [end], in green, is read: it gives the text feature of one prompt.",
            13,
            PALE,
        )
    )
    description = (
        f"The prompts {', '.join(TEXTS)} written one below the other, 77 tokens each, "
        f"{77 * len(TEXTS)} in all; below them the same as a tree of {len(label)} tokens, in which "
        "the common beginning stands once."
    )
    return svg(960, low + 40, "The prompt tree", description, parts)


# ----------------------------------------------------------------------- each method's place


def methods() -> str:
    """CLIP from left to right, its text half above its image half, and methods in their places."""
    parts = [text(24, 36, "Where each method acts", 17, bold=True)]
    columns = {"input": 24, "tower": 276, "after": 528, "end": 780}
    width, line = 232, 32

    def panel(place: str, x: float, y: float, fill: str, heading: str, below: str) -> float:
        """A part of CLIP with its methods -> its lower edge."""
        rows = PLACES[place]
        high = 58 + line * len(rows) + 6
        parts.append(box(x, y, width, high, fill, radius=8))
        parts.append(text(x + 12, y + 22, heading, 14, bold=True))
        parts.append(text(x + 12, y + 40, below, 12, PALE))
        for i, (name, what) in enumerate(rows.items()):
            top = y + 50 + line * i
            parts.append(text(x + 12, top + 14, name, 13))
            parts.append(text(x + 12, top + 27, what, 11, PALE))
        return y + high

    upper, lower = 56, 330
    ends = [
        panel(
            "text input",
            columns["input"],
            upper,
            FILL["text"],
            "Text input",
            "tokens of “a photo of a {}.”",
        ),
        panel(
            "text tower",
            columns["tower"],
            upper,
            FILL["text"],
            "Text tower",
            "blocks → a feature a class, W",
        ),
        panel(
            "image input",
            columns["input"],
            lower,
            FILL["image"],
            "Image input",
            "patches of a picture",
        ),
        panel(
            "image tower",
            columns["tower"],
            lower,
            FILL["image"],
            "Image tower",
            "blocks → a feature, f",
        ),
        panel(
            "after the towers",
            columns["after"],
            upper + 80,
            FILL["both"],
            "After the towers",
            "logits = s · cosine of f and W",
        ),
        panel("the loss", columns["end"], upper, FILL["plain"], "The loss", "cross-entropy, and …"),
        panel(
            "the labels",
            columns["end"],
            lower,
            FILL["plain"],
            "The labels",
            "the largest logit, unless …",
        ),
    ]
    for y in (upper + 30, lower + 30):
        parts.append(path((columns["input"] + width, y), (columns["tower"] - 2, y)))
    between = columns["after"] - 10
    for y, to in ((upper + 30, upper + 110), (lower + 30, lower + 30)):
        parts.append(
            path(
                (columns["tower"] + width, y),
                (between, y),
                (between, to),
                (columns["after"] - 2, to),
            )
        )
    between = columns["end"] - 10
    for y, to in ((upper + 110, upper + 30), (lower + 30, lower + 30)):
        parts.append(
            path(
                (columns["after"] + width, y), (between, y), (between, to), (columns["end"] - 2, to)
            )
        )
    bottom = max(ends) + 28
    parts.append(text(24, bottom, "A method that acts in several places stands in each.", 13, PALE))
    listed = "; ".join(f"{place}: {', '.join(rows)}" for place, rows in PLACES.items())
    return svg(1036, bottom + 20, "Where in CLIP each method acts", listed, parts)


if __name__ == "__main__":
    main()
