"""LoRA goes to PEFT and comes back, and comes from loralib's and CLIP-LoRA's files.

Each library computes with its own file; ours must compute the same.
"""

import json
import math
from dataclasses import asdict

import loralib
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from clip_min import UserError, formats, tokenize, weights
from clip_min.files import write_safetensors
from fewshot.batches import Batches
from fewshot.pictures import Pictures, Reader
from methods import METHODS
from methods.interop.clip_lora import _clip_lora_places
from methods.interop.init_from import load_into
from methods.interop.peft import to_peft
from methods.lora import LoRA, LoRASettings

NAMES = ["rose", "red tulip", "ox-eye daisy"]
TEMPLATE = "a photo of a {}."
SMALL = {"image_rank": 4, "image_alpha": 6.0, "text_rank": 3, "text_alpha": 2.0}
SETTINGS = {
    "q and v": {},
    "all four, sqrt": {"parts": "qkvo", "scaling": "sqrt"},
    "the output's": {"parts": "o"},
    "k in one block": {"parts": "k", "blocks": "1"},
    "image tower": {"towers": "image"},
    "text tower": {"towers": "text", "parts": "vo"},
    "equal ranks": {"text_rank": 4, "text_alpha": 6.0},
}


def new_lora(clip, trained: bool = False, **settings) -> LoRA:
    """LoRA on `clip`; `trained`: with random tensors in place of the zeros it starts from."""
    lora = LoRA(clip, NAMES, TEMPLATE, LoRASettings(**SMALL | settings)).eval()
    if trained:
        for tensor in lora.adapter_state().values():
            nn.init.normal_(tensor, std=0.1)
    return lora


def write_peft(lora: LoRA, folder) -> None:
    tensors, config = to_peft(lora)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.fixture
def hugging_face(new_clip, tmp_path):
    """() -> the CLIP of `new_clip`, in transformers."""
    import transformers

    formats.save_hugging_face(new_clip(), tmp_path / "base")
    return lambda: transformers.CLIPModel.from_pretrained(tmp_path / "base").eval()


@torch.no_grad()
def their_logits(model, images):
    tokens = tokenize([TEMPLATE.format(name) for name in NAMES])
    return model(pixel_values=images, input_ids=tokens).logits_per_image


# --------------------------------------------------------------------------------------------- peft


