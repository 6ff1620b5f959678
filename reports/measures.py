"""Measures of a classifier, computed from its answers to the test pictures.

N pictures of K classes: labels (N,), the likeliest classes (N, 5) and their probabilities (N, 5).
"""

import math

import torch
from torch import Tensor

from fewshot.metrics import per_class

BINS = 15  # of confidence, as in the paper


def calibration(confidence: Tensor, right: Tensor, bins: int = BINS) -> dict:
    """The expected calibration error in percent: does confidence equal accuracy?

    Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599. Pictures are divided
    into bins of equal width by confidence, the probability of the likeliest class, and

        ECE = Σ_b n_b / N · |accuracy_b - mean confidence_b|

    confidence (N,) in (0, 1], right (N,) bool. A bin excludes its lower bound.
    """
    confidence, right = confidence.double(), right.double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # (N,)
    count = place.bincount(minlength=bins)  # (bins,)
    accuracy = place.bincount(right, minlength=bins) / count.clamp(min=1)
    believed = place.bincount(confidence, minlength=bins) / count.clamp(min=1)
    gap = (accuracy - believed).abs()
    rows = [
        {
            "from": 100 * b / bins,
            "to": 100 * (b + 1) / bins,
            "pictures": int(count[b]),
            "confidence": 100 * believed[b].item() if count[b] else None,
            "accuracy": 100 * accuracy[b].item() if count[b] else None,
        }
        for b in range(bins)
    ]
    return {
        "ece": 100 * (count * gap).sum().item() / len(confidence),
        "mean_confidence": 100 * confidence.mean().item(),
        "bins": rows,
    }


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy in percent, given the number of pictures. It is Wilson's,
    which stays between 0 and 100 (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927).
    """
    z, p = 1.959964, right / count
    middle = p + z * z / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = ((middle + side * half) / (1 + z * z / count) for side in (-1, 1))
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def confusion(predicted: Tensor, labels: Tensor, count: int) -> Tensor:
    """Counts of pictures of class i that were predicted as class j, (K, K); both inputs (N,)."""
    return (labels * count + predicted).bincount(minlength=count * count).view(count, count)


def scores_by_class(predicted: Tensor, labels: Tensor, count: int) -> list[dict]:
    """Accuracy and F1 of each class in percent, as in results.json."""
    accuracy, f1 = per_class(predicted, labels, count)
    return [
        dict.fromkeys(("accuracy", "f1"))  # without test pictures
        if a.isnan()
        else {"accuracy": a.item(), "f1": f.item()}
        for a, f in zip(accuracy, f1, strict=True)
    ]


def cluster_order(matrix: Tensor, most: int = 120) -> list[int]:
    """An order of the classes that puts confused classes next to each other; of many classes, only
    of the `most` with the most confusions.

    Average linkage on 1 - the share of mutual confusions, with optimal leaf ordering (Bar-Joseph et
    al., Bioinformatics 17, 2001), whose time grows with the square of the classes or more. matrix
    (K, K), counts.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    wrong = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
    shown = torch.arange(len(matrix))
    if len(matrix) > most:
        shown = wrong.argsort(descending=True, stable=True)[:most]
    if len(shown) < 3:
        return shown.tolist()
    rate = matrix[shown][:, shown].double() / matrix.sum(1)[shown, None].clamp(min=1)
    near = (rate + rate.T) / 2
    far = (1 - near).fill_diagonal_(0)
    tree = linkage(squareform(far.numpy(), checks=False), "average", optimal_ordering=True)
    return shown[leaves_list(tree).tolist()].tolist()


def most_confused(matrix: Tensor, most: int = 12) -> list[dict]:
    """The most confused pairs of classes, counted in both directions."""
    both = (matrix + matrix.T).triu(1)
    found = []
    for i, j in both.nonzero().tolist():
        ways = {"a_as_b": int(matrix[i, j]), "b_as_a": int(matrix[j, i])}
        found.append({"a": i, "b": j, "times": int(both[i, j]), **ways})
    return sorted(found, key=lambda pair: -pair["times"])[:most]


def most_confident_mistakes(
    classes: Tensor, probabilities: Tensor, labels: Tensor, most: int = 24
) -> list[int]:
    """Indices of the misclassified pictures with the highest confidence."""
    wrong = (classes[:, 0] != labels).nonzero().flatten()
    order = probabilities[wrong, 0].argsort(descending=True, stable=True)
    return wrong[order[:most]].tolist()


def gained_and_lost(right: Tensor, before: Tensor) -> dict:
    """Pictures that adaptation gained and lost; both inputs (N,) bool."""
    return {"gained": int((right & ~before).sum()), "lost": int((before & ~right).sum())}
