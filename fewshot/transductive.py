"""Transductive tasks: batches of test images of a few classes, labelled jointly.

The protocol of Martin et al., arXiv:2405.18437: a task is Q test images from k_eff of the K
classes. The method knows neither the classes nor their number. In the paper's zero-shot tasks k_eff
is drawn for each task, from 3 to 10. Accuracy is the mean over tasks, and not comparable with
accuracy of labelling images one by one. Alternatively, a single task has all test images, as in
TransCLIP (arXiv:2406.01837).

What we do differently: if the classes of a task have fewer than Q images, the task has fewer; the
published code draws again until a task has Q.
"""

from dataclasses import dataclass
from math import inf
from statistics import mean, stdev

import torch
from torch import Tensor

from fewshot.metrics import accuracy, harmonic_mean
from fewshot.task import Task


@dataclass(frozen=True)
class Queries:
    """The parameters for drawing tasks."""

    tasks: int  # 0: a single task with all images
    queries: int  # Q, images of a task, at most
    k_eff: int  # classes of a task, at most
    seed: int
    k_eff_max: int = 0  # if not 0: the number of classes is drawn from k_eff to this

    @classmethod
    def of(cls, method_class, settings, seed: int) -> "Queries | None":
        """The tasks in a transductive method's settings; None for other methods."""
        if not method_class.transductive:
            return None
        return cls(settings.tasks, settings.queries, settings.k_eff, seed, settings.k_eff_max)

    def draw(self, labels: Tensor) -> list[Tensor]:
        """labels (N,) of the test images -> indices of the images of each task, (Q,)."""
        if self.tasks == 0:
            return [torch.arange(len(labels))]
        generator = torch.Generator().manual_seed(self.seed)
        present = labels.unique()
        tasks = []
        for _ in range(self.tasks):
            count = self.k_eff
            if self.k_eff_max:
                count = int(torch.randint(count, self.k_eff_max + 1, (), generator=generator))
            classes = present[torch.randperm(len(present), generator=generator)[:count]]
            pool = torch.isin(labels, classes).nonzero().flatten()
            order = torch.randperm(len(pool), generator=generator)[: self.queries]
            tasks.append(pool[order])
        return tasks

    def describe(self, scores: dict) -> str:
        """A line above the table of `evaluate_tasks`, which describes the tasks."""
        if self.tasks == 0:
            return "all test images of each part labelled jointly:"
        parts = scores["parts"].items()
        widths = ", ".join(f"{part} ± {score['interval95']:.2f}" for part, score in parts)
        counts = sorted({n for _, score in parts for n in score["classes"]})  # actual numbers
        classes = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
        return (
            f"mean of {self.tasks} tasks of {self.queries} images or fewer, {classes} classes "
            f"(95 % intervals: {widths}):"
        )


def evaluate_tasks(method, task: Task, queries: Queries) -> dict:
    """Like `fewshot.predictions.score`, but over tasks and without all names; adds half widths of
    95 % intervals.
    """
    scores = {**dict.fromkeys(("base", "novel", "hm", "all", "joint")), "parts": {}}
    classes = (queries.k_eff, queries.k_eff_max or queries.k_eff)  # of a task
    classes = classes if queries.tasks else (inf, inf)
    for part, test in task.tests.items():
        known = method if part != "novel" else method.for_classes(test.classnames)
        labels = test.batches.labels
        with known.inference(), test.batches.autocast():
            accuracies = [
                accuracy(known.classify(test.batches.inputs(known, chosen)), labels[chosen])
                for chosen in queries.draw(labels.cpu())
            ]
        scores[part] = mean(accuracies)
        spread = stdev(accuracies) if len(accuracies) > 1 else 0.0
        scores["parts"][part] = {
            "tasks": len(accuracies),
            "classes": [min(n, len(labels.unique())) for n in classes],
            "interval95": 1.96 * spread / len(accuracies) ** 0.5,
        }
    if scores["novel"] is not None:
        scores["hm"] = harmonic_mean(scores["base"], scores["novel"])
    return scores
