"""Projection's attention head and learning towers, beside openai-clip and torch's own attention."""

from dataclasses import replace

import clip as openai_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_min import CLIP, CLIPConfig, UserError, normalize
from fewshot.batches import Batches
from fewshot.loop import descend
from fewshot.pictures import Pictures, Reader
from fewshot.run import Run
from methods.projection import Projection, ProjectionSettings
from methods.wise_ft import keep_share
from methods.zero_shot import ZeroShot
from tests.methods.published import openai_text_tower

NAMES = ["rose", "red tulip", "ox-eye daisy, which has a long name"]
TEMPLATE = "a photo of a {}."
LABELS = torch.tensor([0, 1, 2, 2, 0])
WAYS = [
    {"head": "attention"},
    {"head": "attention", "tower_lr": 0.003},
    {"head": "square", "tower_lr": 0.003},
]


@pytest.fixture
def clip() -> CLIP:
    """Tiny, with heads as wide as openai-clip has them, two in the image tower."""
    torch.manual_seed(0)
    return CLIP(CLIPConfig(32, 32, 8, 128, 2, 2, 64, 2, 1)).eval()


def new(clip, trained: bool = True, **settings) -> Projection:
    torch.manual_seed(2)
    settings = {"lr": 0.01, "optimizer": "sgd", "weight_decay": 0.0} | settings
    method = Projection(clip, NAMES, TEMPLATE, ProjectionSettings(**settings))
    with torch.no_grad():
        for name, tensor in method.adapter_state().items() if trained else ():
            inside = ".resblocks.2." not in name and "layers" not in name  # of CLIP itself
            tensor += (0.01 if inside else 0.1) * torch.randn_like(tensor)
    return method


class Plain(nn.Module):
    """The same from the same tensors: every prompt of 77 tokens, every token of the last block."""

    def __init__(self, ours: Projection):
        super().__init__()
        self.clip, self.square = openai_text_tower(ours.lent[0]), ours.settings.head == "square"
        mine = {n: t.detach().clone() for n, t in ours.adapter_state().items()}
        inside = {n.removeprefix("clip."): t for n, t in mine.items() if ".resblocks.2." not in n}
        inside = {n.replace("in_proj.", "in_proj_"): t for n, t in inside.items()}
        inside = {n: t for n, t in inside.items() if "layers" not in n}
        self.clip.load_state_dict(inside, strict=False)
        for name, weight in self.clip.named_parameters():
            weight.requires_grad_(name in inside)
        self.heads = nn.ModuleDict()
        sides = {"image": ("clip.visual.", 128, 2), "text": ("clip.", 64, 1)}
        for side, (path, width, heads) in sides.items():
            if self.square:
                head = nn.Sequential(nn.Linear(32, 32), nn.Identity(), nn.Linear(32, 32))
                start = f"{side}_layers."
            else:
                attn = nn.MultiheadAttention(width, heads, batch_first=True)
                head = nn.ModuleDict({"ln": nn.LayerNorm(width), "attn": attn})
                start = f"{path}transformer.resblocks.2."
            state = {n.removeprefix(start): t for n, t in mine.items() if n.startswith(start)}
            head.load_state_dict({n.replace("in_proj.", "in_proj_"): t for n, t in state.items()})
            self.heads[side] = head
        texts = [TEMPLATE.format(name) for name in ours.classnames]
        self.tokens = openai_clip.tokenize(texts).long()

    def gather(self, side: str, x: Tensor, mask=None) -> Tensor:
        if self.square:
            return x
        y = self.heads[side]["ln"](x)
        return x + self.heads[side]["attn"](y, y, y, attn_mask=mask, need_weights=False)[0]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        c, tower = self.clip, self.clip.visual
        x = tower.conv1(images).flatten(2).permute(0, 2, 1)
        x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = tower.ln_pre(x + tower.positional_embedding)
        x = tower.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)  # (B, T, D)
        image = tower.ln_post(self.gather("image", x)[:, 0]) @ tower.proj
        x = c.token_embedding(self.tokens) + c.positional_embedding
        x = c.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)  # (K, 77, D)
        x = c.ln_final(self.gather("text", x, torch.full((77, 77), -torch.inf).triu(1)))
        text = x[torch.arange(len(x)), self.tokens.argmax(dim=1)] @ c.text_projection
        if self.square:
            image = self.heads["image"](F.normalize(image, dim=-1))
            text = self.heads["text"](F.normalize(text, dim=-1))
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def logits(self, images: Tensor) -> Tensor:
        image, text = self(images)
        return self.clip.logit_scale.exp() * image @ text.T

    def named(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """These, of ours, under the names they have here."""
        renamed = {}
        for name, tensor in tensors.items():
            name = name.replace("in_proj.", "in_proj_").replace("_layers.", ".")
            side = "image" if name.startswith(("clip.visual", "image")) else "text"
            _, marked, rest = name.partition(".resblocks.2.")
            if marked:
                name = f"{side}.{rest}"
            renamed[name if name.startswith("clip.") else f"heads.{name}"] = tensor
        return renamed


def same(found: dict[str, Tensor], expected: dict[str, Tensor], scale: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=1e-4 * scale, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("objective", ["class", "contrastive"])
@pytest.mark.parametrize("way", WAYS)
def test_logits_loss_and_gradients_are_those_of_the_second_writing(way, objective, clip, images):
    method = new(clip, **way, objective=objective, plain_pairs=True)
    plain, x = Plain(method), method.encode(images)
    assert x.shape == ((5, 3, 32, 32) if "tower_lr" in way else (5, 17, 128))
    logits = plain.logits(images)
    torch.testing.assert_close(method.classify(x), logits, atol=1e-4, rtol=1e-4)
    expected = F.cross_entropy(logits, LABELS)
    if objective == "contrastive":
        image, text = plain(images)
        pairs = plain.clip.logit_scale.exp() * image @ text[LABELS].T
        own = torch.arange(5)
        expected = (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.T, own)) / 2
    loss = method.loss(x, LABELS)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    loss.backward()
    expected.backward()
    found = plain.named({n: p.grad for n, p in method.named_parameters() if p.requires_grad})
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    same(found, theirs, scale=max(g.abs().max().item() for g in theirs.values()))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_sgds_at_two_rates(way, clip, tmp_path):
    """The head at --lr, the towers at --tower-lr; the lent CLIP stays as it is."""
    pixels = torch.randint(0, 256, (5, 3, 32, 32), generator=torch.manual_seed(4)).byte()
    train = Batches(Pictures(pixels, LABELS), pixels, Reader(32, folder=None))
    method = new(clip, **way, epochs=1, keep="last", patience=0)
    lent = {n: p.detach().clone() for n, p in clip.named_parameters()}
    before = {n: p.detach().clone() for n, p in method.adapter_state().items()}
    plain = Plain(method)
    towers = [p for n, p in plain.clip.named_parameters() if p.requires_grad]
    groups = [{"params": list(plain.heads.parameters())}, {"params": towers, "lr": 0.003}]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=0.01, momentum=0.9)
    F.cross_entropy(plain.logits(normalize(pixels)), LABELS).backward()
    optimizer.step()

    config = ["method", "recipe", "settings", "experiment", "model", "fingerprint", "classnames"]
    run = Run.start(tmp_path / "run", dict.fromkeys(config, "x"))
    descend(method, train, train, run=run, seed=1)
    moved = {n: p.detach() - before[n] for n, p in method.adapter_state().items()}
    start = plain.named(before)
    theirs = {n: p.detach() - start[n] for n, p in plain.named_parameters() if n in start}
    same(plain.named(moved), theirs, scale=max(m.abs().max().item() for m in theirs.values()))
    assert all(torch.equal(p, lent[n]) for n, p in clip.named_parameters())


