"""Does what each lesson says hold? python -m lessons [--seeds 3] [2_lists …]"""

import argparse
import importlib
import time
from pathlib import Path

NAMES = [file.stem for file in sorted(Path(__file__).parent.glob("[0-9]_*.py"))]


def main() -> int:
    """A line for each lesson and seed: seconds of CPU, and whether its claim holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="*", default=NAMES, help="default: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="the output too")
    args = parser.parse_args()
    if unknown := set(args.lessons) - set(NAMES):
        parser.error(f"expected lessons among {', '.join(NAMES)}, found {unknown}")
    failed = 0
    for name in args.lessons:
        lesson = importlib.import_module(f"lessons.{name}")
        for seed in range(args.seeds):
            began = time.process_time()
            found = lesson.measure(seed)
            seconds = time.process_time() - began
            holds = lesson.claim(found)
            failed += not holds
            said = "holds" if holds else "DOES NOT HOLD"
            print(f"{name:14} seed {seed}  {seconds:5.1f} s  {said}", flush=True)
            if args.show:
                print(f"\n{lesson.show(found)}\n")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
