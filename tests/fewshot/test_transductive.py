"""Transductive tasks: how they are drawn, and their accuracy and its interval by hand."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fewshot.task import Task
from fewshot.task import Test as Part  # pytest would take the name for a test
from fewshot.transductive import Queries, evaluate_tasks

LABELS = torch.tensor([k for k in range(8) for _ in range(3 + 2 * k)])  # 3 to 17 images a class


@pytest.mark.parametrize(("queries", "k_eff"), [(10, 3), (75, 5), (1, 1), (1000, 20)])
def test_a_task_is_at_most_q_different_images_of_k_eff_classes(queries, k_eff):
    tasks = Queries(60, queries, k_eff, seed=0).draw(LABELS)
    assert len(tasks) == 60
    sizes = []
    for chosen in tasks:
        assert len(set(chosen.tolist())) == len(chosen)
        classes = LABELS[chosen].unique()
        assert len(classes) <= k_eff
        sizes.append(len(chosen))
        if len(chosen) < queries:  # then it is all that these classes have
            assert len(classes) == min(k_eff, 8)
            assert len(chosen) == torch.isin(LABELS, classes).sum()
    assert max(sizes) <= queries


def test_all_images_and_all_sets_of_classes_get_their_turn():
    tasks = Queries(2000, 5, 2, seed=0).draw(LABELS)
    seen = torch.cat(tasks).bincount(minlength=len(LABELS))
    assert (seen > 0).all()
    pairs = [frozenset(LABELS[chosen].tolist()) for chosen in tasks]
    assert len({pair for pair in pairs if len(pair) == 2}) == 8 * 7 / 2
    firsts = LABELS[torch.stack([chosen[0] for chosen in tasks])].bincount(minlength=8)
    assert firsts.min() > 0  # images of a task come in any order


def test_classes_are_drawn_evenly_however_many_images_they_have():
    tasks = Queries(4000, 1000, 1, seed=3).draw(LABELS)
    drawn = torch.stack([LABELS[chosen[0]] for chosen in tasks]).bincount(minlength=8)
    assert ((drawn - 500).abs() < 100).all()  # five standard deviations


def test_a_range_of_k_eff_is_drawn_from_evenly_for_each_task():
    queries = Queries(3000, 1000, 2, seed=1, k_eff_max=5)
    counts = [len(LABELS[chosen].unique()) for chosen in queries.draw(LABELS)]
    drawn = torch.tensor(counts).bincount(minlength=6)
    assert drawn[:2].sum() == 0
    assert ((drawn[2:] - 750).abs() < 120).all()  # five standard deviations
    scores = evaluate_tasks(Guesses(), task(["base"]), Queries(2, 10, 2, seed=1, k_eff_max=5))
    assert "2 to 5 classes" in queries.describe(scores)


def test_classes_without_images_are_not_drawn():
    labels = torch.tensor([2, 2, 5, 5, 9])
    for chosen in Queries(30, 10, 2, seed=0).draw(labels):
        assert len(labels[chosen].unique()) == 2


def test_one_seed_draws_one_list_of_tasks_whatever_else_is_drawn():
    draws = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed + len(draws))
        draws.append(Queries(9, 10, 3, seed).draw(LABELS))
    same = [all(torch.equal(*pair) for pair in zip(draws[0], d, strict=True)) for d in draws[1:]]
    assert same == [True, False]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Queries(9, 10, 3, 1).draw(LABELS)
    assert torch.equal(torch.get_rng_state(), before)


class Guesses:
    """A stand-in for a method: input i has its own logits, but the first of a batch loses."""

    def __init__(self, shift: int = 0):
        self.shift, self.batches = shift, []

    @contextlib.contextmanager
    def inference(self):
        yield

    def for_classes(self, names):
        other = Guesses(shift=1)
        other.batches = self.batches
        return other

    def classify(self, numbers: torch.Tensor) -> torch.Tensor:
        self.batches.append(numbers)
        rng = torch.Generator().manual_seed(self.shift)
        logits = torch.randn(len(LABELS), 8, generator=rng)
        logits[torch.arange(len(LABELS)), LABELS] += 2
        logits = logits[numbers].clone()
        logits[0] = -logits[0]
        return logits


def task(parts) -> Task:
    batches = SimpleNamespace(
        labels=LABELS, inputs=lambda method, chosen: chosen, autocast=contextlib.nullcontext
    )
    tests = {part: Part([str(k) for k in range(8)], batches) for part in parts}
    return Task([], "a {}", None, None, tests, [])


def by_hand(method, queries: Queries) -> list[float]:
    found = []
    for chosen in queries.draw(LABELS):
        rows = method.classify(chosen).tolist()
        right = [
            max(range(8), key=row.__getitem__) == LABELS[i]
            for row, i in zip(rows, chosen, strict=True)
        ]
        found.append(100 * sum(map(bool, right)) / len(right))
    return found


def test_accuracy_is_the_mean_over_tasks_and_the_interval_1_96_standard_errors():
    queries, method = Queries(25, 10, 3, seed=2), Guesses()
    scores = evaluate_tasks(method, task(["base", "novel"]), queries)
    drawn = queries.draw(LABELS) * 2  # the same tasks for both parts, whole, in one call each
    assert all(torch.equal(*pair) for pair in zip(method.batches, drawn, strict=True))
    each = {"base": by_hand(Guesses(), queries), "novel": by_hand(Guesses(1), queries)}
    for part, values in each.items():
        assert scores[part] == pytest.approx(np.mean(values))
        interval = 1.96 * np.std(values, ddof=1) / np.sqrt(25)
        assert scores["parts"][part]["tasks"] == 25
        assert scores["parts"][part]["interval95"] == pytest.approx(interval)
    base, novel = scores["base"], scores["novel"]
    assert scores["hm"] == pytest.approx(2 * base * novel / (base + novel))
    assert scores["all"] is None
    assert f"base ± {scores['parts']['base']['interval95']:.2f}" in queries.describe(scores)


@pytest.mark.parametrize(("k_eff", "said"), [(3, "3 classes"), (9, "8 classes")])
def test_classes_are_counted_that_there_are(k_eff, said):
    queries = Queries(2, 10, k_eff, seed=2)
    scores = evaluate_tasks(Guesses(), task(["base"]), queries)
    assert f"of 10 images or fewer, {said} (" in queries.describe(scores)


def test_all_classes_in_one_part_and_a_single_task():
    queries = Queries(1, 10, 3, seed=2)
    scores = evaluate_tasks(Guesses(), task(["all"]), queries)
    assert scores["all"] == pytest.approx(by_hand(Guesses(), queries)[0])
    assert scores["parts"]["all"]["interval95"] == 0
    assert scores["base"] is scores["novel"] is scores["hm"] is None


def test_two_methods_are_asked_about_the_same_tasks():
    queries, first, second = Queries(7, 10, 3, seed=2), Guesses(), Guesses(1)
    for method in (first, second):
        evaluate_tasks(method, task(["base"]), queries)
    assert all(torch.equal(*pair) for pair in zip(first.batches, second.batches, strict=True))


def test_queries_follow_from_the_settings_of_transductive_methods_alone():
    settings = SimpleNamespace(tasks=3, queries=20, k_eff=4, k_eff_max=6)
    kinds = [SimpleNamespace(transductive=answer) for answer in (True, False)]
    assert Queries.of(kinds[0], settings, seed=9) == Queries(3, 20, 4, 9, 6)
    assert Queries.of(kinds[1], settings, seed=9) is None