@pytest.mark.parametrize("settings", SETTINGS)
def test_peft_applies_it_with_our_logits_and_it_comes_back(
    settings, new_clip, hugging_face, images, tmp_path
):
    import peft

    lora = new_lora(new_clip(), trained=True, **SETTINGS[settings])
    write_peft(lora, tmp_path)
    base = hugging_face()
    plain = their_logits(base, images)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        expected = lora(images)
    torch.testing.assert_close(their_logits(theirs, images), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(expected, plain, atol=0.01)  # it did something

    back = new_lora(new_clip(), **SETTINGS[settings])
    load_into(back, tmp_path)
    assert equal(back.adapter_state(), lora.adapter_state())


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_made_and_saved_is_read(
    rslora, new_clip, hugging_face, images, tmp_path
):
    """With its own ways to name modules, and to give a tower its own rank and α."""
    import peft

    config = peft.LoraConfig(
        r=3,
        lora_alpha=2,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"vision_model\..*": 4},
        alpha_pattern={r"vision_model\..*": 6},
        use_rslora=rslora,
    )
    theirs = peft.get_peft_model(hugging_face(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    lora = new_lora(new_clip(), scaling="sqrt" if rslora else "rank")
    load_into(lora, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(lora(images), their_logits(theirs, images), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("there", "here", "flags"),
    [
        ({"image_alpha": 1.0}, {}, "--image-alpha 1.0"),
        ({"image_rank": 2, "text_rank": 5}, {}, "--image-rank 2 --text-rank 5"),
        ({"parts": "qk"}, {}, "--parts qk"),
        ({"blocks": "1"}, {}, "--blocks 1"),
        ({"towers": "text"}, {}, "--towers text"),
        ({"scaling": "sqrt"}, {"text_alpha": 9.0}, "--text-alpha 2.0 --scaling sqrt"),
    ],
)
def test_other_settings_are_one_line_with_the_flags_to_give(there, here, flags, new_clip, tmp_path):
    write_peft(new_lora(new_clip(), trained=True, **there), tmp_path)
    with pytest.raises(UserError) as error:
        load_into(new_lora(new_clip(), **here), tmp_path)
    assert str(error.value).startswith(f"--init-from {tmp_path}: ")
    assert str(error.value).endswith(f"give {flags}")


@pytest.mark.parametrize("written", ["qv", "vq"])
def test_settings_written_otherwise_but_meaning_the_same_fit(written, new_clip, tmp_path):
    write_peft(new_lora(new_clip(), trained=True), tmp_path)
    load_into(new_lora(new_clip(), parts=written, blocks="0-1"), tmp_path)


def test_towers_may_learn_in_different_blocks(new_clip, tmp_path):
    there = new_lora(new_clip(), trained=True, blocks="1/all")
    assert len(there.adapter_state()) == 2 * (1 + 2)
    write_peft(there, tmp_path)
    lora = new_lora(new_clip(), blocks="1/0-1")
    load_into(lora, tmp_path)
    assert equal(lora.adapter_state(), there.adapter_state())


def drop(text):
    return lambda tensors, config: [tensors.pop(n) for n in list(tensors) if text in n]


def put(name, size=(4, 64)):
    return lambda tensors, config: tensors.update({name: torch.zeros(size)})


LAYER = "base_model.model.vision_model.encoder.layers.1"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (put(f"{LAYER}.mlp.fc1.lora_A.weight"), "mlp.fc1.lora_A.weight is not a LoRA tensor of an"),
        (put(f"{LAYER}.self_attn.q_proj.lora_magnitude_vector"), "lora_magnitude_vector is no"),
        (drop("layers.1.self_attn.q_proj.lora_B"), "has only one of lora_A and lora_B"),
        (drop("vision_model.encoder.layers.1.self_attn.v_proj"), "block 1 of the image tower has"),
        (drop("text_model.encoder.layers.0"), "give --blocks all/1"),
        (put(f"{LAYER}.self_attn.q_proj.lora_A.weight", (2, 64)), "image tower has ranks [2, 4]"),
        (
            put(f"{LAYER}.self_attn.q_proj.lora_A.weight", (4, 7)),
            "block 1, image tower, differ in shape",
        ),
        (lambda tensors, config: tensors.clear(), "holds no corrections"),
        (lambda tensors, config: config.update(peft_type="LOHA"), "LOHA, expected LORA"),
        (lambda tensors, config: config.update(init_lora_weights="pissa"), "initialised by pissa"),
        (
            lambda tensors, config: config.update(alpha_pattern={r".*layers\.1\..*": 9}),
            "tower has no single lora_alpha",
        ),
        (lambda tensors, config: config.pop("lora_alpha"), "tower has no single lora_alpha"),
    ],
)
def test_a_peft_adapter_that_does_not_fit_is_one_line(spoil, said, new_clip, tmp_path):
    tensors, config = to_peft(new_lora(new_clip(), trained=True, text_rank=4, text_alpha=6.0))
    spoil(tensors, config)
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora = new_lora(new_clip(), text_rank=4, text_alpha=6.0)
    before = {name: tensor.clone() for name, tensor in lora.adapter_state().items()}
    with pytest.raises(UserError) as error:
        load_into(lora, tmp_path)
    assert said in str(error.value)
    assert str(error.value).startswith(f"--init-from {tmp_path}: ")
    assert str(error.value).isprintable()
    assert equal(lora.adapter_state(), before)


def test_what_is_no_lora_is_no_peft_adapter(new_clip):
    coop = METHODS["coop"](new_clip(), NAMES, TEMPLATE, METHODS["coop"].Settings())
    with pytest.raises(UserError, match="needs a LoRA, and CoOp is none"):
        to_peft(coop)


# ------------------------------------------------------------------------------------------ loralib


class TheirAttention(nn.Module):
    """DISEF's way to put loralib into CLIP, reduced to its projection."""

    def __init__(self, attention, rank: int, alpha: float, name: str):
        super().__init__()
        base = attention.in_proj
        layer = loralib.MergedLinear(
            base.in_features, base.out_features, rank, alpha, enable_lora=[True, False, True]
        )
        layer.load_state_dict(base.state_dict(), strict=False)
        nn.init.normal_(layer.lora_B)
        self.name, self.heads, self.out_proj = name, attention.heads, attention.out_proj
        self.add_module(name, layer)

    def forward(self, x, mask=None, read=None):
        q, k, v = getattr(self, self.name)(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.out_proj(y if read is None else y[:, read])


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize(("name", "prefix"), [("in_proj", ""), ("qkv", "module.clip_model.")])
def test_loralibs_tensors_compute_what_they_computed_there(
    name, prefix, ending, new_clip, images, tmp_path
):
    theirs = new_clip()
    for tower, rank, alpha in (
        (theirs.visual.transformer, 4, 6.0),
        (theirs.transformer, 3, 2.0),
    ):
        for block in tower.resblocks:
            block.attn = TheirAttention(block.attn, rank, alpha, name)
    saved = {prefix + n: t for n, t in loralib.lora_state_dict(theirs).items()}
    path = tmp_path / f"lora.{ending}"
    (torch.save if ending == "pt" else save_file)(saved, path)
    lora = new_lora(new_clip())
    load_into(lora, path)
    tokens = tokenize([TEMPLATE.format(n) for n in NAMES])
    with torch.no_grad():
        torch.testing.assert_close(lora(images), theirs(images, tokens), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------- CLIP-LoRA


def clip_lora_file(path, depths, position="all", encoder="both", params="qkv", width=64, r=2):
    """A file as github.com/MaxZanella/CLIP-LoRA saves it; -> its content."""
    count = sum(depths)
    part = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
    weights = {
        f"layer_{i}": {
            part[p]: {"w_lora_A": torch.randn(r, width), "w_lora_B": torch.randn(width, r)}
            for p in params
        }
        for i in range(count)
    }
    metadata = {"r": r, "alpha": 1, "encoder": encoder, "params": list(params)}
    content = {"weights": weights, "metadata": metadata | {"position": position}}
    torch.save(content, path)
    return content


PAPER = {"image_rank": 2, "text_rank": 2, "image_alpha": 1.0, "text_alpha": 1.0}
PAPER |= {"parts": "qkv", "scaling": "sqrt"}


@pytest.mark.parametrize("params", ["qkv", "qo"])
@pytest.mark.parametrize("encoder", ["both", "text", "vision"])
def test_clip_loras_file_adds_root_scaled_products_text_tower_first(
    encoder, params, new_clip, tmp_path
):
    """Against the merged weights, summed by hand from the file."""
    depths = {"both": [2, 2], "text": [2], "vision": [2]}[encoder]
    content = clip_lora_file(tmp_path / "lora.pt", depths, encoder=encoder, params=params)
    towers = {"both": "both", "text": "text", "vision": "image"}[encoder]
    lora = new_lora(new_clip(), **PAPER | {"parts": params, "towers": towers})
    load_into(lora, tmp_path / "lora.pt")
    plain, i = new_clip(), 0
    for tower in ["text", "image"] if encoder == "both" else [towers]:
        for block in range(2):
            path = "transformer" if tower == "text" else "visual.transformer"
            mine = lora.clip.get_submodule(f"{path}.resblocks.{block}.attn")
            base = plain.get_submodule(f"{path}.resblocks.{block}.attn")
            for name, pair in content["weights"][f"layer_{i}"].items():
                delta = 1 / math.sqrt(2) * pair["w_lora_B"] @ pair["w_lora_A"]
                if name == "proj":
                    base.out_proj.weight.data += delta
                else:
                    base.in_proj.weight.data["qkv".index(name[0]) * 64 :][:64] += delta
            for projection in ("in_proj", "out_proj"):
                layer, expected = getattr(mine, projection), getattr(base, projection)
                if hasattr(layer, "merge"):
                    layer.merge()
                    layer = layer.base
                torch.testing.assert_close(layer.weight, expected.weight)
            i += 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 3}, "give --image-rank 3 --text-rank 3"),
        ({"params": "qv"}, "give --parts qv"),
        ({"depths": [3, 2]}, "holds 5 layers, but encoder both, position all are 4"),
        ({"encoder": "neither"}, "not a complete file of CLIP-LoRA"),
        ({"position": "somewhere"}, "not a complete file of CLIP-LoRA"),
        ({"width": 32}, "has shape"),
    ],
)
def test_a_clip_lora_file_that_does_not_fit_is_one_line(options, said, new_clip, tmp_path):
    clip_lora_file(tmp_path / "lora.pt", **{"depths": [2, 2]} | options)
    with pytest.raises(UserError) as error:
        load_into(new_lora(new_clip(), **PAPER), tmp_path / "lora.pt")
    assert said in str(error.value)
    assert str(error.value).startswith(f"--init-from {tmp_path / 'lora.pt'}: ")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("position", "encoder", "image", "text"),
    [
        ("all", "both", range(24), range(12)),
        ("all", "both", range(21), range(12)),  # as their table was until September 2024
        ("all", "vision", range(21), ()),
        ("half-up", "vision", range(12, 24), ()),
        ("half-up", "vision", range(6, 12), ()),
        ("half-bottom", "both", range(12), range(6)),
        ("half-bottom", "both", range(6), range(6)),
        ("up", "both", range(8, 12), range(8, 12)),
    ],
)
def test_layers_of_a_clip_lora_file_of_vit_l_14_are_told_by_their_number(
    position, encoder, image, text
):
    towers = {"both": ["text", "image"], "vision": ["image"]}[encoder]
    depths = {"text": 12, "image": 24}
    places = _clip_lora_places(towers, position, depths, len(image) + len(text))
    assert places == [("text", i) for i in text] + [("image", i) for i in image]


