"""A tree of prompts gives what OpenAI's padded text tower gives, prompt by prompt."""

import random

import pytest
import torch
import torch.nn.functional as F
from oracle import SMALL, far, gradients, openai_clip, random_tokens, same_in_ours
from torch import Tensor

from clip_min import CLIP, PromptTree

pytestmark = pytest.mark.usefixtures("both_ways")
CLOSE = 1e-5
CONTEXT, END = SMALL.context_length, SMALL.vocab_size - 1
ENDLESS = 10**9  # so many tokens in a chunk that there is only one


@pytest.fixture(scope="module")
def theirs():
    return openai_clip(SMALL)


@pytest.fixture(scope="module")
def ours(theirs):
    return same_in_ours(theirs, SMALL)


def padded(prompts: list[list[int]]) -> Tensor:
    return torch.tensor([prompt + [0] * (CONTEXT - len(prompt)) for prompt in prompts])


def any_prompts(seed: int) -> Tensor:
    """1 to 300 prompts with anything in common: a beginning, all, nothing; in random order."""
    rng = random.Random(seed)
    alphabet = rng.choice([2, 5, END - 1])  # few words, so that beginnings meet by chance too
    common = [rng.randint(0, alphabet) for _ in range(rng.choice([0, 1, 5, 40, CONTEXT - 1]))]
    k, longest = rng.choice([(1, 75), (2, 75), (10, 75), (60, 12), (300, 6)])
    longest = min(longest, CONTEXT - 1 - len(common))
    prompts = []
    for _ in range(k):
        own = [rng.randint(0, alphabet) for _ in range(rng.randint(0, longest))]
        prompts.append([*common, *own, END])
    for _ in range(len(prompts) // 5):
        prompts[rng.randrange(len(prompts))] = list(rng.choice(prompts))  # duplicates
    if rng.random() < 0.5:  # a prompt that ends inside another, which may only end on a larger id
        whole = rng.choice(prompts)[:-1]
        whole = whole[: CONTEXT - 2]
        prompts += [[*whole, END - 1], [*whole, END - 1, END]]
    rng.shuffle(prompts)
    return padded(prompts)


def beginnings(tokens: Tensor, slots: Tensor | None = None) -> int:
    """How many different beginnings the prompts have: what a tree of them computes."""
    found = set()
    slots = torch.full_like(tokens, -1) if slots is None else slots.expand_as(tokens)
    for row, slot in zip(tokens.tolist(), slots.tolist(), strict=True):
        for n in range(row.index(max(row)) + 1):
            found.add((*row[: n + 1], *slot[: n + 1]))
    return len(found)


def naive(theirs, tokens: Tensor, slots: Tensor, context: Tensor) -> Tensor:
    """The published way: write the context into the embeddings and run all 77 tokens of each."""
    features = []
    for rows in context if context.dim() == 3 else [context]:  # (M, D) of one image
        x = theirs.token_embedding(tokens)  # (K, 77, D)
        learned = slots.expand_as(tokens) >= 0
        x = x.masked_scatter(learned[..., None], rows[slots.expand_as(tokens)[learned]])
        x = (x + theirs.positional_embedding).transpose(0, 1)  # (77, K, D)
        x = theirs.ln_final(theirs.transformer(x).transpose(0, 1))  # (K, 77, D)
        features.append(x[torch.arange(len(x)), tokens.argmax(-1)] @ theirs.text_projection)
    return torch.stack(features) if context.dim() == 3 else features[0]


def contexts(kind: str, k: int) -> tuple[Tensor, int]:
    """Slots of k prompts (77 wide) and how many rows of context they name."""
    slots = torch.full((CONTEXT,), -1)
    if kind == "after the start":
        slots[1:5] = torch.arange(4)
        return slots, 4
    if kind == "in the middle":  # in reverse, and one row twice
        slots[torch.tensor([3, 4, 7, 8])] = torch.tensor([2, 1, 0, 2])
        return slots, 3
    assert kind == "of each class"
    slots = slots.repeat(k, 1)
    slots[:, 1:4] = torch.arange(3 * k).view(k, 3)
    return slots, 3 * k


KINDS = ["after the start", "in the middle", "of each class"]


def prompts_for_context(k: int = 12) -> Tensor:
    """[start] 9 shared words, then 1 to 5 words of its own and [end]; one class name twice."""
    rng = torch.Generator().manual_seed(1)
    shared = [END - 1, *range(100, 109)]
    own = [torch.randint(1, 9, (1 + i % 5,), generator=rng).tolist() for i in range(k - 1)]
    return padded([[*shared, *words, END] for words in [*own, own[0]]])


@pytest.mark.parametrize("seed", range(24))
@torch.no_grad()
def test_any_prompts_equal_openais_padded_encoding(theirs, ours, seed):
    tokens = any_prompts(seed)
    oracle = theirs.encode_text(tokens)
    for chunk_tokens in (1, 33, 256, 1000):
        tree = PromptTree(tokens, chunk_tokens=chunk_tokens)
        assert far(tree(ours), oracle) < CLOSE
    assert far(ours.encode_text(tokens), oracle) < CLOSE


@pytest.mark.parametrize("seed", range(24))
def test_a_tree_computes_every_different_beginning_once(seed):
    tokens = any_prompts(seed)
    assert len(PromptTree(tokens, chunk_tokens=ENDLESS)) == beginnings(tokens)


@pytest.mark.parametrize("chunk_tokens", [1, 33, 256, 1000])
def test_a_chunk_exceeds_its_limit_only_for_one_long_prompt(chunk_tokens):
    for seed in range(24):
        tree = PromptTree(any_prompts(seed), chunk_tokens=chunk_tokens)
        for chunk in tree.chunks:
            one_path = int(chunk.positions.max()) + 1 == len(chunk.tokens)
            assert len(chunk.tokens) <= chunk_tokens or one_path


def test_the_order_of_the_prompts_costs_nothing():
    """Chunks are filled with neighbours in the alphabet, whatever the caller's order."""
    tokens = any_prompts(5)
    assert beginnings(tokens) > 256
    costs = {len(PromptTree(tokens[torch.randperm(len(tokens))])) for _ in range(5)}
    assert costs == {len(PromptTree(tokens))}


def test_class_prompts_cost_a_fraction_of_the_padded_tokens():
    tokens = prompts_for_context()
    assert len(PromptTree(tokens)) == beginnings(tokens) < tokens.numel() / 10


@pytest.mark.parametrize("images", [None, 1, 5])
@pytest.mark.parametrize("chunk_tokens", [1, 30, 256])
@pytest.mark.parametrize("max_tokens", [None, 1, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_learned_context_equals_writing_it_into_the_embeddings(
    theirs, ours, kind, max_tokens, chunk_tokens, images
):
    """Features, and the gradients of the context and of every text weight."""
    tokens = prompts_for_context()
    slots, rows = contexts(kind, len(tokens))
    shape = (rows, SMALL.text_width) if images is None else (images, rows, SMALL.text_width)
    start = torch.randn(shape)
    tree = PromptTree(tokens, slots, chunk_tokens)
    results = []
    for model, encode in (
        (ours, lambda context: tree(ours, context, max_tokens)),
        (theirs, lambda context: naive(theirs, tokens, slots, context)),
    ):
        model.zero_grad()
        context = start.clone().requires_grad_()
        features = encode(context)
        weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
        (features * weights).sum().backward()
        grads = {n: grad for n, grad in gradients(model).items() if grad is not None}
        results.append({"features": features, "context": context.grad, **grads})
    result, oracle = results
    assert result.keys() == oracle.keys()
    assert {"token_embedding.weight", "positional_embedding", "text_projection"} < oracle.keys()
    errors = {name: far(result[name], oracle[name]) for name in oracle}
    assert not {name: error for name, error in errors.items() if error > CLOSE}


@pytest.mark.parametrize("max_tokens", [60, 100, 400])
def test_max_tokens_bounds_what_is_computed_at_once(ours, max_tokens):
    tokens = prompts_for_context()
    slots, rows = contexts("after the start", len(tokens))
    tree = PromptTree(tokens, slots)
    assert tree.longest < 60  # or one image alone would be more
    seen = []
    watch = ours.transformer.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[:2]))
    tree(ours, torch.zeros(17, rows, SMALL.text_width), max_tokens)
    watch.remove()
    assert sum(images * length for images, length in seen) == 17 * len(tree)
    assert max(images * length for images, length in seen) <= max_tokens


def test_dropout_drops_the_same_when_it_is_computed_again():
    """Else gradients would be those of other activations."""
    clip = CLIP(SMALL).train()
    clip.transformer.resblocks[0].register_forward_hook(lambda _, __, x: F.dropout(x, 0.5))
    tree, found = PromptTree(random_tokens(6, SMALL)), []
    for max_tokens in (None, 1):
        torch.manual_seed(0)
        clip.zero_grad()
        tree(clip, None, max_tokens).square().sum().backward()
        found.append(clip.transformer.resblocks[0].mlp.c_fc.weight.grad.clone())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_share_slots_share_nodes(kind):
    tokens = prompts_for_context()
    slots, _ = contexts(kind, len(tokens))
    tree = PromptTree(tokens, slots, ENDLESS)
    assert len(tree) == beginnings(tokens, slots)


@torch.no_grad()
def test_without_a_context_slots_keep_their_tokens_embeddings(theirs, ours):
    tokens = prompts_for_context()
    slots, _ = contexts("in the middle", len(tokens))
    assert far(PromptTree(tokens, slots)(ours), theirs.encode_text(tokens)) < CLOSE


@torch.no_grad()
def test_nothing_after_the_end_token_matters(ours):
    tokens = random_tokens(20, SMALL)
    after = torch.arange(CONTEXT) > tokens.argmax(-1, keepdim=True)
    noise = torch.randint(0, END + 1, tokens.shape)  # with more end tokens: the first one counts
    other = torch.where(after, noise, tokens)
    assert not torch.equal(tokens, other)
    assert torch.equal(ours.encode_text(tokens), ours.encode_text(other))
    assert torch.equal(
        ours.encode_text(tokens[:, : int(tokens.argmax(-1).max()) + 1]), ours.encode_text(tokens)
    )


@pytest.mark.parametrize("rows", [0, 3, 5])
def test_a_context_of_the_wrong_length_is_an_error_that_says_both(ours, rows):
    slots, _ = contexts("after the start", 0)
    tree = PromptTree(prompts_for_context(), slots)
    with pytest.raises(ValueError, match=f"{rows} rows.* 4"):
        tree(ours, torch.zeros(rows, SMALL.text_width))
    with pytest.raises(ValueError, match=f"{rows} rows.* 4"):
        tree(ours, torch.zeros(2, rows, SMALL.text_width))


def test_a_context_without_slots_is_an_error(ours):
    with pytest.raises(ValueError, match="2 rows.* 0"):
        PromptTree(prompts_for_context())(ours, torch.zeros(2, SMALL.text_width))


@pytest.mark.parametrize("shape", [(0, 77), (77,), (1, 2, 77)])
def test_tokens_that_are_not_a_table_of_prompts_are_an_error(shape):
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptTree(torch.ones(shape, dtype=torch.long))


def test_a_tree_adds_nothing_to_a_state_dict():
    assert PromptTree(random_tokens(40, SMALL)).state_dict() == {}
