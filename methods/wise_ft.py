"""WiSE-FT: interpolate between zero-shot CLIP and a trained method.

Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv:2109.01903. Training
often raises accuracy on the classes it learns and lowers it on others. Averaging the weights of
both ends gives a line of models between them,

    θ_a = (1 - a)·θ_zero-shot + a·θ_learned                      a from 0 to 1: the share kept

and somewhere on the line both accuracies may be higher than at either end. The line needs a start
that is zero-shot CLIP: `zero_shot_state` of a method returns its θ_zero-shot, or None if there is
none. VPT starts from random tokens, CoCoOp from a random network, and the classifier of 2SFS from a
text tower that has learned; none of these starts is zero-shot CLIP.

LoRA adds s·B·A to a weight W. With a·B in place of B, the weight is

    W + s·(a·B)·A  =  (1 - a)·W + a·(W + s·B·A)

which is the line between the merged weights. Scaling A as well would give a factor a² and leave the
line; so only B is scaled, and A stays.
"""

import torch
from torch import Tensor

from clip_min import UserError
from methods.base import Method


@torch.no_grad()
def keep_share(method: Method, learned: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """`learned`, from `adapter_state`, interpolated at a = `share`: 0 is zero-shot CLIP with the
    same templates, 1 the trained method, both to the bit. UserError if the method did not start at
    zero-shot CLIP.
    """
    start = method.zero_shot_state and method.zero_shot_state()
    if not start:
        raise UserError(
            f"--keep-share {share}: {type(method).__name__} did not start at zero-shot CLIP with "
            f"{'|'.join(method.templates)!r}, or learns nothing, so it cannot be interpolated; "
            "leave the flag out"
        )
    line = {name: start[name].to(learned[name]) for name in start.keys() & learned.keys()}
    return {
        name: (1 - share) * line[name] + share * tensor if name in line else tensor
        for name, tensor in learned.items()
    }
