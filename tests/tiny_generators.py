"""A LLaVA and a Stable Diffusion with few random weights, from the libraries' own classes.

bench/generation.py times them too, and on a GPU gives the real ones' sizes.
"""

import contextlib
import gzip
from pathlib import Path

import torch

from clip_min.tokenizer import ALPHABET, MERGES
from gen.pretrained import quiet

# The format of llava-hf/llava-1.5-7b-hf: "USER: <image>\n… ASSISTANT:".
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TINY_LLAVA = {
    "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32},
    "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.5},
}
TINY_SD = {
    "unet": {"sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1}
    | {"attention_head_dim": 4, "cross_attention_dim": 32, "norm_num_groups": 8}
    | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    "vae": {"block_out_channels": (16, 32), "norm_num_groups": 8, "sample_size": 32}
    | {"down_block_types": ("DownEncoderBlock2D",) * 2}
    | {"up_block_types": ("UpDecoderBlock2D",) * 2},
    "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "projection_dim": 32},
}


def save_llava(folder: Path, sizes: dict = TINY_LLAVA, dtype: torch.dtype = torch.float32) -> None:
    """LlavaForConditionalGeneration and its processor, with LLaVA-1.5's chat template."""
    import tokenizers
    import transformers

    quiet()
    words = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([__doc__, CHAT_TEMPLATE], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    vision = sizes["vision"]
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": side["height"]}, crop_size=side),
        tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,  # the class token
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(
            **{"vocab_size": len(tokenizer), **ids, **sizes["text"]}
        ),
        image_token_id=image,
        **ids,
    )
    config.dtype = dtype
    torch.manual_seed(0)
    with built_in(dtype):
        transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_diffusion(folder: Path, sizes: dict = TINY_SD, dtype: torch.dtype = torch.float32) -> None:
    """StableDiffusionImg2ImgPipeline; its tokenizer is CLIP's, cut to the first 2000 merges."""
    import diffusers
    import transformers

    quiet()
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1:2001]
    symbols = list(ALPHABET.values())
    words = [*symbols, *(s + "</w>" for s in symbols), *(m.replace(" ", "") for m in merges)]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    pairs = [tuple(merge.split()) for merge in merges]
    tokenizer = transformers.CLIPTokenizer(vocabulary, pairs, model_max_length=77)
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    text = transformers.CLIPTextConfig(vocab_size=len(vocabulary), **ends, **sizes["text"])
    torch.manual_seed(0)
    with built_in(dtype):
        vae = diffusers.AutoencoderKL(latent_channels=4, **sizes["vae"])
        text_encoder = transformers.CLIPTextModel(text)
        unet = diffusers.UNet2DConditionModel(**sizes["unet"])
    diffusers.StableDiffusionImg2ImgPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.PNDMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            skip_prk_steps=True,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@contextlib.contextmanager
def built_in(dtype: torch.dtype):
    """Weights are made in this type at once: a LLaVA of the real size is 28 GB in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
