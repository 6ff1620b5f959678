"""2SFS beside a plain second writing of it: openai-clip's own towers, two optimizers of torch."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_min import CLIP, CLIPConfig, UserError, normalize, tokenize
from fewshot import compare
from fewshot.batches import Batches
from fewshot.loop import descend, shuffled
from fewshot.pictures import Pictures, Reader
from fewshot.run import Run
from fewshot.schedule import Length
from methods.learned_names import rows
from methods.two_stage import TwoStage
from methods.zero_shot import ZeroShot
from tests.methods.published import openai_text_tower

NAMES = ["rose", "red tulip", "ox-eye daisy"]
TEMPLATE = "a photo of a {}."
LABELS = torch.tensor([0, 1, 2, 2, 0])
CONFIG = dict.fromkeys(
    ["method", "recipe", "settings", "experiment", "model", "fingerprint", "classnames"], "x"
)


@pytest.fixture
def clip() -> CLIP:
    """Tiny, with heads as wide as openai-clip has them; no gain is 1 and no bias 0."""
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(32, 32, 8, 64, 2, 1, 64, 2, 1)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return clip


def new(clip, recipe: str = "default", names=NAMES, **settings) -> TwoStage:
    kind = TwoStage.Settings
    return TwoStage(clip, names, TEMPLATE, kind(**{**TwoStage.recipes[recipe], **settings}))


class Published:
    """Farina et al.: theirs is openai-clip's model; `learned` what of it learns in stage 1."""

    def __init__(self, clip: CLIP, layer_norms: str):
        self.model = openai_text_tower(clip)
        self.learned = {}
        for name, module in self.model.named_modules():
            outside = name in ("ln_final", "visual.ln_pre", "visual.ln_post")
            if isinstance(module, nn.LayerNorm) and (layer_norms == "all" or not outside):
                for kind, parameter in module.named_parameters():
                    self.learned[f"clip.{name}.{kind}"] = parameter.requires_grad_()
        self.head = None

    def text(self, names=NAMES) -> Tensor:
        prompts = tokenize([TEMPLATE.format(name) for name in names])
        return F.normalize(self.model.encode_text(prompts), dim=-1)

    def logits(self, images: Tensor) -> Tensor:
        if self.head is None:
            rows, features = self.text(), self.model.encode_image(images)
        else:
            rows = self.head / self.head.norm(dim=1, keepdim=True)
            with torch.no_grad():
                features = self.model.encode_image(images)
        return self.model.logit_scale.exp() * F.normalize(features, dim=-1) @ rows.T

    def begin_stage_2(self) -> None:
        self.head = nn.Parameter(self.text().detach().clone())


