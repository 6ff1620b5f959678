"""The summary of generate.py: a table of the classes, and a sheet of images."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from clip_min.files import replacing
from fewshot.pictures import Pictures, open_image
from gen.books import DONE, Attempt, Manifest

CELL, LABEL = 96, 16  # pixels: side of an image, height of a line of text
CLASSES, KEPT, REJECTED = 8, 6, 3  # on the sheet: classes, and images of each
FRAME = {"kept": "seagreen", "waived": "goldenrod", "rejected": "firebrick"}


def table(manifest: Manifest) -> str:
    """A line for each class: kept, rejected, waived; share accepted by the filter; seconds."""
    counts = [manifest.count(state) for state in ("kept", "rejected", "waived")]
    names = [name for name, quota in manifest.plan["quotas"].items() if quota]
    rows = {name: [count[name] for count in counts] for name in names}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)] or [0, 0, 0]
    # Attempts cost about the same, so time is divided by their number.
    each = sum(manifest.seconds.values()) / max(sum(rows["all"]), 1)
    width = max(len(name) for name in rows) + 2
    lines = [f"{'':<{width}}    kept  rejected  waived  accepted  s/image"]
    for name, (kept, rejected, waived) in rows.items():
        attempts, usable = kept + rejected + waived, kept + waived
        accepted = f"{100 * kept / attempts:.0f} %" if attempts else "n/a"
        seconds = f"{each * attempts / usable:.2f}" if usable else "n/a"
        lines.append(f"{name:<{width}}{kept:8d}{rejected:10d}{waived:8d}{accepted:>10}{seconds:>9}")
    return "\n".join(lines)


def contact_sheet(manifest: Manifest, pictures: Pictures, path: Path) -> None:
    """For the first classes: each synthetic image below the real image it was painted over.

    Green: kept; yellow: kept because the filter was waived; red: rejected. pictures: the real
    images.
    """
    numbers = {pictures.name(i): i for i in range(len(pictures))}
    shown = [name for name, quota in manifest.plan["quotas"].items() if quota][:CLASSES]
    sheet = Image.new("RGB", ((KEPT + REJECTED) * CELL, len(shown) * (2 * CELL + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(shown):
        top = row * (2 * CELL + LABEL)
        pen.text((2, top + 2), name.encode("latin-1", "replace").decode("latin-1"), fill="black")
        mine = [attempt for attempt in manifest.attempts if attempt.classname == name]
        columns = [a for a in mine if a.state in DONE][:KEPT]
        columns += [a for a in mine if a.state == "rejected"][:REJECTED]
        for column, attempt in enumerate(columns):
            at = (column * CELL, top + LABEL)
            if attempt.repainted in numbers:
                sheet.paste(_cell(pictures.open(numbers[attempt.repainted])), at)
            sheet.paste(_framed(manifest.folder, attempt), (at[0], at[1] + CELL))
    with replacing(path) as temporary:
        sheet.save(temporary)


def _cell(image: Image.Image, side: int = CELL - 4) -> Image.Image:
    return ImageOps.fit(image.convert("RGB"), (side, side))


def _framed(folder: Path, attempt: Attempt) -> Image.Image:
    return ImageOps.expand(_cell(open_image(folder / attempt.image)), 2, FRAME[attempt.state])
