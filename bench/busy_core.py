"""The demo's main command on an idle machine, and beside a process that keeps one core busy.

    python bench/busy_core.py [--rounds 2]

Threads wait for each other at every matrix product. If one of them does not get a core, a command
can become ten times slower. The demo's model therefore uses one thread, and with larger models
waiting threads sleep (clip_min/__init__.py). Both cases are timed in turn, in 2 minutes by default.
"""

import argparse
import subprocess
import sys
import tempfile

from side_by_side import hardware, seconds

TRAIN = [sys.executable, "train.py", "--method", "lora", "--cache", "none", "--out"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds

    def alone() -> None:
        with tempfile.TemporaryDirectory() as out:
            subprocess.run([*TRAIN, out], check=True, stdout=subprocess.DEVNULL)

    def beside() -> None:
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            alone()
        finally:
            busy.kill()
            busy.wait()

    times = seconds({"alone": alone, "beside a busy core": beside}, rounds)
    for name, time in times.items():
        print(f"{name}: {time:.1f} s")
    print(f"{times['beside a busy core'] / times['alone']:.2f}x; {hardware(threads=1)}")


if __name__ == "__main__":
    main()
