"""CLIP's two transformers: images and texts go in, points in one shared space come out.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020. Parts stand before wholes: attention, block, transformer, the two towers, CLIP.

Letters in the shape comments: B images, K texts, T tokens, D width of a tower, H heads, E size of
the shared space; `read` the number of tokens whose output is read (as an argument, their index).

Parameter names are OpenAI's, so that weights are recognisable everywhere, with one exception: the
fused q/k/v projection is an ordinary `nn.Linear` (`attn.in_proj.weight`, theirs:
`attn.in_proj_weight`). An adapter therefore replaces one `nn.Linear` and nothing else.

Three things differ from the paper's code, with equal results:
- The last block computes only the tokens whose output is read: the class token of an image, the
  end-of-text token of a prompt.
- The text tower computes no padding, and computes once the beginnings that prompts share (see
  prompts.py).
- `fast.Linear`, a subclass of `nn.Linear`, and QuickGELU run faster where the processor allows it
  (see fast.py, which also says how to turn that off).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_min import fast
from clip_min.prompts import Chunk, PromptTree


@dataclass(frozen=True)
class CLIPConfig:
    """The sizes of a CLIP, and what its tensors do not show: activation and image preprocessing.

    Every OpenAI ViT has heads 64 wide: heads = width / 64.
    """

    embed_dim: int  # E, the shared space
    image_size: int  # pixels, square
    patch_size: int  # pixels, square
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    context_length: int = 77  # tokens, start and end included
    vocab_size: int = 49408
    activation: str = "quick_gelu"  # of every MLP, a key of ACTIVATIONS
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in [0, 1]
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    resize: str = "shortest"  # side to image_size, then crop the centre; or "squash": both sides
    interpolation: str = "bicubic"  # or "bilinear"


CONFIGS = {  # OpenAI's four ViTs (the paper's table 20), a larger one, and the demo task's
    "ViT-B/32": CLIPConfig(512, 224, 32, 768, 12, 12, 512, 12, 8),
    "ViT-B/16": CLIPConfig(512, 224, 16, 768, 12, 12, 512, 12, 8),
    "ViT-L/14": CLIPConfig(768, 224, 14, 1024, 24, 16, 768, 12, 12),
    "ViT-L/14@336px": CLIPConfig(768, 336, 14, 1024, 24, 16, 768, 12, 12),
    "ViT-H/14": CLIPConfig(1024, 224, 14, 1280, 32, 16, 1024, 24, 16),  # LAION's; heads 80 wide
    "demo": CLIPConfig(64, 64, 8, 128, 3, 4, 64, 3, 2),
}


class QuickGELU(nn.Module):
    """OpenAI's stand-in for GELU. The input may be overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        return fast.QuickGELU.apply(x) if fast.enabled else x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = fast.Linear(width, 3 * width)  # rows: queries, keys, values
        self.out_proj = fast.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, read=None) -> Tensor:
        """x (B, T, D) -> (B, read, D): the output for the tokens `read` (an index of T; None: all).

        `mask` (T, T) is added to the attention scores: 0 where the row's token may attend to
        the column's, else -inf.
        """
        q, k, v = (  # (B, T, D) -> (B, T, H, D/H) -> (B, H, T, D/H)
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in self.in_proj(x).chunk(3, dim=-1)
        )
        if read is not None:
            q = q[:, :, read]  # (B, H, read, D/H)
            mask = None if mask is None else mask[read]  # (read, T)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, read, D/H)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, read, H, D/H) -> (B, read, D)


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them, on each token alone."""

    def __init__(self, width: int, activation: str = "quick_gelu"):
        super().__init__()
        self.c_fc = fast.Linear(width, 4 * width)
        self.gelu = ACTIVATIONS[activation]()
        self.c_proj = fast.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))  # (..., D) -> (..., 4D) -> (..., D)


class Block(nn.Module):
    """Pre-norm residual block: attention, then an MLP four times as wide."""

    def __init__(self, width: int, heads: int, activation: str = "quick_gelu"):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, read=None) -> Tensor:
        """x (B, T, D) -> (B, read, D), the tokens `read` (an index of T; None: all)."""
        gathered = self.attn(self.ln_1(x), mask, read)  # (B, read, D)
        x = gathered + (x if read is None else x[:, read])
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, activation: str = "quick_gelu"):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None, read=None, first: int = 0) -> Tensor:
        """x (B, T, D) -> (B, read, D): run the blocks from `first` on, the last only for `read`."""
        *blocks, last = list(self.resblocks)[first:]
        for block in blocks:
            x = block(x, mask)
        return last(x, mask, read)


class VisionTower(nn.Module):
    """ViT (arXiv:2010.11929): an image is a class token and a sequence of patches."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        self.image_size = config.image_size
        tokens = 1 + (config.image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        layers, heads = config.vision_layers, config.vision_heads
        self.transformer = Transformer(width, layers, heads, config.activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        for module in self.transformer.modules():
            if isinstance(module, Attention):  # starts as nn.MultiheadAttention, which CLIP used
                nn.init.xavier_uniform_(module.in_proj.weight)
                nn.init.zeros_(module.in_proj.bias)
                nn.init.zeros_(module.out_proj.bias)

    def embed(self, images: Tensor) -> Tensor:
        """images (B, 3, n, n) -> the tokens (B, 1 + patches, D) the first block reads."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {images.shape[-2]}x{images.shape[-1]} pixels, but this model reads "
                f"{self.image_size}x{self.image_size}: use clip_min.crop"
            )
        x = self.conv1(images.to(self.conv1.weight.dtype))  # (B, D, n/p, n/p)
        x = x.flatten(2).transpose(1, 2)  # (B, T-1, D)
        class_token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # (B, 1, D)
        x = torch.cat([class_token, x], dim=1)  # (B, T, D)
        return self.ln_pre(x + self.positional_embedding.to(x.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, n, n), normalised -> features (B, E)."""
        return self.finish(self.embed(images))

    def begin(self, images: Tensor, blocks: int) -> Tensor:
        """images (B, 3, n, n), normalised -> the tokens (B, T, D) after the first `blocks`."""
        x = self.embed(images)
        for block in self.transformer.resblocks[:blocks]:
            x = block(x)
        return x

    def finish(self, x: Tensor, first: int = 0) -> Tensor:
        """The tokens x (B, T, D) that block `first` reads -> features (B, E)."""
        x = self.transformer(x, read=slice(0, 1), first=first)  # (B, 1, D), the class token
        return self.ln_post(x[:, 0]) @ self.proj


class TextTower(nn.Module):
    """A causal transformer over prompts, read at their end-of-text token."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, layers, heads = config.text_width, config.text_layers, config.text_heads
        self.context_length = config.context_length
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.transformer = Transformer(width, layers, heads, config.activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))

        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for module in self.transformer.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.in_proj.weight, std=width**-0.5)
                nn.init.zeros_(module.in_proj.bias)
                nn.init.normal_(module.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
                nn.init.zeros_(module.out_proj.bias)
            elif isinstance(module, MLP):
                nn.init.normal_(module.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(module.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def encode_prompts(self, prompts: Chunk, context: Tensor | None = None) -> Tensor:
        """K prompts, laid out as one sequence of T tokens -> features (1, K, E), not normalised.

        Each token has its position in its own prompt, and the mask lets it see only the tokens
        before it in that prompt (see prompts.py). With a context (B, M, D), learned vectors stand
        in place of some token embeddings, and the features are (B, K, E).
        """
        x = self.token_embedding(prompts.tokens).unsqueeze(0)  # (1, T, D)
        if context is not None:
            x = x.expand(len(context), -1, -1)  # (B, T, D)
            x = torch.cat([x, context.to(x.dtype)], dim=1)  # (B, T + M, D)
            x = x.index_select(1, prompts.rows)  # (B, T, D)
        x = x + self.positional_embedding[prompts.positions].to(x.dtype)
        x = self.transformer(x, prompts.mask.to(x.dtype), read=prompts.ends)  # (B, K, D)
        return self.ln_final(x) @ self.text_projection


class CLIP(TextTower):
    """The model. OpenAI's parameter names put the text tower at the root and the image tower under
    `visual`. That is why CLIP is a text tower here, with an image tower inside.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__(config)
        self.config = config
        self.visual = VisionTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, n, n), normalised -> features (B, E), not normalised."""
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens (K, L), as the tokenizer gives them -> features (K, E), not normalised."""
        return PromptTree(tokens).to(tokens.device)(self)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(B, E) and (K, E), or K text features for each image (B, K, E) -> logits (B, K).

        The cosine of each image with each text, times the model's logit scale.
        """
        dtype = self.logit_scale.dtype
        # No autocast: bfloat16 has 8 significant bits; at a scale of 100 similar classes would tie.
        with torch.autocast(image_features.device.type, enabled=False):
            image_features = F.normalize(image_features.to(dtype), dim=-1)
            text_features = F.normalize(text_features.to(dtype), dim=-1)
            scale = self.logit_scale.exp()
            if text_features.dim() == 2:
                return scale * image_features @ text_features.T
            return scale * torch.einsum("be,bke->bk", image_features, text_features)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """images (B, 3, n, n), tokens (K, L) -> logits (B, K)."""
        return self.logits(self.encode_image(images), self.encode_text(tokens))
