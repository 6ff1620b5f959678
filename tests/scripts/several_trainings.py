"""What torchrun starts in tests: the trainings in a JSON file of lists of flags, one by one."""

import json
import sys
from pathlib import Path

import train
from fewshot.experiment import run_script


def main() -> None:
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        train.main(flags)


if __name__ == "__main__":
    run_script(main, shared=True)
