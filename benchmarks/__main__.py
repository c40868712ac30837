"""All benchmarks that need no GPU, one after the other, and README's table of them: `make bench`.

    python benchmarks                      # under half an hour on 2 cores
    python benchmarks --only scan,decode
    python benchmarks --table              # README's table alone, from the results that are there

Each is a file beside this one that can be run by itself, with `--help`, and writes `results/NAME.json`. What takes
longer is apart: soak.py, alerts.py, answers.py, ablation.py, `make chaos`, `make fuzz`, whose results it shows, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import readme_table

FOLDER = Path(__file__).parent
RUNS: dict[str, tuple[str, ...]] = {  # the quickest first
    "encode": (),
    "scan": ("--rounds", "3"),
    "decode": ("--rounds", "3"),
    "llm": (),
    "gpu": ("--size", "demo"),
    "kafka_source": (),
    "lane": (),
    "ask": (),
    "flat": (),
    "compact": ("--files", "1000"),
    "archive": ("--videos", "12"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(RUNS), help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--table", action="store_true", help="write README's table and run nothing")
    options = parser.parse_args()
    names = [] if options.table else options.only.split(",")
    if unknown := set(names) - set(RUNS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; expected some of {', '.join(RUNS)}")
    failed = []
    for i, name in enumerate(names):
        print(f"== {name} ({i + 1} of {len(names)})", flush=True)
        began_s = time.monotonic()
        done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *RUNS[name]], check=False)
        print(f"== {name}: {time.monotonic() - began_s:.0f} s", flush=True)
        if done.returncode:
            failed.append(name)
    readme_table.write()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the table has their earlier results")


if __name__ == "__main__":
    main()
