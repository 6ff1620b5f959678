"""bf16 and fp16 compute the same thing, less exactly; what is learned stays float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clip_min import CLIP, CLIPConfig, UserError
from fewshot.batches import Batches
from fewshot.experiment import Experiment
from fewshot.loop import descend
from fewshot.metrics import predict
from fewshot.pictures import Pictures, Reader
from fewshot.run import Run
from methods import METHODS, TrainingSettings

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
KEYS = ("method", "recipe", "settings", "experiment", "model", "fingerprint", "classnames")
CONFIG = dict.fromkeys(KEYS, "toy")
CPU = torch.device("cpu")


# What a method adds to its logits only where it is asked for, with what it has remembered.
ADDED = [
    ("tip_adapter", {"alpha": 2.0, "beta": 5.0}),
    ("tip_adapter_f", {"alpha": 2.0, "beta": 5.0}),
    ("gda", {"alpha": 0.01}),
    ("coop", {"depth_head": True}),
]
CASES = [*((name, {}) for name in METHODS), *ADDED, ("vpt", {"head": "linear"})]
each_case = pytest.mark.parametrize(
    ("name", "changes"), CASES, ids=["-".join([name, *changes]) for name, changes in CASES]
)


def batches(count: int, seed: int, precision: str = "fp32", folder=None) -> Batches:
    """Noise, brighter the larger the label, of 3."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 100, (count, 3, 32, 32), generator=rng)
    pixels = (noise + 70 * labels[:, None, None, None]).to(torch.uint8)
    return Batches(Pictures(pixels, labels), pixels, Reader(32, folder=folder, precision=precision))


def new_method(name: str, **changes):
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(32, 32, 8, 64, 2, 2, 64, 2, 2)).eval()
    kind = METHODS[name]
    if issubclass(kind.Settings, TrainingSettings):
        changes = {"lr": 0.01, "epochs": 2, "batch_size": 4, "patience": 0} | changes
    if name == "lora":
        changes = {"image_rank": 4, "text_rank": 3, "dropout": 0.0} | changes
    settings = kind.Settings(**changes)
    method = kind(clip, ["rose", "red tulip", "ox-eye daisy"], "a photo of a {}.", settings)
    if name == "linear_probe":  # it starts at 0, in any precision
        nn.init.normal_(method.head.weight)
    if "alpha" in changes:  # the weight of what is remembered
        method.remember(batches(6, 3))
    return method


def trained(path, name: str, precision: str, resume: bool = False, **changes):
    method = new_method(name, **changes)
    run = Run.resume(path, CONFIG) if resume else Run.start(path, CONFIG)
    method.fit(
        batches(14, 1, precision),
        batches(9, 2, precision),
        lambda *given: descend(*given, run, seed=1, resume=resume),
    )
    return method, run


def weights(method) -> torch.Tensor:
    """All that was learned, in one row."""
    return torch.cat([p.detach().flatten() for p in method.adapter_state().values()])


def moved(method, name: str, **changes) -> torch.Tensor:
    return weights(method) - weights(new_method(name, **changes))


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", ["coop", "cocoop", "lora"])
def test_the_forward_pass_is_16_bits_and_all_that_is_kept_is_32(name, precision, tmp_path):
    found = []

    def watch(module, inputs, output):
        found.append(output.dtype)

    method = new_method(name)
    method.clip.transformer.resblocks[0].mlp.c_fc.register_forward_hook(watch)
    run = Run.start(tmp_path / "run", CONFIG)
    descend(method, batches(14, 1, precision), batches(9, 2, precision), run, seed=1)
    assert set(found) == {HALVES[precision]}
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    tensors, at = run.load_resume({})
    kinds = {n: t.dtype for n, t in tensors.items() if not n.startswith("random/")}
    assert set(kinds.values()) == {torch.float32}
    assert any(name.startswith("optimizer/") for name in kinds)
    assert ("scaler" in at) == (precision == "fp16")
    assert weights(method).isfinite().all()
    assert not at["stopped"]


@pytest.mark.parametrize("clip_norm", [0.0, 0.01])
@pytest.mark.parametrize("precision", HALVES)
def test_a_step_is_that_of_fp32_to_the_precision_given(precision, clip_norm, tmp_path):
    """SGD, whose steps are as large as its gradients: a scale left in them would show."""
    changes = {"optimizer": "sgd", "clip_norm": clip_norm, "epochs": 1, "batch_size": 14}
    full, _ = trained(tmp_path / "full", "lora", "fp32", **changes)
    half, _ = trained(tmp_path / "half", "lora", precision, **changes)
    expected, found = moved(full, "lora", **changes), moved(half, "lora", **changes)
    assert expected.norm() > 0
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert not torch.equal(found, expected)


