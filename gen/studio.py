"""The stages of making a folder of images: caption, paint, filter.

(seed, class, a) determine the sources of attempt number a of a class, and attempts are judged in
order. The kept images therefore do not depend on the batch size, on when a process was killed, or
on whether the stages ran together or one by one.

Four classes at a time share batches: a batch stays full while one of the four lacks images. With
several processes (fewshot/ranks.py), each takes every N-th group of four. The content of a batch,
and with it the last bit of an image, therefore does not depend on the number of processes.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from PIL import Image
from tqdm import tqdm

from clip_min import UserError
from fewshot import ranks
from fewshot.pictures import Pictures, open_image
from gen.batching import Batcher
from gen.books import DONE, Attempt, Caption, Manifest
from gen.filter import Filter
from gen.plan import draw, seed_of
from gen.settings import Generation

TOGETHER = 4  # classes that share batches


class Studio:
    """pictures: the real images; their labels are indices of manifest.classnames."""

    def __init__(self, manifest: Manifest, pictures: Pictures, options: Generation, seed: int):
        self.manifest, self.pictures, self.options, self.seed = manifest, pictures, options, seed
        labels = pictures.labels.cpu()
        self.members = {
            name: (labels == k).nonzero().flatten().tolist()
            for k, name in enumerate(manifest.classnames)
        }
        quotas = manifest.plan["quotas"]
        names = sorted(quotas, key=lambda name: not quotas[name])  # first those with work
        fours = [names[k : k + TOGETHER] for k in range(0, len(names), TOGETHER)]
        self.fours = ranks.mine(fours)  # this process's
        self.judging = Batcher(options.batch_size)

    # ------------------------------------------------------------------------------- captions

    def captions_missing(self) -> list[tuple[str, int, int]]:
        """(class, index of the image, number) of each caption that is still to be made."""
        have = {(c.classname, c.member, c.number) for c in self.manifest.captions}
        return [
            (name, member, number)
            for name, quota in self.manifest.plan["quotas"].items()
            for number in range(self.options.captions if quota else 0)
            for member in range(len(self.members[name]))
            if (name, member, number) not in have
        ]

    def caption(self, captioner: Callable) -> None:
        """Make all missing captions."""
        check_revision(captioner, {c.revision for c in self.manifest.captions})
        missing, batcher = self.captions_missing(), Batcher(self.options.batch_size)
        fours = [[one for one in missing if one[0] in names] for names in self.fours]
        total = sum(map(len, fours))
        bar = tqdm(total=total, unit="caption", desc="captions", disable=None)
        while fours := [missing for missing in fours if missing]:
            started, batch = time.perf_counter(), fours[0][: batcher.size]
            pictures = [self.members[name][member] for name, member, _ in batch]
            names, seeds = [name for name, _, _ in batch], [seed_of(self.seed, *b) for b in batch]
            texts = batcher(captioner, [self.pictures.open(i) for i in pictures], names, seeds)
            by = captioner.name, captioner.revision
            self.manifest.add_captions(
                [
                    Caption(name, member, self.pictures.name(i), number, seed, text, *by)
                    for (name, member, number), i, seed, text in zip(
                        batch, pictures, seeds, texts, strict=True
                    )
                ]
            )
            self.manifest.spent("caption", time.perf_counter() - started)
            del fours[0][: len(batch)]
            bar.update(len(batch))
        bar.close()
        self.manifest.share()

    # -------------------------------------------------------------------------------- images

    def attempts_missing(self, painter, names: list[str]) -> Iterator[Attempt]:
        """The next attempts at these classes: as many as the images that each still lacks."""
        captions = {(c.classname, c.member, c.number): c for c in self.manifest.captions}
        made = Counter(attempt.classname for attempt in self.manifest.attempts)
        have = self.manifest.count(*DONE, "undecided")
        for name in names:
            quota = self.manifest.plan["quotas"][name]
            for attempt in range(made[name], made[name] + quota - have[name]):
                members, seed = self.members[name], seed_of(self.seed, name, attempt)
                i, number, j = draw(seed, len(members), self.options.captions)
                caption = captions[name, i, number]
                yield Attempt(
                    classname=name,
                    attempt=attempt,
                    image="",
                    state="undecided",
                    predicted=None,
                    margin=None,
                    captioned=caption.picture,
                    repainted=self.pictures.name(members[j]),
                    caption=caption.text,
                    prompt=f"{self.options.prompt.replace('{}', name)} {caption.text}".strip(),
                    caption_seed=caption.seed,
                    seed=seed,
                    captioner=caption.captioner,
                    captioner_revision=caption.revision,
                    painter=painter.name,
                    painter_revision=painter.revision,
                )

    def paint(self, painter: Callable, judge: Filter | None) -> None:
        """Paint until all classes have their images; without a judge, images stay undecided."""
        check_revision(painter, {a.painter_revision for a in self.manifest.attempts})
        picture = {self.pictures.name(i): i for members in self.members.values() for i in members}
        batcher, bar = Batcher(self.options.batch_size), self._bar(judge)
        for names in self.fours:
            while batch := list(islice(self.attempts_missing(painter, names), batcher.size)):
                started = time.perf_counter()
                sources = [self.pictures.open(picture[attempt.repainted]) for attempt in batch]
                columns = [attempt.prompt for attempt in batch], [attempt.seed for attempt in batch]
                images = batcher(painter, sources, *columns)
                if judge:
                    self._decide(batch, images, judge)
                self.manifest.add(batch, images)
                self.manifest.spent("diffuse", time.perf_counter() - started)
                self._show(bar, batch)
        bar.close()
        self.manifest.share()

    def filter(self, judge: Filter) -> None:
        """Judge the undecided images."""
        undecided = [a for a in self.manifest.attempts if a.state == "undecided"]
        fours = [[a for a in undecided if a.classname in names] for names in self.fours]
        size = self.options.batch_size
        for batch in (rows[i : i + size] for rows in fours for i in range(0, len(rows), size)):
            started = time.perf_counter()
            images = [open_image(self.manifest.folder / attempt.image) for attempt in batch]
            self._decide(batch, images, judge)
            self.manifest.file(batch, images)
            self.manifest.spent("filter", time.perf_counter() - started)
        self.manifest.share()

    def _decide(self, batch: list[Attempt], images: list[Image.Image], judge: Filter) -> None:
        names = self.manifest.classnames
        labels = [names.index(attempt.classname) for attempt in batch]
        rejected = self.manifest.count("rejected")
        judged = self.judging(judge, images, labels)
        for attempt, (predicted, margin) in zip(batch, judged, strict=True):
            attempt.predicted, attempt.margin = names[predicted], round(margin, 4)
            attempt.filter, attempt.filter_revision = judge.name, judge.revision
            attempt.state = "kept"
            if attempt.predicted != attempt.classname:
                waive = rejected[attempt.classname] >= self.options.reject_limit
                attempt.state = "waived" if waive else "rejected"
                rejected[attempt.classname] += not waive
                if not waive and rejected[attempt.classname] == self.options.reject_limit:
                    tqdm.write(
                        f"{attempt.classname}: {self.options.reject_limit} images were rejected; "
                        "the filter is waived for this class from here on"
                    )

    # ------------------------------------------------------------------------------- progress

    def _bar(self, judge: Filter | None) -> tqdm:
        done = self.manifest.count(*DONE, *(() if judge else ("undecided",)))
        own = [name for names in self.fours for name in names]
        total = sum(self.manifest.plan["quotas"][name] for name in own)
        done = sum(done[name] for name in own)
        return tqdm(total=total, initial=done, unit="image", disable=None)

    def _show(self, bar: tqdm, batch: list[Attempt]) -> None:
        """Show the current class, its images, and the seconds left at its own rate."""
        bar.update(sum(attempt.state != "rejected" for attempt in batch))
        name = batch[-1].classname
        mine = [attempt for attempt in self.manifest.attempts if attempt.classname == name]
        good = sum(attempt.state != "rejected" for attempt in mine)
        quota = self.manifest.plan["quotas"][name]
        each = self.manifest.seconds["diffuse"] / len(self.manifest.attempts)
        left = (quota - good) * each * len(mine) / max(good, 1)
        bar.set_description(f"{name}: {good}/{quota}, {left:.0f} s left")


def check_revision(model, made: set[str]) -> None:
    """UserError, if the folder has work of another version of this model."""
    if others := made - {model.revision}:
        name, other = model.name.partition("@")[0], others.pop()
        raise UserError(
            f"{model.name}: the folder has work of its revision {other}, but this is "
            f"{model.revision}; give {name}@{other} for a model of the hub, or another folder with "
            "--synthetic"
        )
