"""Count the lines of code in the README's tree of files, and update the numbers there.

    python tools/tree.py

A line of the tree has a name (or several in the same folder), a count, and a description. A
folder's count includes all its Python files.
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^( *)(\S+?(?: \S+\.py)*)( +)([\d,]+)(  +\S.*)$")


def lines_of(path: Path) -> int:
    """Lines of a file, or of all Python files below a folder."""
    files = path.rglob("*.py") if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def counted(tree: str) -> str:
    """The tree with current counts."""
    found, folder = [], ROOT
    for line in tree.splitlines():
        if not (match := LINE.match(line)):
            found.append(line)
            continue
        indent, names, space, before, rest = match.groups()
        if not indent:
            folder = ROOT / names if names.endswith("/") else ROOT
        base = folder if indent else ROOT
        count = f"{sum(lines_of(base / name) for name in names.split()):,}"
        width = len(space) + len(before)
        found.append(f"{indent}{names}{count:>{width}}{rest}")
    return "\n".join(found) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    start = text.index("```\n", text.index("## The files")) + 4
    end = text.index("```", start)
    readme.write_text(text[:start] + counted(text[start:end]) + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
