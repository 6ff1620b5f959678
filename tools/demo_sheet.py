"""Draw the README's image of the demo task: photos above drawings of the same species.

python tools/demo_sheet.py [--out bench/demo.png]
"""

import argparse
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from fewshot import demo  # noqa: E402

SPECIES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "demo.png")
    flags = parser.parse_args()
    species, noise = demo.indices(demo.TASK[:SPECIES]), demo.draw_noise(SPECIES, seed=5)
    rows = [demo.render(species, noise, style, size=128) for style in ("photo", "drawing")]
    sheet = make_grid(torch.cat(rows), nrow=SPECIES, padding=4, pad_value=255)  # (3, h, w)
    to_pil_image(sheet).save(flags.out)
    print(f"{flags.out}: {', '.join(demo.CLASSNAMES[:SPECIES])}")


if __name__ == "__main__":
    main()
