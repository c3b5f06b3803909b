"""The paper, measured: eight questions that the LCM-LoRA report (2311.05556) leaves, a file each.

    python -m paper --quick          all eight, small, under ten minutes on 2 cores: no science
    python -m paper                  all eight, hours; what is done is kept under runs/paper/
    python -m paper steps rank       some
    python -m paper rank --seed 1    again with other pictures and training noise, beside the first
    python -m paper report           figures and README.md out of the results, as after a run of all

Each writes results/NAME.json: numbers with 95 % intervals, the rule of the verdict and the verdict,
seed, commit, processor, seconds; and pictures into figures/. --quick writes into runs/paper/quick,
another seed results/NAME-seed1.json.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from minilcm.files.safetensors_file import atomic

from . import base, combination, fail, memory, rank, recipe, solver, steps
from .report import write_report
from .setup import HALF, HERE, budget_of, place, spent, spent_now

# {name: question, measurement, rule and figure}
CLAIMS = {
    x.__name__.split(".")[1]: x
    for x in (memory, steps, combination, base, rank, solver, recipe, fail)
}
REPEATED = ("rank", "solver")  # with another seed


def measure_claim(name: str, quick: bool, seed: int) -> None:
    """Answer one question and write its JSON."""
    claim, start = CLAIMS[name], time.perf_counter()
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True).stdout.strip()
    spent.clear()
    spent_now.clear()
    numbers = claim.measure(budget_of(quick, seed))
    # as if nothing had been kept
    seconds = time.perf_counter() - start - sum(spent_now) + sum(spent.values())
    verdict, rule = claim.verdict(numbers), " ".join(claim.verdict.__doc__.split())
    processor = platform.processor()
    if sys.platform == "linux":
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        processor = names[0] if names else processor
    processor += f", {torch.get_num_threads()} thread(s), UNet in {str(HALF)[6:]}"
    result = {
        "section": name,
        "quick": quick,
        "seed": seed,
        "commit": commit,
        "processor": processor,
        "seconds": seconds,
        "rule": rule,
        "verdict": verdict,
        "numbers": numbers,
    }
    with atomic(place("results", quick) / f"{name}{f'-seed{seed}' if seed else ''}.json") as part:
        part.write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(f"{name}, seed {seed}: {verdict} ({seconds:.0f} s)", flush=True)


def rounded(x):
    """Four significant digits are enough for a report."""
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {str(k): rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list | tuple) else x


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m paper", description=__doc__, formatter_class=raw)
    words = [*CLAIMS, "report"]
    default = f"all, then {' and '.join(REPEATED)} with another seed"
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(words)} (default: {default})"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small version, into runs/paper/quick"
    )
    parser.add_argument("--seed", type=int, default=0, help="of pictures and training (default 0)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in words]:
        sys.exit(f"python -m paper: no section {unknown[0]!r}; choose from {', '.join(words)}")
    for name in args.names or CLAIMS:
        if name != "report":
            measure_claim(name, args.quick, args.seed)
    for name in () if args.names else REPEATED:
        measure_claim(name, args.quick, args.seed + 1)
    if not args.names or "report" in args.names:
        write_report(CLAIMS, args.quick)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"python -m paper: {error}")
