"""Where images and class names lie in CLIP's shared space, before and after adaptation.

Normalised image and text features lie in two cones that hardly touch. The distance of the two means
is the modality gap (Liang et al., arXiv:2203.02053). The first two principal components of both
together show as much of it as a plane can.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import UserError
from fewshot.task import Task

MOST = 500  # pictures to show; a large model takes minutes for them on a CPU
BATCH = 64


def before_and_after(unadapted, method, task: Task) -> dict:
    """`space` of test pictures and class names, {"before", "after"}, and the indices of these
    pictures among all test pictures. UserError, if the method does not compare such features.
    """
    where, names, number = [], [], 0  # (test, which of its pictures, its number, its label)
    for part, test in task.tests.items():
        if part != "novel" or method.names_unseen:
            labels = (test.batches.labels.cpu() + len(names)).tolist()
            where += [(test, i, number + i, label) for i, label in enumerate(labels)]
            names = names + test.classnames
        number += len(test.batches)
    chosen = [where[k] for k in spread_out(len(where)).tolist()]
    of_pictures = {"pictures": [c[2] for c in chosen], "labels": [c[3] for c in chosen]}
    found = {"names": names, **of_pictures}
    for when, of in (("before", unadapted), ("after", method)):
        of = of if of.classnames == names else of.for_classes(names)
        rows = []
        for test in task.tests.values():
            mine = torch.tensor([c[1] for c in chosen if c[0] is test], dtype=torch.long)
            rows += [compared(of, test.batches, some) for some in mine.split(BATCH) if len(some)]
        images = torch.cat([f for f, _ in rows])
        texts = sum(len(f) * w.double() for f, w in rows) / len(images)  # of CoCoOp, their mean
        found[when] = space(images, texts)
    return found


def compared(method, batches, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The features (B, E) and (K, E) that a method passes to `CLIP.logits` for the pictures with
    the indices `chosen`. If texts depend on the image, their mean.
    """
    clip, seen = method.clip, []
    clip.logits = lambda f, w: seen.append((f, w)) or type(clip).logits(clip, f, w)
    try:
        with method.inference(), batches.autocast():
            stored = batches.pictures.features is not None
            x = batches.inputs(method, chosen) if stored else method.encode(batches.images(chosen))
            method.classify(x)
    finally:
        del clip.logits
    if not seen:
        raise UserError(
            f"{type(method).__name__} does not compare image features with text features, so there "
            "are no features to show"
        )
    images = torch.cat([f.float().cpu() for f, _ in seen])
    texts = seen[0][1].float().cpu()
    return images, texts.mean(0) if texts.dim() == 3 else texts


def space(images: Tensor, texts: Tensor) -> dict:
    """Images (N, E) and texts (K, E), not normalised -> their gap, and (x, y) of each."""
    images, texts = (F.normalize(x.double(), dim=-1) for x in (images, texts))
    both = torch.cat([images, texts])  # (N + K, E)
    u, s, v = torch.linalg.svd(both - both.mean(0), full_matrices=False)  # (N + K, R), (R,), (R, E)
    # The sign of a component is arbitrary: make its largest entry positive, so that runs agree.
    signs = v[:2].gather(1, v[:2].abs().argmax(1, keepdim=True)).sign().flatten()  # (2,)
    points = u[:, :2] * s[:2] * signs  # (N + K, 2)
    return {
        "gap": (images.mean(0) - texts.mean(0)).norm().item(),
        "explained": (100 * s[:2] ** 2 / (s**2).sum()).tolist(),  # percent of the variance
        "images": points[: len(images)].tolist(),
        "texts": points[len(images) :].tolist(),
    }


def spread_out(count: int, most: int = MOST) -> Tensor:
    """Indices of at most `most` of `count` pictures, evenly spaced."""
    if count <= most:
        return torch.arange(count)
    return torch.linspace(0, count - 1, most, dtype=torch.float64).round().long()
