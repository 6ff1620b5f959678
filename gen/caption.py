"""Captions by LLaVA-1.5, whose question names the class.

Liu et al., "Improved Baselines with Visual Instruction Tuning", arXiv:2310.03744, in transformers.
The question uses the chat template of the model's processor; another format would give worse
captions without an error. On a GPU the language model's weights are 4-bit (nf4, bitsandbytes), 4.8
GB in all instead of 14; the small image tower stays in 16 bits.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clip_min import UserError
from clip_min.files import read_json
from gen.pretrained import locate, quiet

FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


class Llava:
    """captioner(pictures, class names, seeds) -> captions.

    A caption depends only on its image, name and seed, not (except for rounding) on the batch.
    """

    def __init__(self, name: str, options, device: str):
        quiet()
        import transformers
        from huggingface_hub import snapshot_download

        folder, self.revision = locate(
            "--captioner",
            name,
            lambda name, at: snapshot_download(name, revision=at, allow_patterns=FILES),
        )
        self.name, self.options = name, options
        cuda = torch.device(device).type == "cuda"
        file = Path(folder) / "config.json"
        kind = read_json(file, "").get("model_type") if file.is_file() else None
        if kind != "llava":
            raise UserError(
                f"--captioner {name}: is a model of type {kind!r}, expected llava; give a LLaVA-1.5"
            )
        placed = {"device_map": device, "quantization_config": four_bits()} if cuda else {}
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"  # so that all answers start together
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float16 if cuda else torch.float32, **placed
        ).eval()

    def question(self, classname: str) -> str:
        """The prompt, "USER: <image> … ASSISTANT:" for LLaVA-1.5."""
        text = self.options.question.replace("{}", classname)
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    @torch.inference_mode()
    def __call__(
        self, images: list[Image.Image], classnames: list[str], seeds: list[int]
    ) -> list[str]:
        inputs = self.processor(
            images=[image.convert("RGB") for image in images],
            text=[self.question(name) for name in classnames],
            padding=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        answers = self.model.generate(
            **inputs,
            max_new_tokens=self.options.caption_tokens,
            do_sample=False,  # `sampler` turns the largest logit into a random sample
            num_beams=1,
            logits_processor=[sampler(seeds, self.options.temperature)],
        )
        answers = answers[:, inputs["input_ids"].shape[1] :]  # (B, new tokens)
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def four_bits():
    """LLaVA on a GPU: nf4 for the linear layers in the blocks of its language model."""
    import transformers

    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float16,
        # Patterns of full names; without them everything but lm_head would be 4-bit.
        llm_int8_skip_modules=[".*vision_tower", ".*multi_modal_projector", "lm_head"],
    )


def sampler(seeds: list[int], temperature: float):
    """Make the largest logit of row i a sample of softmax(logits / temperature), with seeds[i].

    The Gumbel trick: argmax(z + g), where g = -log(exponential noise), has the distribution
    softmax(z). Each row has its own generator, so that the rest of the batch does not matter.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def process(tokens: Tensor, logits: Tensor) -> Tensor:
        """logits (B, V)."""
        if temperature == 0:
            return logits
        noise = [torch.empty(logits.shape[1]).exponential_(generator=g) for g in generators]
        return logits.float() / temperature - torch.stack(noise).log().to(logits.device)

    return process
