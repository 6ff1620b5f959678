"""CLIP's own training loss, for batches in which a class comes more than once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import UserError


def check_objective(settings) -> None:
    """UserError, where settings ask the contrastive loss for what it cannot do."""
    if settings.objective == "contrastive" and settings.balance:
        raise UserError(
            "--balance weighs classes, and the contrastive loss has pairs; add --objective class"
        )


def contrastive_loss(logits: Tensor, labels: Tensor, plain: bool = False) -> Tensor:
    """Symmetric cross-entropy over B images and the captions of their classes.

    logits (B, B): image i with the caption of image j. In CLIP's pretraining (arXiv:2103.00020,
    figure 3) every caption is its image's own, and the right answer is the diagonal. Here images
    of one class have the same caption, so off-diagonal pairs may be true ones; each row and column
    then has its probability spread evenly over the pairs of one class (as in supervised
    contrastive learning, Khosla et al., arXiv:2004.11362). `plain` keeps the diagonal alone, and so
    punishes them.
    """
    if plain:
        target = torch.eye(len(labels), device=labels.device)  # (B, B)
    else:
        same = (labels[:, None] == labels).to(logits.dtype)  # (B, B), symmetric
        target = same / same.sum(dim=1, keepdim=True)
    images, texts = F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)
    return (images + texts) / 2