def moved(method: TwoStage, theirs: Published, seed: int = 3) -> None:
    """Take the LayerNorms of both to the same place, away from where they start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.learned.items():
            shift = 0.2 * torch.randn(parameter.shape, generator=rng)
            parameter += shift
            method.adapter_state()[name].add_(shift)


@pytest.mark.parametrize("layer_norms", ["all", "blocks"])
@pytest.mark.parametrize("stage", [1, 2])
def test_logits_loss_and_gradients_are_those_of_the_second_writing(
    stage, layer_norms, clip, images
):
    method, theirs = new(clip, layer_norms=layer_norms), Published(clip, layer_norms)
    moved(method, theirs)
    if stage == 2:
        before = method(images)
        method.second_stage()
        theirs.begin_stage_2()
        torch.testing.assert_close(method(images), before)  # it starts at the class names
        with torch.no_grad():
            shift = 0.1 * torch.randn(theirs.head.shape, generator=torch.manual_seed(4))
            theirs.head += shift
            method.classifier += shift
    logits = theirs.logits(images)
    x = method.encode(images)
    assert x.shape == ((5, 3, 32, 32) if stage == 1 else (5, 32))
    torch.testing.assert_close(method.classify(x), logits, atol=1e-4, rtol=1e-4)
    expected, loss = F.cross_entropy(logits, LABELS), method.loss(x, LABELS)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    state = method.adapter_state()
    assert set(state) == {*theirs.learned, "classifier"}
    both = theirs.learned if stage == 1 else {"classifier": theirs.head}
    for name, tensor in both.items():
        difference = (state[name].grad - tensor.grad).abs().max()
        assert difference < 1e-4 * tensor.grad.abs().max(), name
    assert {name for name, t in state.items() if t.grad is not None} == set(both)


@pytest.fixture
def train() -> Batches:
    """Seven pictures, of which three are of one class."""
    pixels = torch.randint(0, 256, (7, 3, 32, 32), generator=torch.manual_seed(4)).byte()
    labels = torch.tensor([0, 1, 2, 2, 0, 1, 2])
    return Batches(Pictures(pixels, labels), pixels, Reader(32, folder=None))


def start(path) -> Run:
    return Run.start(path, CONFIG)


def test_the_paper_recipes_steps_end_where_those_of_two_plain_loops_end(clip, train, tmp_path):
    """3 shots · 5 steps, of which 9 are of the first stage; 4 pictures a step."""
    method = new(clip, "paper", augment="none", steps_per_shot=5, batch_size=4, lr=1e-2)
    begun = {n: t.detach().clone() for n, t in method.adapter_state().items()}
    method.fit(train, train, lambda *given: descend(*given, run=start(tmp_path / "run"), seed=1))

    theirs = Published(clip, "blocks")
    epochs = (shuffled(train, 4, 1, epoch) for epoch in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    for steps in (9, 6):
        learns = list(theirs.learned.values()) if theirs.head is None else [theirs.head]
        optimizer = torch.optim.AdamW(learns, lr=1e-2, weight_decay=1e-2)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
        for _, chosen in zip(range(steps), batches, strict=False):
            logits = theirs.logits(normalize(train.pixels[chosen]))
            optimizer.zero_grad()
            F.cross_entropy(logits, train.labels[chosen]).backward()
            optimizer.step()
            cosine.step()
        if theirs.head is None:
            theirs.begin_stage_2()
            begun["classifier"] = theirs.head.detach().clone()
    for name, tensor in {**theirs.learned, "classifier": theirs.head}.items():
        way = (tensor - begun[name]).abs().max()
        assert way > 1e-2
        assert (method.adapter_state()[name] - tensor).abs().max() < 2e-2 * way, name


def test_parameter_counts_are_the_published_ones():
    """ViT-B/16: 61,440 as the authors' code trains and 65,536 as it means to, and K·E."""
    clip = CLIP(CLIPConfig(512, 32, 16, 768, 12, 12, 512, 12, 8))
    for layer_norms, published in (("blocks", 61_440), ("all", 65_536)):
        method = new(clip, layer_norms=layer_norms)
        state = method.adapter_state()
        assert sum(p.numel() for p in state.values()) == published + len(NAMES) * 512
    assert TwoStage.recipes["paper"]["layer_norms"] == "blocks"


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("rounds", range(1, 5))  # of two steps; the stage ends in the third
@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_a_run_killed_before_in_or_after_the_switch_ends_in_the_same_bits(
    augment, rounds, clip, train, tmp_path, monkeypatch
):
    # 10 steps, 5 of the first stage
    s = {"epochs": 5, "batch_size": 4, "lr": 1e-2, "patience": 0, "keep": "last"}
    s |= {"first_stage": 0.5, "augment": augment, "min_steps": 0, "validations": 0}

    def run_on(run: Run, resume: bool) -> dict:
        torch.manual_seed(1)
        method = new(clip, **s)
        method.fit(train, train, lambda *given: descend(*given, run=run, seed=1, resume=resume))
        return method.adapter_state()

    whole = run_on(start(tmp_path / "whole"), resume=False)
    saved, real = [], Run.save_resume

    def save_then_die(run, *arguments):
        real(run, *arguments)
        saved.append(1)
        if len(saved) == rounds:
            raise Killed

    monkeypatch.setattr(Run, "save_resume", save_then_die)
    with pytest.raises(Killed):
        run_on(start(tmp_path / "killed"), resume=False)
    monkeypatch.undo()
    resumed = run_on(Run.resume(tmp_path / "killed", CONFIG), resume=True)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_in_stage_2_the_towers_stay_and_each_picture_is_encoded_once(
    clip, train, tmp_path, monkeypatch
):
    s = {"min_steps": 0, "batch_size": 4, "keep": "last", "validations": 0, "patience": 0}
    method, seen = new(clip, epochs=4, first_stage=0.5, **s), []
    method.clip.visual.register_forward_hook(lambda *_: seen.append(method.in_second))
    norms = {n: t for n, t in method.adapter_state().items() if n != "classifier"}
    at_switch, real = {}, method.second_stage

    def watched() -> None:
        at_switch.update({n: t.detach().clone() for n, t in norms.items()})
        real()

    monkeypatch.setattr(method, "second_stage", watched)
    run = start(tmp_path / "run")
    method.fit(train, train, lambda *given: descend(*given, run=run, seed=1))
    assert method.in_second
    assert all(torch.equal(t, norms[n]) for n, t in at_switch.items())
    assert sum(seen) == 2  # one picture, to see how large what is kept would be; and all at once
    assert len(seen) - sum(seen) == 4  # steps of stage 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_stage_may_be_all_there_is(share, clip, train, tmp_path):
    method = new(clip, epochs=2, min_steps=0, batch_size=4, first_stage=share, keep="last")
    text = F.normalize(method.text_features(), dim=-1)
    run = start(tmp_path / "run")
    method.fit(train, train, lambda *given: descend(*given, run=run, seed=1))
    norm = method.clip.ln_final.weight
    assert torch.equal(norm, clip.ln_final.weight) == (share == 0)
    if share == 1:
        assert not method.classifier.any()
    else:
        assert 0 < (method.classifier - text).abs().max() < 0.01


