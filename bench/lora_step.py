"""One LoRA training step at ViT-B/16: ours, the usual way, and peft on transformers.

    python bench/lora_step.py [--images 16] [--classes 51] [--rounds 3]

All use the same random weights, which do not change the speed; a step is forward, backward and
AdamW. "usual" is the way of published notebooks: openai-clip's blocks with loralib.MergedLinear,
which multiplies by B·A, and all prompts padded to 77 tokens. peft adapts q, k and v, which are
separate layers there. "ours, F.linear" is ours without oneDNN (clip_min/fast.py). Before timing,
without dropout, the logits and the gradients of all A and B are compared between "ours" and
"usual", at random B; peft's logits are compared at B = 0, as it has one more part. Needs the
`test` extra.
"""

import argparse
import math

import clip as openai_clip
import loralib
import peft
import torch
import torch.nn.functional as F
import transformers
from side_by_side import plain, relative, seconds, show
from torch import nn

from clip_min import CLIP, CONFIGS, tokenize
from methods.lora import LoRA, LoRASettings

TEMPLATE = "a photo of a {}, a type of flower."


class UsualAttention(nn.Module):
    """Attention of openai-clip's blocks, its fused projection a loralib.MergedLinear."""

    def __init__(self, theirs: nn.MultiheadAttention, rank: int, alpha: float):
        super().__init__()
        width = theirs.embed_dim
        self.heads, self.out_proj = theirs.num_heads, theirs.out_proj
        self.in_proj = loralib.MergedLinear(
            width,
            3 * width,
            r=rank,
            lora_alpha=alpha,
            enable_lora=[True, False, True],
            merge_weights=False,
        )
        self.in_proj.weight.data = theirs.in_proj_weight.data
        self.in_proj.bias.data = theirs.in_proj_bias.data
        self.in_proj.bias.requires_grad_(False)  # loralib.mark_only_lora_as_trainable

    def forward(self, x, _key, _value, need_weights, attn_mask):  # as in nn.MultiheadAttention
        # x (T, B, D), as openai-clip lays it out
        heads = [
            y.unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3)  # (B, H, T, D/H)
            for y in self.in_proj(x).chunk(3, dim=-1)
        ]
        x = F.scaled_dot_product_attention(*heads, attn_mask=attn_mask)
        return (self.out_proj(x.permute(2, 0, 1, 3).flatten(2)),)  # (T, B, D)


def usual_way(state: dict, s: LoRASettings) -> nn.Module:
    model = openai_clip.model.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    model.load_state_dict({n.replace("in_proj.", "in_proj_"): t for n, t in state.items()})
    model.requires_grad_(False)
    for tower, rank, alpha in (
        (model.visual.transformer, s.image_rank, s.image_alpha),
        (model.transformer, s.text_rank, s.text_alpha),
    ):
        for block in tower.resblocks:
            block.attn = UsualAttention(block.attn, rank, alpha)
    return model


def peft_way(state: dict, s: LoRASettings) -> nn.Module:
    text = {"hidden_act": "quick_gelu", "bos_token_id": 49406, "eos_token_id": 49407}
    vision = {"hidden_act": "quick_gelu", "patch_size": 16}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    model.load_state_dict(to_hugging_face(state), strict=True)
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=s.image_rank,
            lora_alpha=s.image_alpha,
            rank_pattern={"text_model.*": s.text_rank},
            alpha_pattern={"text_model.*": s.text_alpha},
            target_modules=["q_proj", "k_proj", "v_proj"],
            lora_dropout=s.dropout,
        ),
    )


