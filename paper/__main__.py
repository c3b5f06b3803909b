"""The paper, measured: ten questions that the LCM-LoRA report (2311.05556) leaves, a file each.

    python -m paper --quick          all ten, tiny, under ten minutes on 2 cores: no science
    python -m paper                  all ten, hours; what is done is kept under runs/paper/
    python -m paper steps rank       some
    python -m paper report           figures and README.md out of the results, as after a run of all

Each writes results/NAME.json: numbers with 95 % intervals over training runs and prompts, the rules
and what follows from them, commit, processor, seconds, and which weights it was measured on; and
pictures into figures/. --quick writes into runs/paper/quick.
"""

import argparse
import json
import platform
import re
import sys
import time
from pathlib import Path

import torch

from minilcm.files.safetensors_file import atomic

from . import base, combination, fail, gamma, memory, no_pictures, rank, recipe, solver, steps
from .report import write_report
from .setup import COMMIT, FULL, HALF, QUICK, commits, git, place, spent, spent_now, used

SECTIONS = (memory, steps, gamma, combination, base, rank, solver, recipe, no_pictures, fail)
CLAIMS = {x.__name__.split(".")[1]: x for x in SECTIONS}


def measure_claim(name: str, quick: bool) -> None:
    """Answer one question and write its JSON. ValueError if the code is not a commit's."""
    own = [f":!{kind}" for kind in ("results", "figures", "README.md")]  # what this writes itself
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *own)
    if changed and not quick:
        raise ValueError(f"commit first: a result is of a commit, and {changed.split()[-1]} is not")
    claim, start = CLAIMS[name], time.perf_counter()
    for kept in (spent, spent_now, used, commits):
        kept.clear()
    numbers = claim.measure(QUICK if quick else FULL)
    # four significant digits are enough for a report; keys as JSON has them
    numbers = json.loads(json.dumps(numbers), parse_float=lambda x: float(f"{float(x):.4g}"))
    # as if nothing had been kept
    seconds = time.perf_counter() - start - sum(spent_now) + sum(spent.values())
    cpus = Path("/proc/cpuinfo")  # of Linux, where platform.processor() says little
    processor = re.findall(r"model name\s*: (.*)", cpus.read_text() if cpus.exists() else "")
    processor = (processor or [platform.processor()])[0]
    result = {
        "section": name,
        "quick": quick,
        "weights": dict(used),
        "commit": ", ".join(sorted(commits | {COMMIT})),  # of all its parts
        "processor": f"{processor}, {torch.get_num_threads()} thread(s), UNet in {str(HALF)[6:]}",
        "seconds": round(seconds),
        "rule": " ".join(claim.verdict.__doc__.split()),
        "verdict": claim.verdict(numbers),  # {statement: [verdict, its number]}
        "numbers": numbers,
    }
    with atomic(place("results", quick) / f"{name}.json") as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
    for statement, (verdict, _) in result["verdict"].items():
        print(f"{name}: {statement}: {verdict} ({seconds:.0f} s)", flush=True)


def main(argv: list[str] | None = None) -> None:
    words, raw = [*CLAIMS, "report"], argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m paper", description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(words)}")
    parser.add_argument("--quick", action="store_true", help="tiny, into runs/paper/quick")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in words]:
        raise ValueError(f"no section {unknown[0]!r}; choose from {', '.join(words)}")
    for name in args.names or CLAIMS:
        if name != "report":
            measure_claim(name, args.quick)
    if not args.names or "report" in args.names:
        write_report(CLAIMS, args.quick)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"python -m paper: {error}")
