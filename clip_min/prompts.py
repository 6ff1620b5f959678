"""PromptTree: many prompts through the text tower as one sequence, computing nothing twice.

CLIP's text tower is causal: a token sees only the tokens before it. Two things follow, and both are
exact. What comes after a prompt's end-of-text token cannot matter, so the padding to 77 tokens need
not be computed. And two prompts that begin alike have equal hidden states as far as they agree, so
the common beginning needs to be computed once. Written as a tree, in which every path from the root
to an [end] is a prompt,

    "a photo of a rose."       [start] - a - photo - of - a -+- rose - . - [end]
    "a photo of a red rose."                                 +- red - rose - . - [end]

these two prompts take 12 tokens instead of 2 x 77. The nodes form one sequence, each node keeps its
true position in its prompt, and the attention mask lets a node see itself and its ancestors:
exactly the tokens it would see if its prompt stood alone. (Randomness inside the tower, such as
LoRA's dropout, is drawn once for a node, and so for all prompts that share the node.)

Attention cost grows with the square of the length, so a large tree is cut into chunks of
`chunk_tokens`, each a tree of its own; the total then stays linear in the number of prompts.

Prompt learning (CoOp, CoCoOp) puts learned vectors in place of some token embeddings. `slots` says
where: it has the shape of the tokens, -1 where the token's own embedding stands and m where row m
of the context stands. Prompts that share slots share nodes, as with tokens.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class PromptTree(nn.Module):
    """K prompts, ready to be encoded any number of times.

    tokens (K, L): rows as the tokenizer gives them; each ends at its largest id, the end-of-text
        token, and what follows is ignored.
    slots (L,) or (K, L), optional: -1, or the row of the context that replaces the embedding.
    chunk_tokens: nodes in one sequence, at most (a longer prompt gets a chunk of its own).
    """

    unsort: Tensor  # (K,) puts features in sorted order back into the caller's

    def __init__(self, tokens: Tensor, slots: Tensor | None = None, chunk_tokens: int = 256):
        super().__init__()
        if tokens.dim() != 2 or len(tokens) == 0:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; a tree needs (K, L), at least one prompt"
            )
        slots = torch.full_like(tokens, -1) if slots is None else slots.expand_as(tokens)
        ends = tokens.argmax(dim=-1).tolist()
        prompts = [
            tuple(zip(row[: end + 1], slot[: end + 1], strict=True))
            for row, slot, end in zip(tokens.tolist(), slots.tolist(), ends, strict=True)
        ]  # a prompt: its (token, slot) pairs, the last one being the end
        # Sorting puts prompts with long common beginnings next to each other, so that a chunk
        # shares as much as possible; `unsort` restores the caller's order.
        order = sorted(range(len(prompts)), key=prompts.__getitem__)
        self.register_buffer("unsort", torch.tensor(order).argsort(), persistent=False)  # (K,)
        self.context_rows = int(slots.max()) + 1
        self.vocabulary = int(tokens.max()) + 1  # that a model needs to read them
        self.context_length = max(ends) + 1
        chunks: list[Chunk] = []
        nodes: dict[tuple, int] = {}  # a node is the beginning that leads to it -> its place
        reads: list[int] = []
        for prompt in (prompts[i] for i in order):
            path = [prompt[: n + 1] for n in range(len(prompt))]
            if nodes and len(nodes) + sum(node not in nodes for node in path) > chunk_tokens:
                chunks.append(Chunk(nodes, reads))
                nodes, reads = {}, []
            for node in path:
                nodes.setdefault(node, len(nodes))
            reads.append(nodes[prompt])
        chunks.append(Chunk(nodes, reads))
        self.chunks = nn.ModuleList(chunks)
        sizes = [len(chunk.tokens) for chunk in chunks]  # T of each
        self.total, self.longest = sum(sizes), max(sizes)

    def __len__(self) -> int:
        """The number of tokens computed; padded prompts would take K x 77."""
        return self.total

    def forward(self, clip, context: Tensor | None = None, max_tokens: int | None = None) -> Tensor:
        """Encode all prompts with the text tower of `clip` -> features (K, E), not normalised.

        context (M, D) replaces the embeddings where `slots` says so. With a context per image,
        (B, M, D), the features are (B, K, E). Without one, every token keeps its own embedding.
        Of the B x len(self) tokens, at most about `max_tokens` are computed at once. If there are
        more, the backward pass computes activations a second time instead of storing them.
        """
        if context is not None and context.shape[-2] != self.context_rows:
            raise ValueError(
                f"context has {context.shape[-2]} rows, but the slots of this tree name "
                f"{self.context_rows}"
            )
        per_image = context is not None and context.dim() == 3
        if context is not None and not per_image:
            context = context.unsqueeze(0)  # (1, M, D)
        images = 1 if context is None else len(context)
        pieces: Sequence[Tensor | None] = [context]
        encode = clip.encode_prompts
        if max_tokens is not None and images * len(self) > max_tokens:
            # Activation checkpointing: only the inputs are stored for the backward pass.
            # With dropout, the second time must draw what the first drew.
            again = {"use_reentrant": False, "preserve_rng_state": clip.training}
            encode = partial(checkpoint, encode, **again)
            if context is not None:
                pieces = context.split(max(1, max_tokens // self.longest))
        parts = [torch.cat([encode(c, piece) for c in self.chunks], dim=1) for piece in pieces]
        features = torch.cat(parts).index_select(1, self.unsort)  # (B or 1, K, E)
        return features if per_image else features[0]


class Chunk(nn.Module):
    """One tree as a sequence of T nodes: what the text tower reads (`TextTower.encode_prompts`)."""

    tokens: Tensor  # (T,)
    rows: Tensor  # (T,) which row a node takes of [the T embeddings, the M rows of the context]
    positions: Tensor  # (T,) in its own prompt
    mask: Tensor  # (T, T) row: who looks; column: at whom; 0 where it may, else -inf
    ends: Tensor  # (K,) the last nodes of prompts: what is read

    def __init__(self, nodes: dict[tuple, int], ends: list[int]):
        super().__init__()
        tokens = torch.tensor([node[-1][0] for node in nodes])
        slots = torch.tensor([node[-1][1] for node in nodes])
        sees = torch.eye(len(nodes), dtype=torch.bool)
        for node, place in nodes.items():  # parents stand before their children
            if node[:-1]:
                sees[place] |= sees[nodes[node[:-1]]]
        for name, value in {
            "tokens": tokens,
            "rows": torch.where(slots < 0, torch.arange(len(nodes)), len(nodes) + slots),
            "positions": torch.tensor([len(node) - 1 for node in nodes]),
            "mask": torch.zeros(sees.shape).masked_fill(~sees, -torch.inf),
            "ends": torch.tensor(ends),
        }.items():
            self.register_buffer(name, value, persistent=False)