def test_fp16_skips_steps_that_overflow_and_goes_on_after_a_kill_where_it_was(
    tmp_path, monkeypatch
):
    """A scale so large that only lowering it, step by step, makes gradients finite."""
    new = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: new(device, 2.0**40, enabled=enabled)
    )
    short, long = {"epochs": 1}, {"epochs": 8}
    method, run = trained(tmp_path / "short", "lora", "fp16", **short)
    assert torch.equal(weights(method), weights(new_method("lora")))  # all skipped
    assert run.load_resume({})[1]["scaler"]["scale"] == 2.0**36  # 4 steps, each halving it
    whole, run = trained(tmp_path / "whole", "lora", "fp16", **long)
    assert run.load_resume({})[1]["scaler"]["scale"] < 2.0**36
    assert not torch.equal(weights(whole), weights(new_method("lora")))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        log = Run.log_round
        patch.setattr(Run, "log_round", lambda run, e: die() if e["epoch"] == 6 else log(run, e))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed", "lora", "fp16", **long)
    resumed, run = trained(tmp_path / "killed", "lora", "fp16", resume=True, **long)
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("precision", HALVES)
@each_case
def test_logits_are_float32_and_near_those_of_fp32(name, changes, precision):
    method = new_method(name, **changes)
    full, half = batches(9, 2), batches(9, 2, precision)
    expected, found = predict(method, full), predict(method, half)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)  # so it did run in 16 bits
    assert (found - expected).abs().max() < 0.2  # of logits up to 14
    with half.autocast():
        assert method.classify(half.inputs(method, torch.arange(9))).dtype == torch.float32


@pytest.mark.parametrize(("name", "changes"), [*ADDED, ("linear_probe", {})])
def test_what_is_added_to_logits_is_exact_under_autocast(name, changes):
    """Of the same features: in 16 bits, near images would have equal distances."""
    method = new_method(name, **changes)
    x = batches(9, 2).encoded(method)
    with method.inference():  # the text features of both are one
        expected = method.classify(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = method.classify(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    plain = new_method("zero_shot").classify(x)
    assert (expected - plain).abs().max() > 0.1  # something was added


def test_logits_are_the_exact_product_of_the_features_under_autocast():
    """Rounded to 8 bits, classes that differ by 0.1 % would tie."""
    clip = CLIP(CLIPConfig(32, 32, 8, 64, 1, 1, 64, 1, 1))
    images, text = torch.randn(4, 32), torch.randn(1, 32) + 1e-3 * torch.randn(50, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for rows in (text, text.expand(4, 50, 32)):
            found = clip.logits(images, rows)
            expected = clip.logit_scale.exp() * F.cosine_similarity(
                images[:, None], text[None], dim=-1
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_features_are_kept_apart_by_precision(tmp_path):
    method = new_method("zero_shot")
    found = {p: batches(5, 1, p, tmp_path).encoded(method) for p in ("fp32", "bf16", "fp16")}
    assert {f.dtype for f in found.values()} == {torch.float32}
    assert len(list((tmp_path / "features").iterdir())) == 3
    again = {p: batches(5, 1, p, tmp_path).encoded(method) for p in found}
    assert all(torch.equal(found[p], again[p]) for p in found)
    assert not torch.equal(found["fp32"], found["bf16"])
    assert not torch.equal(found["bf16"], found["fp16"])


def test_fp32_is_no_autocast():
    layer = nn.Linear(3, 3)
    with batches(2, 1).autocast():
        assert not torch.is_autocast_enabled("cpu")
        assert layer(torch.ones(3)).dtype == torch.float32


def test_fp16_on_a_cpu_is_told_to_be_slow(tmp_path):
    settings = {"dataset": "demo", "shots": 1, "device": "cpu"}
    assert Experiment(**settings).precision == "fp32"
    _, task = Experiment(**settings, precision="fp16").load(tmp_path)
    assert any("fp16 is very slow on a CPU" in note for note in task.notes)
    assert task.train.precision == task.tests["novel"].batches.precision == "fp16"
    _, task = Experiment(**settings, precision="bf16").load(tmp_path)
    assert task.notes == []


# ------------------------------------------------------------------ a CLIP that itself is 16 bits


@pytest.mark.parametrize("dtype", HALVES.values())
@each_case
def test_every_method_works_on_a_clip_loaded_in_16_bits(name, changes, dtype, tmp_path):
    from clip_min import load, save

    full = new_method(name, **changes)
    save(new_method("zero_shot").clip, tmp_path / "clip.safetensors")
    clip = load(tmp_path / "clip.safetensors", dtype=dtype)
    torch.manual_seed(0)
    method = METHODS[name](clip, full.classnames, "a photo of a {}.", full.settings)
    if full.adapter_state():
        method.load_adapter(full.adapter_state())
    train = batches(6, 1)
    x, labels = train.inputs(method, torch.arange(6)), train.labels
    expected = predict(full, batches(6, 1))
    assert (predict(method, train) - expected).abs().max() < 0.3
    numbers = [t for t in method.adapter_state().values() if t.is_floating_point()]
    assert all(tensor.dtype == torch.float32 for tensor in numbers)
    if any(tensor.requires_grad for tensor in numbers):
        method.loss(x, labels).backward()
        gradients = [tensor.grad for tensor in numbers if tensor.grad is not None]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_an_unknown_precision_is_refused():
    from fewshot.flags import Parser, add_flags

    parser = Parser()
    add_flags(parser.add_argument_group("experiment"), Experiment)
    with pytest.raises(UserError, match="precision.*fp32.*bf16.*fp16"):
        parser.parse(["--precision", "fp8"])
