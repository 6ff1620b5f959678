"""A method's own CLIP, over the tensors of the one it was lent."""

import copy

from torch import nn

from clip_min import CLIP


def own_tree(clip: CLIP) -> CLIP:
    """A copy of the modules of `clip` over the same tensors, frozen.

    A part that is put into the copy, or a tensor that takes another's place there, is not in the
    original; only what changes a tensor itself would be.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in clip.parameters()}
    return copy.deepcopy(clip, shared)  # which takes what it finds in there as copied already
