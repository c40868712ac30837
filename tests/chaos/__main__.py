"""`python -m tests.chaos`: the proof, from the command line."""

# ruff: noqa: T201 (a command line)

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path

from .campaign import Campaign, ChaosError
from .faults import FAULTS
from .report import print_table, write_json

HELP = """\
Kills whatever can die under `stormline run`, at random moments from a seed, and shows that the tables
are exactly those of a run in which nothing died: no row lost, none doubled, tokens bit for bit.

It starts an embedded broker with known streams, `stormline run` with a Ray of its own in another
process, and starts that again whenever it ends, as systemd would. After each fault it waits until a
new row is committed. At the end everything is read once more in peace, and the two folders compared.
"""
EXAMPLES = """\
examples:
  python -m tests.chaos                                   40 faults, a seed of the moment, which is printed
  python -m tests.chaos --seed 7                          the same faults in the same order again
  python -m tests.chaos --faults 10 --kinds encoder,supervisor
  python -m tests.chaos --seed 1 --seed 2 --seed 3 --json benchmarks/results/chaos.json

Faults of the kind 'disk full' need the right to mount a small disk (root). Takes 10 to 20 s a fault on
two cores.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=HELP,
        epilog=f"{EXAMPLES}\nkinds:\n  " + "\n  ".join(FAULTS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, action="append", help="may be repeated; without it one is drawn")
    parser.add_argument("--faults", type=int, default=40, help="for each seed (default: 40)")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="comma-separated (default: all)")
    parser.add_argument("--lanes", default="1,2", help="numbers of lanes, one drawn at each start (default: 1,2)")
    parser.add_argument("--no-serve", dest="serve", action="store_false", help="leave out the HTTP service")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no further fault of a seed after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--add", action="store_true", help="to what FILE holds of other seeds")
    args = parser.parse_args()
    kinds = [kind.strip() for kind in args.kinds.split(",")]
    unknown = [kind for kind in kinds if kind not in FAULTS]
    if unknown:
        parser.error(f"no such kind: {', '.join(unknown)}; there are: {', '.join(FAULTS)}")
    reports = []
    for seed in args.seed or [random.randrange(1_000_000)]:
        print(f"seed {seed}: {args.faults} faults", flush=True)
        campaign = Campaign(
            seed,
            args.faults,
            kinds,
            lanes=[int(n) for n in args.lanes.split(",")],
            serve=args.serve,
            limit_s=args.minutes * 60,
            tell=lambda text: print(text, flush=True),
        )
        try:
            reports.append(campaign.run())
        except ChaosError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"seed {seed}: rows {reports[-1].rows} in {reports[-1].duration_s:.0f} s", flush=True)
    outcomes = [o for report in reports for o in report.outcomes]
    print_table(outcomes)
    if args.json:
        write_json(args.json, reports, add=args.add)
    problems = [f"seed {r.seed}: {text}" for r in reports for text in (*r.differences, *r.leftovers)]
    for text in problems:
        print(text, file=sys.stderr)
    if not problems:
        n_faults = sum(1 + len(o.overlapped) for o in outcomes)
        print(f"{n_faults} faults: no row lost, none doubled, tokens bit for bit")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
