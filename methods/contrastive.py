"""CLIP's contrastive loss, for batches in which a class occurs more than once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import UserError


def check_objective(settings) -> None:
    """UserError if the settings do not fit the contrastive loss."""
    if settings.objective == "contrastive" and settings.balance:
        raise UserError(
            "--balance weights classes, but the contrastive loss has pairs; add --objective class"
        )


def contrastive_loss(logits: Tensor, labels: Tensor, plain: bool = False) -> Tensor:
    """Symmetric cross-entropy over B images and the captions of their classes.

    logits (B, B): image i with the caption of image j. In CLIP's pretraining (arXiv:2103.00020,
    figure 3) every image has a caption of its own, and the targets are the diagonal. Here images of
    a class share their caption, so pairs off the diagonal may be right. The target of each row and
    column is then uniform over the pairs of the same class (as in supervised contrastive learning,
    Khosla et al., arXiv:2004.11362). With `plain`, only the diagonal is right.
    """
    if plain:
        target = torch.eye(len(labels), device=labels.device)  # (B, B)
    else:
        same = (labels[:, None] == labels).to(logits.dtype)  # (B, B), symmetric
        target = same / same.sum(dim=1, keepdim=True)
    images, texts = F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)
    return (images + texts) / 2
