"""How much of what was learned is kept: the line from zero-shot CLIP to a trained method.

Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv:2109.01903. What is won
on the classes that are learned is often lost on others. Between the two ends lies a whole line of
models, for the price of a mean of weights,

    θ_a = (1 - a)·θ_zero-shot + a·θ_learned                      a from 0 to 1: the share kept

and somewhere on it both may be better than at either end. It needs a start that is zero-shot CLIP,
so not every method has this line: `zero_shot_state` of a method gives its θ_zero-shot, or None.
Random tokens (VPT) or a random network (CoCoOp) are nothing to go back to, nor is the start of
2SFS's classifier: a text tower that has learned.

LoRA adds s·B·A to a weight W. With a·B in the place of B the weight is

    W + s·(a·B)·A  =  (1 - a)·W + a·(W + s·B·A)

which is the line of the merged weights. With a·A as well the product would be a², off that line;
so B alone goes to its zeros, and A stays.
"""

import torch
from torch import Tensor

from clip_min import UserError
from methods.base import Method


@torch.no_grad()
def keep_share(method: Method, learned: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """`learned`, as `adapter_state` gives it, with a = `share` of it kept: at 0 `method` is
    zero-shot CLIP with the same templates, at 1 what it has learned, both to the bit. UserError if
    it did not start there.
    """
    start = method.zero_shot_state and method.zero_shot_state()
    if not start:
        raise UserError(
            f"--keep-share {share}: {type(method).__name__}'s start is not zero-shot CLIP with "
            f"{'|'.join(method.templates)!r}, or it learns nothing: between the two lies no line; "
            "drop the flag"
        )
    line = {name: start[name].to(learned[name]) for name in start.keys() & learned.keys()}
    return {
        name: (1 - share) * line[name] + share * tensor if name in line else tensor
        for name, tensor in learned.items()
    }