class Malicious:
    def __reduce__(self):
        return open, ("marker", "w")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Malicious(), "nothing in it was run"),
        ({"weights": {}, "metadata": Malicious()}, "nothing in it was run"),
        ([1, 2], "no tensor"),
        ({"a": torch.zeros(2)}, "no tensor"),
        ({"weights": {}, "metadata": {}}, "not a complete file of CLIP-LoRA"),
        ({"transformer.resblocks.0.mlp.c_fc.lora_A": torch.zeros(2)}, "is not a LoRA tensor"),
    ],
    ids=["code", "code inside", "a list", "other tensors", "empty", "mlp"],
)
def test_a_file_of_something_else_is_one_line_and_runs_nothing(
    content, said, new_clip, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "lora.pt")
    with pytest.raises(UserError, match=said):
        load_into(new_lora(new_clip()), tmp_path / "lora.pt")
    assert not (tmp_path / "marker").exists()


# ------------------------------------------------------------------------------------- our own runs


def write_run(method, folder, **more) -> None:
    name = next(name for name, kind in METHODS.items() if type(method) is kind)
    config = {"method": name, "recipe": "default", "settings": asdict(method.settings)}
    config |= {"experiment": {"seed": 1, "shots": 4, "template": TEMPLATE, "model": "tiny"}}
    config |= {
        "model": "tiny",
        "fingerprint": weights.fingerprint(method.lent[0]),
        "classnames": {"all": NAMES},
    } | more
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "adapter.safetensors", method.adapter_state())


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].starts_over])
def test_a_run_of_the_same_method_is_taken_over_to_the_bit(name, new_clip, tmp_path):
    made = METHODS[name](new_clip(), NAMES, TEMPLATE, METHODS[name].Settings())
    for tensor in made.adapter_state().values():
        nn.init.normal_(tensor)
    write_run(made, tmp_path)
    method = METHODS[name](new_clip(), NAMES, TEMPLATE, METHODS[name].Settings())
    load_into(method, tmp_path)
    assert equal(method.adapter_state(), made.adapter_state())
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    some = Batches(Pictures(pixels, torch.arange(6) % 3), pixels, Reader(32, folder=None))
    method.fit(some, some, lambda *_: 0.0)
    then = [torch.equal(t, method.adapter_state()[n]) for n, t in made.adapter_state().items()]
    assert any(then) or not then, "it starts over; give it `starts_over = True`"


