"""Image features of any number of pictures, in files (shards) of a few thousand each.

    DIR/config.json            the data and the model of the features
    DIR/classes.txt, .json     the names of the classes, if the data have such a file
    DIR/00000.safetensors …    "features" (n, E) float32, not normalised; "sha256" (n, 32) uint8, of
                               each picture's file
    DIR/00000.json …           n names, labels and parts (train, val, test or ""), and the pictures
                               that could not be read
    DIR/index.json             written last: each shard with its number of features; totals

The position of a picture determines its shard. A shard is written whole or not at all, its features
last, so after a kill only missing shards are made. Pictures are a stream: only those that are being
processed are in memory.

A source is always read in the same order: a folder by sorted names, tar files (WebDataset's: the
files of a picture are adjacent, and differ only in their ending) as they are written, a CSV file by
rows.
"""

import hashlib
import itertools
import json
import os
import tarfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from clip_min import CLIP, UserError, normalize
from clip_min.files import (
    HALF_WRITTEN,
    read_json,
    read_safetensors,
    remove_half_written,
    write_json,
    write_safetensors,
    write_text,
)
from fewshot import ranks
from fewshot.batches import PRECISIONS
from fewshot.folder import parts_of, read_text
from fewshot.manifest import csv_files, is_manifest, read_cells
from fewshot.pictures import ENDINGS, ahead, cut, digest, open_image
from fewshot.run import claim

NAMES = ("classes.txt", "classes.json")  # of a folder's classes
LABELS = (".cls", ".json", ".txt")  # files beside a picture in a tar file; the first has its class
SHARD = {"names": list[str], "labels": list[str], "parts": list[str], "unreadable": list[list[str]]}
SHARD["digest"] = str  # of all names that there were


@dataclass(frozen=True)
class Item:
    """A picture of a source."""

    name: str  # "tulip/7.jpg", "000.tar/7.jpg"
    label: str  # "", if the source has none
    file: Path
    content: bytes | None = None  # the bytes, if the picture is not a file of its own
    part: str = ""  # train, val or test, if the source has parts


def items(source: Path, left_out: Counter[str] | None = None) -> Iterator[Item]:
    """The pictures of a folder, of tar files or of a CSV file, always in the same order.

    left_out: what it counts in here is not read, as ".heic files".
    """
    left_out = Counter() if left_out is None else left_out
    if source.suffix == ".tar":
        yield from _in_tar(source, left_out)
    elif source.suffix == ".csv":
        yield from _in_csv(source)
    elif not source.is_dir():
        raise UserError(f"--data {source}: expected a folder, a .tar file or a .csv file")
    elif tars := sorted(source.glob("*.tar")):
        if beside := next(_in_folder(source, source, {}, Counter()), None):
            raise UserError(
                f"--data {source}: has {tars[0].name} and pictures outside it ({beside.name}); "
                "move one kind elsewhere, or give the .tar file itself"
            )
        for tar in tars:
            yield from _in_tar(tar, left_out)
    elif is_manifest(source):
        for file in csv_files(source):
            yield from _in_csv(file, "" if file.stem == "data" else file.stem)
    else:
        parts, alone = parts_of(source)
        split = alone or "train" in parts and len(parts) > 1  # one may be a class: a train
        parts = {path.name: part for part, path in parts.items()} if split else {}
        yield from _in_folder(source, source, parts, left_out)


def _in_folder(
    root: Path, folder: Path, parts: dict[str, str], left_out: Counter[str], depth: int = 0
) -> Iterator[Item]:
    """Pictures below a folder. The label is the name of the folder in `root` or, with `parts`
    (folder -> train, val, test), in the part. Pictures outside have none.
    """
    with os.scandir(folder) as found:
        entries = sorted((e.name, e.is_dir()) for e in found if not e.name.startswith("."))
    for name, is_dir in entries:
        path = folder / name
        if is_dir and depth > bool(parts) and path.is_symlink():
            # As in fewshot/folder.py: links below a class could form a circle.
            left_out["linked folders"] += 1
        elif is_dir:
            yield from _in_folder(root, path, parts, left_out, depth + 1)
        elif path.suffix.lower() not in ENDINGS:
            if folder != root or name not in NAMES:
                left_out[f"{path.suffix or 'other'} files"] += 1
        else:
            *folders, _ = (inside := path.relative_to(root)).parts
            part = parts.get(folders.pop(0)) if parts and folders else ""
            label = folders[0] if folders and part is not None else ""
            yield Item(inside.as_posix(), label, path, part=part or "")


def _in_csv(file: Path, part: str = "") -> Iterator[Item]:
    """Rows with a path and optionally label and split; a path is absolute, or relative to the file.
    `part`: the split of all rows.
    """
    for where, cells in read_cells(file, ["path"], ["label", "split"]):
        if not (path := cells["path"]):
            raise UserError(f"{where}: its path is empty")
        yield Item(path, cells["label"], file.parent / path, part=part or cells["split"])


