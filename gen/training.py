"""Synthetic images as training images."""

from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch

from clip_min import UserError
from fewshot.batches import Batches
from fewshot.experiment import Experiment
from fewshot.pictures import Pictures
from fewshot.task import Task
from gen.books import Manifest, fingerprint

# The flags that decide which task it is.
TASK = ("dataset", "data_root", "model", "image_size", "shots", "shots_file", "seed", "classes")
TASK += ("base_classes", "split", "split_file", "template")


def finished(folder: Path, experiment: Experiment, task: Task, settings, filter) -> Manifest:
    """The records of a complete folder of images, made from this task's training images.

    settings: DISEF's; its plan, filter and per_class must be the folder's, since a run records
    them. filter: "zero_shot", or the folder of a run that filters, for a message.
    """
    given = {name: getattr(experiment, name) for name in TASK}
    given = {name: value for name, value in given.items() if value != getattr(Experiment, name)}
    given |= {"per_class": settings.per_class, "plan": settings.plan, "filter": filter}
    given["synthetic"] = folder
    flags = [f"--{name.replace('_', '-')} {quote(str(v))}" for name, v in given.items()]
    command = f"python generate.py {' '.join(flags)}"
    if not (folder / "settings.json").exists():
        raise UserError(f"{folder}: has no synthetic images yet; make them first: {command}")
    manifest = Manifest.open(folder)
    wanted = {"plan": settings.plan, "filter": settings.filter}
    manifest.check_settings({**made_from(experiment, task), **wanted})
    quotas = manifest.plan["quotas"].values()
    each = sum(quotas) // len(quotas) if settings.plan == "deficit" else max(quotas)
    if each not in (0, settings.per_class):  # 0: no class is weak
        raise UserError(
            f"{folder}: has {each} images of each class, not {settings.per_class}; add --per-class "
            f"{each}, or make the others: {command}"
        )
    if missing := manifest.missing():
        raise UserError(
            f"{folder}: {missing} images are still missing; continue with: {command} and the flags "
            "that started it"
        )
    return manifest


def made_from(experiment: Experiment, task: Task) -> dict:
    """What ties images to a task. Images of another task may show this task's test images."""
    return {
        **{key: getattr(experiment, key) for key in ("dataset", "classes", "shots", "seed")},
        "classnames": task.classnames,
        "training_pictures": fingerprint(task.train.pictures),
    }


def join(train: Batches, manifest: Manifest) -> Batches:
    """The real images and the synthetic ones, to train on."""
    chosen = manifest.chosen()
    if not chosen:
        return train
    labels = torch.tensor([manifest.classnames.index(a.classname) for a in chosen])
    pictures = Pictures([manifest.folder / attempt.image for attempt in chosen], labels)
    reader = replace(train.reader, skip_bad=False)
    return train.join(Batches(*reader.read(pictures, []), reader))
