"""CoOp and CoCoOp as their papers' code computes them, on openai-clip's own text tower: every class
a full prompt of 77 tokens, encoded anew for every image.
"""

import clip as openai_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def openai_text_tower(ours) -> nn.Module:
    """openai-clip's model with the weights of our CLIP (whose heads must be 64 wide)."""
    c = ours.config
    theirs = openai_clip.model.CLIP(
        c.embed_dim,
        c.image_size,
        c.vision_layers,
        c.vision_width,
        c.patch_size,
        c.context_length,
        c.vocab_size,
        c.text_width,
        c.text_heads,
        c.text_layers,
    )
    state = {n.replace("in_proj.", "in_proj_"): t for n, t in ours.state_dict().items()}
    theirs.load_state_dict(state)
    return theirs.requires_grad_(False).eval()


class PublishedCoOp(nn.Module):
    """context (M, D) shared, or (K, M, D); the class name at the end, in the middle or in front."""

    def __init__(self, text: nn.Module, classnames: list[str], context: Tensor, position="end"):
        super().__init__()
        self.text, self.context, self.position = text, nn.Parameter(context), position
        n_ctx = context.shape[-2]
        marks = ["X"] * n_ctx
        tokens = openai_clip.tokenize([" ".join([*marks, name]) + "." for name in classnames])
        self.ends = tokens.long().argmax(dim=-1)  # (K,)
        embedded = text.token_embedding(tokens)  # (K, 77, D)
        self.start, self.rest = embedded[:, :1], embedded[:, 1 + n_ctx :]
        # The tokens of each name, without context, full stop and the two ends.
        self.name_lengths = [end - n_ctx - 2 for end in self.ends.tolist()]

    def prompts(self, context: Tensor) -> Tensor:
        """context (K, M, D) -> embeddings (K, 77, D)."""
        rows = []
        half = {"end": context.shape[1], "middle": context.shape[1] // 2, "front": 0}[self.position]
        for k, length in enumerate(self.name_lengths):
            name, rest = self.rest[k, :length], self.rest[k, length:]
            row = [self.start[k], context[k, :half], name, context[k, half:], rest]
            rows.append(torch.cat(row))
        return torch.stack(rows)

    def encode(self, context: Tensor) -> Tensor:
        """context (M, D) or (K, M, D) -> text features (K, E)."""
        x = self.prompts(context.expand(len(self.rest), -1, -1))  # (K, 77, D)
        x = (x + self.text.positional_embedding).permute(1, 0, 2)
        x = self.text.ln_final(self.text.transformer(x).permute(1, 0, 2))
        return x[torch.arange(len(x)), self.ends] @ self.text.text_projection

    def forward(self, features: Tensor) -> Tensor:
        text = F.normalize(self.encode(self.context), dim=-1)
        return self.text.logit_scale.exp() * F.normalize(features, dim=-1) @ text.T


class PublishedCoCoOp(PublishedCoOp):
    def __init__(self, text, classnames, context, meta_net: nn.Sequential):
        super().__init__(text, classnames, context)
        down, up = meta_net[0], meta_net[2]
        self.meta_net = nn.Sequential(
            nn.Linear(down.in_features, down.out_features),
            nn.ReLU(),
            nn.Linear(up.in_features, up.out_features),
        )
        self.meta_net.load_state_dict(meta_net.state_dict())

    def forward(self, features: Tensor) -> Tensor:
        features = F.normalize(features, dim=-1)
        logits = []
        for feature, shift in zip(features, self.meta_net(features), strict=True):
            text = F.normalize(self.encode(self.context + shift), dim=-1)
            logits.append(self.text.logit_scale.exp() * feature @ text.T)
        return torch.stack(logits)


class PublishedKgCoOp(PublishedCoOp):
    """KgCoOp: CoOp with a loss that holds text features near those of prompts written by hand."""

    def __init__(self, text, classnames, context, written: list[str], weight: float):
        super().__init__(text, classnames, context)
        self.weight = weight
        self.written = text.encode_text(openai_clip.tokenize(written))  # (K, E)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        text = F.normalize(self.encode(self.context), dim=-1)
        far = 1 - (text * F.normalize(self.written, dim=-1)).sum(-1).mean()
        return F.cross_entropy(self(features), labels) + self.weight * far
