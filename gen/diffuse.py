"""Repaint images with a diffusion model.

Image-to-image (SDEdit: Meng et al., arXiv:2108.01073) with a latent diffusion model (Rombach et
al., arXiv:2112.10752), in diffusers. A real image x is encoded, covered with noise up to step s·N
of N, and denoised from there under a prompt with DPM-Solver++ (Lu et al., arXiv:2211.01095). At
strength s = 15/20 little more than the layout of x remains.
"""

from pathlib import Path

import torch
from PIL import Image, ImageOps

from clip_min import UserError
from gen.pretrained import locate, quiet


def find_painter(name: str) -> tuple[str, str]:
    """-> (folder, revision), downloaded if necessary."""
    quiet()
    import diffusers

    folder, revision = locate(
        "--painter", name, lambda name, at: diffusers.DiffusionPipeline.download(name, revision=at)
    )
    if not (Path(folder) / "model_index.json").is_file():
        raise UserError(f"--painter {name}: has no model_index.json; give a pipeline of diffusers")
    return folder, revision


class Diffusion:
    """painter(images, prompts, seeds) -> square images of the model's own size.

    Each image has its own generator, so a batch of n equals n batches of one, except for rounding.
    """

    def __init__(self, name: str, options, device: str):
        import diffusers

        folder, self.revision = find_painter(name)
        self.name, self.options = name, options
        cuda = torch.device(device).type == "cuda"
        self.pipe = diffusers.AutoPipelineForImage2Image.from_pretrained(
            folder, dtype=torch.float16 if cuda else torch.float32
        )
        if hasattr(self.pipe, "safety_checker"):  # it would paint false alarms black
            self.pipe.safety_checker = None
        if hasattr(self.pipe, "unet"):  # newer families have a solver of their own
            self.pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
                self.pipe.scheduler.config, algorithm_type="dpmsolver++"
            )
        if options.offload:
            self.pipe.enable_model_cpu_offload(device=device)
        else:
            self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        network = self.pipe.unet if hasattr(self.pipe, "unet") else self.pipe.transformer
        side = getattr(network.config, "sample_size", None) or self.pipe.default_sample_size
        self.size = side * self.pipe.vae_scale_factor  # pixels

    def __call__(
        self, images: list[Image.Image], prompts: list[str], seeds: list[int]
    ) -> list[Image.Image]:
        size = (self.size, self.size)
        squares = [ImageOps.fit(i.convert("RGB"), size, Image.Resampling.BICUBIC) for i in images]
        return self.pipe(
            prompt=prompts,
            image=squares,
            strength=self.options.strength,
            num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