def trained(clip) -> TwoStage:
    """Somewhere in stage 2."""
    method = new(clip)
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in method.adapter_state().values():
            tensor += 0.2 * torch.randn_like(tensor)
    return method.eval()


def test_among_all_names_each_is_named_by_what_it_has(clip, images):
    """Learned ones by the classifier, others by the adapted text tower, in any order."""
    method = trained(clip)
    names = ["moon orchid", "ox-eye daisy", "rose", "fern"]
    tuned = openai_text_tower(method.clip)
    with torch.no_grad():
        text = tuned.encode_text(tokenize([TEMPLATE.format(name) for name in names]))
        rows = torch.stack([text[0], method.classifier[2], method.classifier[0], text[3]])
        features = F.normalize(tuned.encode_image(images), dim=-1)
        expected = clip.logit_scale.exp() * features @ F.normalize(rows, dim=-1).T
        found = method.for_classes(names)(images)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(method.for_classes(NAMES)(images), method(images))
    with torch.no_grad():
        method.classifier.zero_()  # as before stage 2
        plain = ZeroShot.plain(method.clip, names, TEMPLATE)(images)
        torch.testing.assert_close(method.for_classes(names)(images), plain)


def test_two_classes_of_one_name_have_a_row_each(clip):
    torch.manual_seed(6)
    method = new(clip, names=["crane", "rose", "crane"])
    nn.init.normal_(method.classifier)
    assert torch.equal(method.text_features(), method.classifier)
    assert rows(["crane", "crane", "crane"], method.learned_names).tolist() == [0, 2, -1]
    assert rows(["rose", "fern", "crane"], method.learned_names).tolist() == [1, -1, 0]


def test_another_start_is_of_the_layer_norms(clip):
    method = trained(clip)
    seen = []
    method.fit("train", "val", lambda *_: seen.append(method.in_second))
    assert seen == [False]
    assert not torch.equal(method.clip.ln_final.weight, clip.ln_final.weight)


@pytest.mark.parametrize(("grid", "trainings"), [("", 1), ("lr=1e-3,1e-4,1e-5 eps=1e-8,1e-7", 6)])
def test_how_long_training_takes_is_tried_in_each_stage(grid, trainings, clip, train, monkeypatch):
    """And with a grid, counted for each of its points."""
    method, now = new(clip, grid=grid), 0.0
    seconds = {False: 5.0, True: 2.0}  # of a gradient step in the first stage, in the second
    switch = Length.of(method.settings, train, method.first_stage).switch
    total = Length.of(method.settings, train).total

    def step(method, train, chosen, state, length, number):
        nonlocal now
        now += seconds[number >= length.switch]

    monkeypatch.setattr(compare, "gradient_step", step)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: now)
    monkeypatch.setattr(compare, "validation_seconds", lambda *_: 0.0)
    found = compare.seconds_of(method, SimpleNamespace(train=train, val=train, tests={}))
    assert 0 < switch < total
    assert found == trainings * (switch * 5 + (total - switch) * 2)


def test_a_share_that_is_none_is_an_error_that_names_its_flag():
    with pytest.raises(UserError, match=r"--first-stage 1\.5: expected 0 to 1"):
        TwoStage.Settings(first_stage=1.5)
