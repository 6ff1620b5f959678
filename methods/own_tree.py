"""A method's own CLIP, which shares the tensors of the CLIP it was lent."""

import copy

from torch import nn

from clip_min import CLIP


def own_tree(clip: CLIP) -> CLIP:
    """A copy of the modules of `clip` that shares its tensors, frozen.

    Adding a module or replacing a tensor in the copy does not affect the original; only changing a
    tensor in place would.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in clip.parameters()}
    return copy.deepcopy(clip, shared)  # the memo `shared` stands for tensors already copied
