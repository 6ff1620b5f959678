"""Every method keeps to its CLIP's device, tried on a GPU that is only pretended.

Fake tensors have shapes and devices but no values, so they need no GPU; like real ones, they refuse
an operation on tensors of two devices.
"""

import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from clip_min import CLIP, CLIPConfig
from methods import METHODS

GPU = torch.device("cuda")
NAMES = ["rose", "red tulip", "ox-eye daisy"]
OPTIONS = [
    *((name, {}) for name in METHODS),
    ("zero_shot", {"templates": "a {}|the {}"}),
    ("clip_adapter", {"adapters": "both", "learn_ratio": True}),
    ("projection", {"objective": "contrastive", "tower_lr": 1e-5}),
    ("projection", {"head": "attention"}),
    ("coop", {"class_specific": True, "position": "middle"}),
    ("cocoop", {"max_tokens": 30}),
    ("vpt", {"head": "linear", "deep": True}),
    ("lora", {"parts": "qkvo"}),
    ("finetune", {"objective": "contrastive", "plain_pairs": True}),
]


@pytest.fixture
def pretended(monkeypatch):
    """Inside, tensors have no values; prompts, whose values decide shapes, are made outside."""

    def apply(module, change, recurse=True):  # torch's own cannot replace fake parameters
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is None:  # a layer without a bias
                        continue
                    new = change(tensor.detach())
                    learn = tensor.requires_grad
                    table[name] = nn.Parameter(new, learn) if table is part._parameters else new
        return module

    def outside(make):
        @functools.wraps(make)
        def call(*args):
            with unset_fake_temporarily():
                return make(*args)

        return call

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    monkeypatch.setattr(nn.Module, "_apply", apply)
    for kind in {kind for method in METHODS.values() for kind in method.__mro__}:
        if "prompt_tree" in vars(kind):
            monkeypatch.setattr(kind, "prompt_tree", outside(kind.prompt_tree))
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        try:
            torch.empty(2, device=GPU).uniform_()
        except RuntimeError:
            pytest.skip("torch 2.6 asks a real GPU for random numbers")
        yield


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_all_that_a_method_computes_is_on_its_clips_device(name, options, pretended, monkeypatch):
    if name == "two_stage":  # whose values tell in which stage it is, and these have none
        monkeypatch.setattr(METHODS[name], "in_second", False)
    if hasattr(METHODS[name].Settings, "ctx_init"):
        options = options | {"ctx_init": ""}  # words, too, decide shapes
    with GPU:
        clip = CLIP(CLIPConfig(32, 32, 8, 64, 2, 2, 64, 2, 2))
        images, features = torch.rand(4, 3, 32, 32), torch.rand(4, 32)
        labels, synthetic = torch.randint(3, (4,)), torch.rand(4) > 0.5
    method = METHODS[name](clip, NAMES, "a photo of a {}.", METHODS[name].Settings(**options))
    if hasattr(method, "support"):
        method.support.data, method.support_labels.data = features, labels
    assert {tensor.device.type for tensor in method.adapter_state().values()} <= {"cuda"}
    x = method.encode(images)
    outputs = [method(images), method.classify(x)]
    if not method.transductive:
        outputs.append(method.loss(x, labels))
    if name.startswith("disef"):
        outputs.append(method.loss(x, labels, synthetic))
    if method.names_unseen:
        other = method.for_classes(["rose", "cat"])
        with other.inference():
            outputs.append(other(images))
    assert {output.device.type for output in outputs} == {"cuda"}
