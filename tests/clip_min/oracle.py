"""OpenAI's CLIP with random weights, the same weights in ours, and the distance between results."""

import os
import subprocess
import sys
from pathlib import Path

import clip.model
import torch
from torch import Tensor, nn

from clip_min import CLIP, CLIPConfig

SMALL = CLIPConfig(
    embed_dim=32,
    image_size=32,
    patch_size=8,
    vision_width=128,
    vision_layers=3,
    vision_heads=2,
    text_width=64,
    text_layers=2,
    text_heads=1,
    vocab_size=1000,
)


def openai_clip(config: CLIPConfig, seed: int = 0) -> clip.model.CLIP:
    """Initialised as OpenAI does, except that no bias is 0 and no gain is 1, so that all count."""
    torch.manual_seed(seed)
    theirs = clip.model.CLIP(
        config.embed_dim,
        config.image_size,
        config.vision_layers,
        config.vision_width,
        config.patch_size,
        config.context_length,
        config.vocab_size,
        config.text_width,
        config.text_heads,
        config.text_layers,
    )
    if config.vision_heads != config.vision_width // 64:  # which their CLIP takes for granted
        theirs.visual = clip.model.VisionTransformer(
            config.image_size,
            config.patch_size,
            config.vision_width,
            config.vision_layers,
            config.vision_heads,
            config.embed_dim,
        )
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return theirs.eval()


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's tensors under the one name that differs in ours."""
    return {name.replace("attn.in_proj_", "attn.in_proj."): t for name, t in state.items()}


def same_in_ours(theirs: clip.model.CLIP, config: CLIPConfig) -> CLIP:
    """Their very tensors, shared, in a model of ours with gradients of its own."""
    with torch.device("meta"):
        ours = CLIP(config)
    ours.load_state_dict(renamed(theirs.state_dict()), assign=True)
    return ours.eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return renamed({name: parameter.grad for name, parameter in model.named_parameters()})


def far(result: Tensor, oracle: Tensor) -> float:
    """The largest difference, relative to the oracle's largest value; shapes must be equal."""
    assert result.shape == oracle.shape
    difference = (result.double() - oracle.double()).abs().max() / oracle.double().abs().max()
    return difference.item() if difference.isfinite() else float("inf")


def random_tokens(k: int, config: CLIPConfig, seed: int = 0) -> Tensor:
    """(k, 77): [start] 1 to 75 random ids [end] 0 ...; start and end are the two largest ids."""
    rng = torch.Generator().manual_seed(seed)
    start, end = config.vocab_size - 2, config.vocab_size - 1
    tokens = torch.zeros(k, config.context_length, dtype=torch.long)
    for row in tokens:
        n = int(torch.randint(1, config.context_length - 1, (), generator=rng))
        row[0], row[n + 1] = start, end
        row[1 : n + 1] = torch.randint(1, start, (n,), generator=rng)
    return tokens


def assert_holds(model: CLIP, state: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert not [name for name in state if not torch.equal(found[name], state[name])]


def convert(root: Path, *arguments, **environment) -> subprocess.CompletedProcess:
    """`python -m clip_min.weights convert ...`, with nothing of this machine's hub settings."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-m", "clip_min.weights", "convert", *map(str, arguments)],
        cwd=root,
        env={**clean, "NO_PROXY": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_one_line_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr
