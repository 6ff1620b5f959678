"""Thumbnails for a page: test pictures by their number in data.json."""

from collections import defaultdict
from pathlib import Path

from clip_min import UserError
from fewshot.pictures import Pictures, open_image
from fewshot.record import Record, rows
from fewshot.task import Task
from reports.markup import Markup, picture, tag


class Album:
    """get(i) -> the thumbnail of test picture i; a box with a note if its file is missing, and
    nothing if all files are.
    """

    def __init__(self, record: Record | None, task: Task | None = None):
        self.rows = record["test"] if record else []
        there: dict[tuple[str, str], list[tuple[Pictures, int]]] = defaultdict(list)
        for test in task.tests.values() if task else ():
            found = test.batches.pictures
            for i, (_, name, made) in enumerate(rows(found, test.classnames)):
                there[name, made].append((found, i))
        # By class and content, as in eval.py; of two equal files either is used.
        self.at = [there.get((name, made), [None])[0] for _, name, made in self.rows]

    def file(self, i: int) -> str | None:
        """Its file, from data.json."""
        return self.rows[i][0] if i < len(self.rows) else None

    def get(self, i: int, alt: str) -> Markup | None:
        if not any(self.at):
            return None
        at = self.at[i] if i < len(self.at) else None
        if at is not None:
            try:
                return picture(at[0].open(at[1]), alt)
            except UserError:  # it was there when the run was tested
                pass
        return no_picture(alt)


def no_picture(alt: str) -> Markup:
    return tag("div", "picture not found", class_="none", role="img", aria_label=alt)


def thumbnail(path: Path, alt: str, side: int = 96) -> Markup:
    """Of a file."""
    try:
        return picture(open_image(path), alt, side)
    except UserError:
        return no_picture(alt)
