"""How other libraries name a CLIP's tensors: their names -> ours, and back.

    to_our_names       OpenAI's, open_clip's or Hugging Face's names -> ours
    to_openai_names    ours -> OpenAI's, which open_clip uses as well
    to_hugging_face    ours -> those of `transformers.CLIPModel`

Our names are OpenAI's, except for the fused q/k/v projection: `attn.in_proj.weight`, theirs
`attn.in_proj_weight`. Hugging Face has other names throughout, splits that projection in three, and
keeps the two projections into the shared space as Linear layers: (E, D), where ours are (D, E).
"""

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Ours, Hugging Face's: beginnings of names. The first that fits counts.
_BEGINNINGS = [
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1", "vision_model.embeddings.patch_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre", "vision_model.pre_layrnorm"),  # their spelling
    ("visual.ln_post", "vision_model.post_layernorm"),
    ("visual.transformer.resblocks", "vision_model.encoder.layers"),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final", "text_model.final_layer_norm"),
    ("transformer.resblocks", "text_model.encoder.layers"),
    ("text_projection", "text_projection.weight"),
]
# Ours, Hugging Face's: the middle of the names in a block.
_IN_BLOCKS = [
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
]
_TO_THEIRS = dict(_BEGINNINGS + _IN_BLOCKS)
_TO_OURS = {theirs: ours for ours, theirs in _TO_THEIRS.items()}
_TRANSPOSED = ("visual.proj", "text_projection")  # ours (D, E), theirs (E, D)

# Tensors in some files that are not weights: sizes, the causal mask, position numbers.
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(input_resolution|context_length|vocab_size|attn_mask|position_ids)$"
)


def to_our_names(names: list[str], take: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A CLIP's tensors under our names, one by one; Hugging Face's are fused and transposed.

    take: returns the tensor that has this name in the file. KeyError, ValueError: a tensor is
    missing, or shapes do not match.
    """
    known = set(names)
    hugging_face = "vision_model.embeddings.class_embedding" in known
    for name in names:
        if _NOT_WEIGHTS.search(name) or re.search(r"\.self_attn\.[kv]_proj\.", name):
            continue  # k and v are fused with their q_proj
        if not hugging_face:  # OpenAI's names; open_clip's text tower may be under "text."
            ours = name.removeprefix("text.").replace("attn.in_proj_", "attn.in_proj.")
            yield ours, take(name)
            continue
        parts = [name]
        if ".self_attn.q_proj." in name:
            parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if missing := [part for part in parts if part not in known]:
            raise KeyError(missing[0])
        tensors = [take(part) for part in parts]
        if len({tensor.shape for tensor in tensors}) > 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise ValueError(f"{name} and its k_proj and v_proj have shapes {shapes}: not equal")
        ours = _renamed(name.replace(".self_attn.q_proj.", ".attn.in_proj."), _TO_OURS)
        tensor = torch.cat(tensors) if len(parts) > 1 else tensors[0]  # (3D, D), (3D,)
        yield ours, tensor.T if ours in _TRANSPOSED else tensor


def to_openai_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> OpenAI's and open_clip's."""
    return {name.replace("attn.in_proj.", "attn.in_proj_"): t for name, t in state.items()}


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> those of `transformers.CLIPModel`; the reverse of `to_our_names`."""
    theirs = {}
    for name, tensor in state.items():
        their_name = _renamed(name, _TO_THEIRS)
        if ".attn.in_proj." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):  # (D, D), (D,)
                theirs[their_name.replace(".attn.in_proj.", f".self_attn.{part}_proj.")] = rows
        else:
            theirs[their_name] = tensor.T if name in _TRANSPOSED else tensor
    return theirs


def _renamed(name: str, table: dict[str, str]) -> str:
    """`name`, with its beginning and its middle replaced if they are in the table."""
    for old, new in table.items():
        if not old.startswith(".") and name.startswith(old):
            name = new + name[len(old) :]
            break
    for old, new in table.items():
        if old.startswith("."):
            name = name.replace(old, new)
    return name