@pytest.mark.parametrize(
    ("name", "more", "fits"),
    [
        ("lora", {}, True),
        ("coop", {}, True),
        ("two_stage", {}, True),  # whose classifier starts anew
        ("cross_modal", {}, False),
        ("vpt", {"head": "linear"}, False),
        ("coop", {"class_specific": True}, False),
        ("kgcoop", {"depth_head": True}, False),
    ],
)
def test_rows_of_other_classes_are_not_taken_over(name, more, fits, new_clip, tmp_path):
    kind = METHODS[name]
    write_run(kind(new_clip(), NAMES, TEMPLATE, kind.Settings(**more)), tmp_path)
    load_into(kind(new_clip(), NAMES, TEMPLATE, kind.Settings(**more)), tmp_path)
    other = kind(new_clip(), NAMES[::-1], TEMPLATE, kind.Settings(**more))
    if fits:
        load_into(other, tmp_path)
        return
    with pytest.raises(UserError, match="learned 3 classes .'rose' ….*; give a run on the same"):
        load_into(other, tmp_path)


def test_settings_of_a_tower_that_does_not_learn_do_not_count(new_clip, tmp_path):
    write_run(new_lora(new_clip(), towers="image", text_rank=7), tmp_path)
    load_into(new_lora(new_clip(), towers="image", text_rank=3), tmp_path)


