"""For `mkdocs build`: make links from docs/ to the rest of the repository work on the site.

Pages link to files outside docs/, as `../methods/lora.py`, which works in the repository. On the
site, a text file becomes a page below source/, and an image is copied. A link to a missing file
ends the build.
"""

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")  # a path upwards, without its anchor
PICTURES = (".png", ".svg", ".jpg")


def outside(page: str, link: str) -> Path | None:
    """The file that a link on the page docs/PAGE leads to, if it is outside docs/."""
    target = Path(os.path.normpath((DOCS / page).parent / link))
    return None if target.is_relative_to(DOCS) else target


def place(target: Path) -> str:
    """Its place on the site."""
    path = target.relative_to(ROOT).as_posix()
    return f"source/{path}" if target.suffix in PICTURES else f"source/{path}.md"


def on_files(files: Files, config) -> Files:
    linked = set()
    for page in sorted(DOCS.rglob("*.md")):
        name = page.relative_to(DOCS).as_posix()
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            if not (target := outside(name, link)):
                continue
            if not (target.is_relative_to(ROOT) and target.is_file()):
                raise PluginError(f"docs/{name}: {link} is not a file")
            linked.add(target)
    for target in sorted(linked):
        if target.suffix in PICTURES:
            files.append(File.generated(config, place(target), abs_src_path=str(target)))
        else:
            kind = "python" if target.suffix == ".py" else "text"
            body = target.read_text(encoding="utf-8")
            title = target.relative_to(ROOT).as_posix()
            text = f"# {title}\n\n~~~~~~{kind}\n{body}~~~~~~\n"
            files.append(File.generated(config, place(target), content=text))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    name = page.file.src_uri
    if name.startswith("source/"):
        return markdown

    def moved(match: re.Match) -> str:
        if not (target := outside(name, match[1])):
            return match[0]
        return "](" + os.path.relpath(place(target), Path(name).parent)

    return LINK.sub(moved, markdown)