@pytest.mark.parametrize("way", WAYS)
def test_training_starts_at_zero_shot(way, clip, images):
    zero_shot = ZeroShot.plain(clip, NAMES, TEMPLATE)(images)
    torch.testing.assert_close(new(clip, trained=False, **way)(images), zero_shot)
    assert not torch.allclose(new(clip, **way)(images), zero_shot, atol=1e-2)


def test_what_learns_is_what_is_said(clip):
    heads = {"ln.weight", "ln.bias"}
    heads |= {f"attn.{p}_proj.{kind}" for p in ("in", "out") for kind in ("weight", "bias")}
    towers = ("clip.visual.transformer", "clip.transformer")
    attention = {f"{tower}.resblocks.2.{name}" for tower in towers for name in heads}
    own = {f"clip.{name}" for name, _ in clip.named_parameters() if name != "logit_scale"}
    frozen, learning = new(clip, head="attention"), new(clip, head="attention", tower_lr=0.1)
    assert set(frozen.adapter_state()) == attention
    assert set(learning.adapter_state()) == attention | own
    assert set(learning.lr_factors) == own
    assert set(learning.lr_factors.values()) == {10.0}
    assert new(clip).lr_factors == {}
    learning.settings = replace(learning.settings, lr=0.02)  # as a grid does
    assert set(learning.lr_factors.values()) == {5.0}
    assert len(clip.transformer.resblocks) == 2  # the lent one's


def test_a_rate_of_the_towers_without_one_of_the_head_is_an_error():
    with pytest.raises(UserError, match="--tower-lr 0.1: needs --lr above 0"):
        ProjectionSettings(lr=0.0, tower_lr=0.1)
    with pytest.raises(UserError, match="--tower-lr -1: expected 0 or more"):
        ProjectionSettings(tower_lr=-1)
    with pytest.raises(UserError, match="--activation relu: only works with --head square"):
        ProjectionSettings(head="attention", activation="relu")


@pytest.mark.parametrize("way", WAYS)
def test_of_nothing_kept_it_is_zero_shot_and_of_all_what_was_learned(way, clip, images):
    zero_shot, method = ZeroShot.plain(clip, NAMES, TEMPLATE)(images), new(clip, **way)
    state, logits = {n: t.clone() for n, t in method.adapter_state().items()}, method(images)
    for share, expected in ((0.0, zero_shot), (1.0, logits)):
        method.load_adapter(keep_share(method, state, share))
        torch.testing.assert_close(method(images), expected, atol=1e-4, rtol=1e-4)