@pytest.mark.parametrize("switch", ["class_specific", "depth_head"])
def test_a_switch_to_give_is_written_as_one(switch, new_clip, tmp_path):
    kind, name = METHODS["coop"], switch.replace("_", "-")
    for there, flag in ((True, f"--{name}"), (False, f"--no-{name}")):
        made, method = (
            kind(new_clip(), NAMES, TEMPLATE, kind.Settings(**{switch: value}))
            for value in (there, not there)
        )
        write_run(made, tmp_path)
        with pytest.raises(UserError, match=f"; give {flag}$"):
            load_into(method, tmp_path)


def test_a_run_that_does_not_fit_is_one_line(new_clip, tmp_path):
    lora, other = new_lora(new_clip()), new_clip()
    write_run(lora, tmp_path)
    with torch.no_grad():
        other.logit_scale.add_(1.0)
    here, there = weights.fingerprint(other), weights.fingerprint(new_clip())
    coop = METHODS["coop"](new_clip(), NAMES, TEMPLATE, METHODS["coop"].Settings())
    for method, said in (
        (new_lora(other), f"fingerprint {there}, but this model has {here}"),
        (new_lora(new_clip(), parts="qk"), "give --parts qv"),
        (coop, "context is missing"),
    ):
        with pytest.raises(UserError, match=said):
            load_into(method, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="method is missing"):
        load_into(lora, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="neither a run of train.py nor a PEFT adapter"):
        load_into(lora, tmp_path)
    with pytest.raises(UserError, match="no such folder or file"):
        load_into(lora, tmp_path / "nowhere")


def test_a_lora_of_others_is_no_start_for_a_prompt_method(new_clip, tmp_path):
    write_peft(new_lora(new_clip()), tmp_path)
    coop = METHODS["coop"](new_clip(), NAMES, TEMPLATE, METHODS["coop"].Settings())
    with pytest.raises(UserError, match="is a LoRA adapter, and CoOp learns something else"):
        load_into(coop, tmp_path)


# ------------------------------------------------------------------------------------ hostile files


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_alpha": math.nan}, "NaN is not a finite number"),
        ({"lora_alpha": "4"}, "lora_alpha is '4', expected a finite number or null"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\], expected an object"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern.q_proj is '4', expected a finite"),
        ({"alpha_pattern": {"(((.*)*)*)*x": 4}}, "cannot be used .* give the full names"),
        ({"alpha_pattern": {"(a|a)*(b|b)+$": 4}}, "cannot be used .too many repetitions"),
        ({"alpha_pattern": {".*.*.*.*x": 4}}, "cannot be used .too many repetitions"),
        ({"alpha_pattern": {"(": 4}}, "cannot be used"),
        ({"peft_type": {}}, "peft_type is {}, expected text or null"),
        ({"use_rslora": 1}, "use_rslora is 1, expected true or false or null"),
    ],
)
def test_a_peft_config_of_another_kind_is_one_line_at_once(change, said, new_clip, tmp_path):
    write_peft(new_lora(new_clip()), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=f"adapter_config.json.*{said}"):
        load_into(new_lora(new_clip()), tmp_path)


def test_a_peft_pattern_that_is_a_plain_regular_expression_is_taken(new_clip, tmp_path):
    lora = new_lora(new_clip(), text_rank=4)
    write_peft(lora, tmp_path)
    file = tmp_path / "adapter_config.json"
    pattern = {r"vision_model\..*_proj": 6.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": pattern}))
    load_into(new_lora(new_clip(), text_rank=4), tmp_path)


@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.zeros(0, 4), torch.full((2, 2), 1.0)])
def test_tensors_that_are_no_lora_matrices_are_named(tensor, new_clip, tmp_path):
    lora = new_lora(new_clip())
    write_peft(lora, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in state if "lora_A" in name)
    save_file(state | {name: tensor}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is not a matrix|differ in shape|has ranks"):
        load_into(new_lora(new_clip()), tmp_path)
    save_file(
        {"visual.transformer.resblocks.0.attn.in_proj.lora_B": tensor}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UserError, match="is not a matrix|with other settings"):
        load_into(new_lora(new_clip()), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapter_sha256": "0" * 64}, "is not the adapter that this run saved"),
        ({"settings": {"parts": 3}}, "config.json: settings: --parts 3: expected text"),
        ({"settings": 3}, "config.json: settings is 3, expected an object"),
    ],
)
def test_a_run_whose_config_does_not_vouch_for_it_is_refused(change, said, new_clip, tmp_path):
    write_run(new_lora(new_clip()), tmp_path, **change)
    with pytest.raises(UserError, match=said):
        load_into(new_lora(new_clip()), tmp_path)
