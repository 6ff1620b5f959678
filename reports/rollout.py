"""Where the class token looks: attention rollout.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers", arXiv:2005.00928. A_l (T, T) is the
attention of block l, averaged over heads: row t shows which tokens token t attends to. Because of
the residual connection, half of a block's output is taken to be its input:

    R = Ã_L · … · Ã_1,     Ã_l = (A_l + I) / 2

The class token's row of R shows how much of each patch reaches the class token. It is a rough
guide: it ignores values and MLPs, and does not show which class a patch supports.

Learned tokens among the patches (VPT, PromptSRC) contain nothing of the image when they are
inserted. Their rows of R start at 0, and are reset to 0 when a block replaces them with new ones.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import crop, normalize
from clip_min.files import replacing
from fewshot.pictures import open_image


def explain(methods: dict, file: Path, out: Path) -> None:
    """Draw a picture, and beside it the attention rollout of each of these methods.

    methods: title -> method, all on the same CLIP.
    """
    clip = next(iter(methods.values())).clip
    pixels = crop(open_image(file), clip.config)  # uint8 (3, n, n)
    x = normalize(pixels[None].to(clip.device), config=clip.config)  # (1, 3, n, n)
    maps = {}
    for title, method in methods.items():
        patches, (chosen,) = rollout(method, x)
        likely = zip(*chosen.topk(min(3, len(chosen))), strict=True)
        maps[title] = patches[0], [f"{100 * p:.1f} %  {method.classnames[i]}" for p, i in likely]
    draw(pixels, maps, out)


def attention(module, x: Tensor) -> Tensor:
    """The attention weights of an `Attention` for x (B, T, D), averaged over heads (B, T, T)."""
    q, k, _ = (  # (B, T, D) -> (B, T, H, D/H) -> (B, H, T, D/H)
        y.unflatten(-1, (module.heads, -1)).transpose(1, 2).float()
        for y in module.in_proj(x).chunk(3, dim=-1)
    )
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)


@torch.no_grad()
def rollout(method, images: Tensor) -> tuple[Tensor, Tensor]:
    """images (B, 3, n, n), normalised -> the share of each patch in the class token (B, n/p, n/p),
    and the method's probabilities (B, K).
    """
    side = method.clip.config.image_size // method.clip.config.patch_size  # n/p
    seen = []  # for each block: its attention (B, T, T), input and output

    def see(block, inputs, output):
        x, norm = inputs[0], block.ln_1 if hasattr(block, "ln_1") else block.ln
        seen.append((attention(block.attn, norm(x)), x, output))

    blocks = method.clip.visual.transformer.resblocks
    blocks = [getattr(block, "block", block) for block in blocks]  # inside PromptSRC's, which
    hooks = [block.register_forward_hook(see) for block in blocks]  # replace the learned tokens
    try:
        with method.inference():
            chosen = method.classify(method.encode(images)).softmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    return flow(seen, side * side).unflatten(1, (side, side)), chosen


def flow(seen: list[tuple[Tensor, Tensor, Tensor]], patches: int) -> Tensor:
    """(attention, input, output) of each block -> the class token's row of R (B, patches).

    Tokens are the class token, any learned ones, and the patches.
    """
    first = seen[0][0]
    eye = torch.eye(1 + patches, device=first.device).expand(len(first), -1, -1)
    r, before = eye, None  # (B, T, 1 + patches): shares of the image's own tokens in each token
    for a, x, output in seen:
        more = a.shape[1] - 1 - patches  # learned tokens
        middle = r.new_zeros(len(r), more, 1 + patches)
        if before is not None and before.shape == x.shape:
            carried = torch.isclose(before, x).all(-1)[:, 1 : 1 + more, None]  # (B, more, 1)
            middle = torch.where(carried, r[:, 1 : 1 + more], middle)
        r = torch.cat([r[:, :1], middle, r[:, -patches:]], dim=1)  # (B, T, 1 + patches)
        r = (a @ r + r) / 2
        before = output
    return r[:, 0, 1:]


def draw(pixels: Tensor, maps: dict[str, tuple[Tensor, list[str]]], path: Path) -> None:
    """Save as a PNG the picture, uint8 (3, n, n), and copies of it overlaid with each map (n/p,
    n/p).

    maps: title -> the map, and lines of text below it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture = pixels.permute(1, 2, 0).numpy()  # (n, n, 3)
    size = (3.2 * (1 + len(maps)), 4.1)
    with matplotlib.rc_context({"text.parse_math": False}):
        figure, axes = plt.subplots(1, 1 + len(maps), figsize=size, layout="constrained")
        axes[0].set_title("picture")
        for axis, (title, (patches, lines)) in zip(axes[1:], maps.items(), strict=True):
            wide = F.interpolate(patches[None, None].cpu(), pixels.shape[1:], mode="bilinear")
            axis.set_title(title)
            axis.set_xlabel("\n".join(lines), fontsize=9)
            shown = wide[0, 0] / wide.max()
            axis.imshow(picture)
            axis.imshow(shown.numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
        axes[0].imshow(picture)
        for axis in axes:
            axis.set(xticks=[], yticks=[])
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
        plt.close(figure)
