"""Measure how close to the limit distill runs, on the machine at hand.

    python scripts/bench                    all of it, about half an hour on two CPU cores
    python scripts/bench steps --repeats 9  one part; --help of each part names its options

What is compared takes turns in one process on one machine; a ratio is the median over the turns.
The tables also go into scripts/bench/results/, in a file named after the machine. The exit status
is 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import distill  # noqa: F401  (first: it makes torchvision importable)

# isort: split
import gpu
import host
import input
import losses
import methods
import metrics
import steps
import store
import sweep
import torch
import views
from measure import RESULTS, machine, save

PARTS = {
    part.__name__: part
    for part in (host, steps, methods, views, input, store, sweep, losses, metrics, gpu)
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python scripts/bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--repeats", type=int, help="rounds that count")
    shared.add_argument("--threads", type=int, help="of torch in this process")
    shared.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
    parts = parser.add_subparsers(dest="part", metavar="|".join(PARTS))
    for name, part in PARTS.items():
        about = part.__doc__ or ""
        own = parts.add_parser(
            name,
            parents=[shared],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            help=about.partition("\n")[0],
            description=about,
        )
        part.options(own)
    asked = sys.argv[1:]
    chosen = [asked] if asked else [[name] for name in PARTS]

    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning_fabric", "distill"):
        logging.getLogger(name).setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    missed = 0
    for arguments in chosen:
        options = parser.parse_args(arguments)
        torch.set_num_threads(options.threads or threads)
        torch.manual_seed(0)
        command = " ".join(["python scripts/bench", *arguments])
        print(f"\n{command}: {machine()}, {torch.get_num_threads()} threads", flush=True)
        rows, tables = PARTS[options.part].measure(options)
        tables["rows"] = [{**row._asdict(), "holds": row.holds} for row in rows]
        print(f"→ {save(options.results, options.part, command, tables)}", flush=True)
        missed += sum(not row.holds for row in rows)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