def _in_tar(file: Path, left_out: Counter[str]) -> Iterator[Item]:
    """Pictures of a tar file, read once from beginning to end."""
    name, picture = "", None
    said: dict[str, str] = {}  # ending -> the label in a file beside the picture
    try:
        with tarfile.open(file, "r|*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                stem, ending = os.path.splitext(member.name)
                if stem != os.path.splitext(name)[0]:  # the next picture begins
                    if picture is not None:
                        yield Item(f"{file.name}/{name}", _best(said), file / name, picture)
                    name, picture, said = member.name, None, {}
                if ending.lower() in ENDINGS and picture is not None:
                    left_out["second pictures of the same name"] += 1
                elif ending.lower() in ENDINGS:
                    name, picture = member.name, tar.extractfile(member).read()
                elif ending == ".json":
                    said[ending] = _label_in(tar.extractfile(member).read())
                elif ending in LABELS:
                    said[ending] = tar.extractfile(member).read().decode(errors="replace").strip()
                else:
                    left_out[f"{ending or 'other'} files"] += 1
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{file}: cannot be read as a tar file ({error})") from None
    if picture is not None:
        yield Item(f"{file.name}/{name}", _best(said), file / name, picture)


def _best(said: dict[str, str]) -> str:
    """The label of a picture, from the files beside it: .txt may also be a caption."""
    return next((said[ending] for ending in LABELS if said.get(ending)), "")


def _label_in(text: bytes) -> str:
    """The "label" in a JSON object, a number or a name; "", if there is none."""
    try:
        label = json.loads(text).get("label")
    except (ValueError, AttributeError, RecursionError):  # another kind of file
        return ""
    return str(label).strip() if isinstance(label, str | int) else ""


class Shards:
    """The folder of features, complete or not.

    Each shard has `size` pictures, except the last.
    """

    def __init__(self, folder: Path, config: dict, size: int):
        self.folder, self.size = folder, size
        config = {**config, "shard_size": size}
        kept = folder / "config.json"
        if ranks.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = f"--out {folder}: could not be created ({error}); choose another place"
                raise UserError(why) from None
            claim(folder, "making features")
            if kept.exists():
                found = read_json(kept, "")
                begun = any(folder.glob("[0-9]*.safetensors")) or found.keys() != config.keys()
                for key, value in config.items() if begun else ():
                    if found.get(key) != value:
                        raise UserError(
                            f"{folder}: was started with {key} {found.get(key)}, not {value}; "
                            "give the same value, or another --out"
                        )
            elif not all(_early(path) for path in folder.iterdir()):
                raise UserError(f"{folder}: holds other files; choose another --out")
            write_json(kept, config)
            remove_half_written(folder)
        ranks.wait()
        there = {path.stem for path in folder.glob("*.safetensors")}
        self.there = {int(stem) for stem in there if stem.isdecimal()}

    def path(self, shard: int, ending: str) -> Path:
        return self.folder / f"{shard:05d}{ending}"

    def missing(self, source: Iterable[Item]) -> Iterator[tuple[int, Item]]:
        """Pictures of missing shards that are this rank's, with the numbers of the shards.

        UserError, if existing shards are of other pictures than those in the source.
        """
        shard = -1
        each = itertools.groupby(enumerate(source), key=lambda pair: pair[0] // self.size)
        for shard, pairs in each:
            if shard in self.there:
                rows, told = [item for _, item in pairs], self.told(shard)
                bad = {name for name, *_ in told["unreadable"]}
                kept = [row for item in rows if (row := told_of(item))[0] not in bad]
                same = kept == [*zip(told["names"], told["labels"], told["parts"], strict=True)]
                if told["digest"] != digest_of(item.name for item in rows) or not same:
                    raise UserError(
                        f"{self.path(shard, '.json')}: was made from other pictures, labels or "
                        "parts than those in the source; put those back, or choose another --out"
                    )
            elif shard % ranks.size == ranks.rank:
                yield from ((shard, item) for _, item in pairs)
        if beyond := [number for number in self.there if number > shard]:
            raise UserError(
                f"{self.path(min(beyond), '.json')}: the source has no more pictures for it; put "
                "the missing ones back, or choose another --out"
            )

    def told(self, shard: int) -> dict:
        """The names, labels and parts of a shard."""
        return read_json(self.path(shard, ".json"), "make the features again", SHARD)

    def features(self, shard: int) -> Tensor:
        """The features of a shard (n, E), mapped into memory."""
        return read_safetensors(self.path(shard, ".safetensors"))[0]["features"]

    def write(
        self, shard: int, features: Tensor, made: list[str], rows: list[tuple[Item, str]]
    ) -> None:
        """Write features (n, E) and the sha256 `made` of each file, for the readable rows."""
        good = [told_of(item) for item, why in rows if not why]
        told = {
            "names": [name for name, _, _ in good],
            "labels": [label for _, label, _ in good],
            "parts": [part for _, _, part in good],
            "unreadable": [[told_of(item)[0], printable(why)] for item, why in rows if why],
            "digest": digest_of(item.name for item, _ in rows),
        }
        write_text(self.path(shard, ".json"), json.dumps(told, ensure_ascii=False) + "\n")
        sha256 = torch.tensor(list(bytes.fromhex("".join(made))), dtype=torch.uint8).view(-1, 32)
        tensors = {"features": features, "sha256": sha256}
        write_safetensors(self.path(shard, ".safetensors"), tensors)

    def keep_names(self, source: Path) -> None:
        """Copy the file of class names, if there is one beside the pictures."""
        for name in NAMES:
            file = (source if source.is_dir() else source.parent) / name
            if file.is_file():
                write_text(self.folder / name, read_text(file))
                for other in {*NAMES} - {name}:
                    (self.folder / other).unlink(missing_ok=True)

    def finish(self) -> dict:
        """Write index.json for all shards -> its content."""
        shards, unreadable = [], []
        for path in sorted(self.folder.glob("[0-9]*.safetensors")):
            told = self.told(int(path.stem))
            shards.append({"file": path.name, "features": len(told["names"])})
            unreadable += told["unreadable"]
        total = sum(shard["features"] for shard in shards)
        index = {"features": total, "unreadable": unreadable, "shards": shards}
        write_json(self.folder / "index.json", index)
        return index


def _early(path: Path) -> bool:
    """Whether a process killed before it wrote config.json can have left this file."""
    return HALF_WRITTEN.fullmatch(path.name) is not None


def told_of(item: Item) -> tuple[str, str, str]:
    """The name, label and part of a picture, as they are written."""
    return printable(item.name), printable(item.label), item.part


def printable(text: str) -> str:
    """Text in which bytes of file names that are not UTF-8 are escaped."""
    return text.encode(errors="backslashreplace").decode()


def digest_of(names: Iterable[str]) -> str:
    """sha256 of names, each terminated."""
    made = hashlib.sha256()
    for name in names:
        made.update(name.encode(errors="surrogateescape") + b"\0")
    return made.hexdigest()


def embed(clip: CLIP, source: Iterable[Item], shards: Shards, batch: int, precision: str) -> int:
    """Make the missing shards -> the number of encoded pictures.

    Meanwhile, threads read and decode the next pictures, and write the previous shard.
    """
    config, device, count = clip.config, clip.device, 0

    def decode(pair: tuple[int, Item]) -> tuple[int, Item, tuple[Tensor, str] | None, str]:
        shard, item = pair
        bare = replace(item, content=None)  # frees memory
        try:
            pixels = cut(open_image(item.file, item.content), config)
        except UserError as error:
            return shard, bare, None, str(error)
        content = item.content
        made = digest(item.file) if content is None else hashlib.sha256(content).hexdigest()
        return shard, bare, (pixels, made), ""

    @torch.no_grad()
    def encode(pixels: list[Tensor]) -> Tensor:  # (B, E); on a GPU, as soon as it is done
        images = normalize(torch.stack(pixels).to(device), config=config)  # (B, 3, n, n)
        with torch.autocast(device.type, **PRECISIONS[precision]):
            return clip.encode_image(images).float()

    decoded = ahead(decode, fed(shards.missing(source)))
    decoded = tqdm(decoded, unit=" pictures", disable=None)
    with ThreadPoolExecutor(1) as writer:
        written = None  # the shard being written
        for shard, group in itertools.groupby(decoded, key=lambda one: one[0]):
            rows, made, pixels = [], [], []
            features = [torch.empty(0, config.embed_dim, device=device)]
            for _, item, read, why in group:
                rows.append((item, why))
                if read is not None:
                    pixels.append(read[0])
                    made.append(read[1])
                if len(pixels) == batch:
                    features.append(encode(pixels))
                    pixels = []
            if pixels:
                features.append(encode(pixels))
            if written is not None:
                written.result()  # raises its error
            written = writer.submit(shards.write, shard, torch.cat(features).cpu(), made, rows)
            count += len(rows)
        if written is not None:
            written.result()
    return count


def fed(items: Iterable, most: int = 64) -> Iterator:
    """The same items; a thread reads up to `most` of them in advance."""
    source, end, pool = iter(items), object(), ThreadPoolExecutor(1)
    try:
        taken = deque(pool.submit(next, source, end) for _ in range(most))
        while (item := taken.popleft().result()) is not end:
            taken.append(pool.submit(next, source, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
