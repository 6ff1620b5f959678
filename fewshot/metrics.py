"""Metrics, all in percent."""

import torch
from torch import Tensor
from tqdm import tqdm

from fewshot import ranks
from fewshot.batches import Batches


def predict(method, batches: Batches, batch_size: int = 64) -> Tensor:
    """Logits (N, K) of a method for all pictures, float32, on the CPU."""
    parts = torch.arange(len(batches)).split(batch_size)
    count = len(ranks.mine(parts))
    with method.inference(), batches.autocast():
        encoded = batches.each(method, parts)  # read and encoded on demand
        encoded = tqdm(encoded, "testing", count, leave=False, disable=count <= 8 or None)
        return ranks.collect(parts, (method.classify(x).float() for x in encoded)).cpu()


def accuracy_on(method, batches: Batches) -> float:
    """Accuracy of a method in percent."""
    return accuracy(predict(method, batches), batches.labels.cpu())


def likeliest(logits: Tensor, top: int = 5) -> Tensor:
    """Indices of the `top` classes with the largest logits (N, K), or of all -> (N, top)."""
    return logits.topk(min(top, logits.shape[1]), dim=1).indices


def accuracy(logits: Tensor, labels: Tensor, top: int = 1) -> float:
    """Percent of rows whose label is among the `top` largest logits."""
    return share(likeliest(logits, top), labels)


def share(guesses: Tensor, labels: Tensor) -> float:
    """Percent of rows of guesses (N, …) that contain their label."""
    return 100 * (guesses == labels[:, None]).any(dim=1).double().mean().item()


def per_class(predicted: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Accuracy (recall) and F1 of each of `count` classes, (K,) each, float64; predicted (N,).

    F1 is 2·tp / (2·tp + fp + fn): 0 for a class that is never right. Accuracy is NaN for a class
    without pictures. float64, since in float32 an F1 of 7 / 10 would be just below the plans' 0.7.
    """
    right = labels[predicted == labels].bincount(minlength=count).double()  # tp
    real = labels.bincount(minlength=count)  # tp + fn
    named = predicted.bincount(minlength=count)  # tp + fp
    return 100 * right / real, 100 * 2 * right / (real + named).clamp(min=1)


def harmonic_mean(base: float, novel: float) -> float:
    """HM = 2·b·n / (b + n), 0 if both are."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0