def to_hugging_face(state: dict) -> dict:
    """Our names -> transformers', the reverse of clip_min.weights for these tensors."""
    renames = [
        ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
        ("transformer.resblocks.", "text_model.encoder.layers."),
        (".attn.", ".self_attn."),
        (".ln_1.", ".layer_norm1."),
        (".ln_2.", ".layer_norm2."),
        (".mlp.c_fc.", ".mlp.fc1."),
        (".mlp.c_proj.", ".mlp.fc2."),
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.ln_pre.", "vision_model.pre_layrnorm."),
        ("visual.ln_post.", "vision_model.post_layernorm."),
        ("token_embedding.", "text_model.embeddings.token_embedding."),
        ("ln_final.", "text_model.final_layer_norm."),
    ]
    theirs = {}
    for name, tensor in state.items():
        if name in ("visual.proj", "text_projection"):
            theirs[name.replace("visual.proj", "visual_projection") + ".weight"] = tensor.T
        elif name == "positional_embedding":
            theirs["text_model.embeddings.position_embedding.weight"] = tensor
        else:
            for ours, other in renames:
                name = name.replace(ours, other) if ours in name else name
            for part, piece in zip(
                "qkv", tensor.chunk(3) if "in_proj" in name else "", strict=False
            ):
                theirs[name.replace("in_proj", f"{part}_proj")] = piece
            if "in_proj" not in name:
                theirs[name] = tensor
    return theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--classes", type=int, default=51)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    torch.manual_seed(0)
    settings = LoRASettings()
    names = [f"flower {i}" for i in range(flags.classes)]
    tokens = tokenize([TEMPLATE.replace("{}", name) for name in names])  # (K, 77)
    images = torch.randn(flags.images, 3, 224, 224)
    labels = torch.arange(flags.images) % flags.classes

    clip = CLIP(CONFIGS["ViT-B/16"])
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    ours = LoRA(clip, names, TEMPLATE, settings)
    usual, other = usual_way(state, settings), peft_way(state, settings)

    def peft_logits():
        output = other(pixel_values=images, input_ids=tokens)
        return output.logits_per_image

    ways = {
        "ours": (ours, lambda: ours(images)),
        "usual": (usual, lambda: usual(images, tokens)[0]),
        "peft": (other, peft_logits),
    }
    for model, _ in ways.values():
        model.eval()  # no dropout while numbers are compared
    with torch.no_grad():
        peft_difference = relative(peft_logits(), ours(images))
    pairs = list(zip(ours.layers(), _merged_linears(usual), strict=True))
    for mine, theirs in pairs:
        nn.init.normal_(mine.lora_B, std=0.02 / math.sqrt(mine.rank))
        theirs.lora_A.data, theirs.lora_B.data = mine.lora_A.data.clone(), mine.lora_B.data.clone()
        theirs.lora_dropout = nn.Identity()
    logits = {}
    for name in ("ours", "usual"):
        logits[name] = ways[name][1]()
        F.cross_entropy(logits[name], labels).backward()
    gradients = max(
        relative(getattr(mine, part).grad, getattr(theirs, part).grad)
        for mine, theirs in pairs
        for part in ("lora_A", "lora_B")
    )
    differences = {
        "ours": (None, None),
        "usual": (relative(logits["ours"], logits["usual"]), gradients),
        "peft": (peft_difference, None),
    }

    for _, theirs in pairs:
        theirs.lora_dropout = nn.Dropout(settings.dropout)

    def step(name: str):
        model, forward = ways[name]
        model.train()
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=2e-4)

        def run() -> None:
            optimizer.zero_grad()
            F.cross_entropy(forward(), labels).backward()
            optimizer.step()

        return run

    steps = {name: step(name) for name in ways}
    taken = seconds({**steps, "ours, F.linear": plain(steps["ours"])}, flags.rounds)
    differences["ours, F.linear"] = (None, None)
    rows = [
        {
            "way": name,
            "text tokens": len(ours.prompts) if "ours" in name else tokens.numel(),
            "seconds": taken[name],
            "ours is faster by": taken[name] / taken["ours"],
            "logits differ by": differences[name][0],
            "gradients differ by": differences[name][1],
        }
        for name in taken
    ]
    show(
        f"One LoRA training step, ViT-B/16, {flags.images} images, {flags.classes} prompts",
        rows,
        speedup_usual=taken["usual"] / taken["ours"],
        speedup_peft=taken["peft"] / taken["ours"],
    )


def _merged_linears(model: nn.Module) -> list:
    """In the order of `LoRA.layers`: text tower, then image tower."""
    towers = (model.transformer, model.visual.transformer)
    return [block.attn.in_proj for tower in towers for block in tower.resblocks]


if __name__ == "__main__":
    main()
