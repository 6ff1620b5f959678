"""Transductive tasks: batches of test images of a few classes, labelled jointly.

The protocol of Martin et al., arXiv:2405.18437: a task is Q test images of k_eff of the K classes;
which classes, and that they are few, the method is not told. In their zero-shot tasks k_eff is
drawn for each task, from 3 to 10. Accuracy is the mean over tasks. A number found this way is not
comparable with one found image by image. Or there is a single task, of all test images, as in
TransCLIP's (arXiv:2406.01837).

What we do differently: where the classes of a task have fewer than Q images it has fewer; theirs is
drawn again until it has Q.
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
    """How tasks are drawn."""

    tasks: int  # 0: one, of all images
    queries: int  # Q, images of a task; fewer where its classes have fewer
    k_eff: int  # classes of a task; all of them, where there are fewer
    seed: int
    k_eff_max: int = 0  # if not 0: each task's classes are k_eff to so many, drawn

    @classmethod
    def of(cls, method_class, settings, seed: int) -> "Queries | None":
        """Those that a transductive method's settings ask for; None for every other method."""
        if not method_class.transductive:
            return None
        return cls(settings.tasks, settings.queries, settings.k_eff, seed, settings.k_eff_max)

    def draw(self, labels: Tensor) -> list[Tensor]:
        """labels (N,) of the test images -> for each task the numbers of its images, (Q,)."""
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
        """What `evaluate_tasks` scored, in a line to stand above its table."""
        if self.tasks == 0:
            return "all test images of each part labelled jointly:"
        parts = scores["parts"].items()
        widths = ", ".join(f"{part} ± {score['interval95']:.2f}" for part, score in parts)
        counts = sorted({n for _, score in parts for n in score["classes"]})  # that there are
        classes = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
        return (
            f"mean of {self.tasks} tasks of {self.queries} images or fewer, {classes} classes "
            f"(95 % intervals: {widths}):"
        )


def evaluate_tasks(method, task: Task, queries: Queries) -> dict:
    """As `fewshot.predictions.score`, but over tasks, and none among all names; adds half widths of
    95 % intervals.
    """
    scores = {**dict.fromkeys(("base", "novel", "hm", "all", "joint")), "parts": {}}
    classes = (queries.k_eff, queries.k_eff_max or queries.k_eff)  # of a task
    classes = classes if queries.tasks else (inf, inf)
    for part, test in task.tests.items():
        known = method if part != "novel" else method.for_classes(test.classnames)
        labels = test.batches.labels
        with known.inference():
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
