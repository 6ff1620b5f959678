"""The demo's main command on an idle machine, and beside a process that keeps one core busy.

    python bench/busy_core.py [--rounds 2]

Threads that wait for one another at every product make a command ten times slower where one of them
does not get its core. The demo's model computes on one thread; of larger ones, threads that wait
sleep (clip_min/__init__.py). The two ways are timed in turn; without arguments it takes 2 minutes.
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
    print(f"{times['beside a busy core'] / times['alone']:.2f}x; {hardware()}")


if __name__ == "__main__":
    main()
