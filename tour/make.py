"""Fill code and numbers into the chapters, from the source and from the figures' measurements.

    python -m tour.make             fill them in
    python -m tour.make --check     name the chapters that are stale; exit 1 if there are any
    python -m tour.make --figures   draw the figures and measure first (3 minutes; 4 9: only these)
    python -m tour.make --all       these, the explorer's sheets, idea.svg and lcm_lora.png, anew

A chapter marks what is filled in by comments, which a code host does not show. The block below

    <!-- code: minilcm.lcm.lcd_loss "z_{t_{n+k}} ~" "f_start =" -->

holds the function's lines from the one with the first text to the one with the second (all
without the texts), and never its docstring, in whose place the chapter stands. A number

    <!-- = lcm_grid(4)[1] -->759<!-- . -->

is the value of an expression in NAMES and in `measured`, which is figures/numbers.json. What is
measured elsewhere comes from there: `paper` is paper/results, `said` a number of another page.
"""

import argparse
import ast
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

from minilcm.files.lora_file import read_recipe, read_tau
from minilcm.files.safetensors_file import sha256
from minilcm.lcm import boundary_scalings, lcm_grid, train_grid
from minilcm.schedule import make_schedule

HERE = Path(__file__).parent
ROOT = HERE.parent
EMOJI = ROOT / "weights/emoji"
SCHEDULE = make_schedule()


def spread(t: int) -> str:
    """Standard deviation of E[z0 | z_t] over all z_t, for Gaussian data with s = 0.5."""
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    return f"{alpha * 0.5**2 / (alpha**2 * 0.5**2 + sigma**2) ** 0.5:.3f}"


def fresh(gamma: float, t: int) -> str:
    """The share of the noise's variance at t that is added on the way from s = (1 - gamma) t."""
    s, alpha_bar = int((1 - gamma) * t), SCHEDULE.alpha_bar
    return f"{(1 - alpha_bar[t] / alpha_bar[s]) / (1 - alpha_bar[t]):.0%}"


@functools.cache
def paper(section: str) -> dict:
    """What `python -m paper` found: its "numbers", and {claim: [verdict, ...]}, its "verdict"."""
    return json.loads((ROOT / f"paper/results/{section}.json").read_text())


def seen(row: str) -> str:
    """Of the paper's section steps: the share of right pictures, and their sharpness."""
    found = paper("steps")["numbers"]["rows"][row]
    return f"{found['right'][0]:.2f}, {found['sharpness'][0]:.2f}"


def kept(style: str, how: str) -> str:
    """Of the paper's section combination: the share of pictures in the style."""
    return f"{paper('combination')['numbers']['styles'][style]['style'][how][0]:.2f}"


def said(page: str, before: str) -> str:
    """The number that follows the text `before` on another page of the repository."""
    found = re.search(re.escape(before) + r"[^\d]{,9}(\d+(?:\.\d+)?)", (ROOT / page).read_text())
    if found is None:
        raise ValueError(f"{page} has no number after {before!r}")
    return found[1]


LCM_LORA = EMOJI / "lcm_lora.safetensors"
NAMES = {
    "recipe": read_recipe(LCM_LORA),
    "rank": max(len(down) for _, down, _ in read_tau(LCM_LORA).values()),
    "schedule": SCHEDULE,
    "spread": spread,
    "fresh": fresh,
    "paper": paper,
    "seen": seen,
    "kept": kept,
    "said": said,
    "boundary_scalings": boundary_scalings,
    "lcm_grid": lcm_grid,
    "train_grid": train_grid,
}
CODE = re.compile(r'<!-- code: ([\w.]+)(?: "(.+?)" "(.+?)")? -->\n```python\n(.*?)```\n', re.S)
NUMBER = re.compile(r"<!-- = (.+?) -->(.*?)<!-- \. -->")


def chapters() -> list[Path]:
    return sorted(HERE.glob("*.md"))


def code_of(symbol: str, first: str | None = None, last: str | None = None) -> str:
    """The source of a function or class without its docstring, or the lines of it from the one that
    holds `first` to the one that holds `last`.
    """
    module, name = symbol.rsplit(".", 1)
    try:
        lines = inspect.getsource(getattr(importlib.import_module(module), name)).splitlines()
    except (AttributeError, ModuleNotFoundError):
        raise ValueError(f"there is no {symbol}; name another symbol in the marker") from None
    node = ast.parse("\n".join(lines)).body[0]
    if ast.get_docstring(node) is not None:
        del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
    if first:
        start = next((i for i, line in enumerate(lines) if first in line), None)
        end = next((i for i, line in enumerate(lines) if last in line and i >= (start or 0)), None)
        if start is None or end is None:
            raise ValueError(f"{symbol} has no line with {last if end is None else first!r}")
        lines = lines[start : end + 1]
    return textwrap.dedent("\n".join(lines)).strip("\n") + "\n"


def filled(text: str, measured: dict) -> str:
    """A chapter's text with its code and numbers as they are now."""

    def code(m: re.Match) -> str:
        return m[0].replace(f"```python\n{m[4]}```", f"```python\n{code_of(*m.groups()[:3])}```")

    def number(m: re.Match) -> str:
        value = eval(m[1], {"measured": measured, **NAMES})  # our own text
        return f"<!-- = {m[1]} -->{value}<!-- . -->"

    return NUMBER.sub(number, CODE.sub(code, text))


def stale(measured: dict) -> dict[Path, str]:
    """{chapter: its text as it should be}, of those that are not so."""
    new = {}
    for path in chapters():
        try:
            text = filled(path.read_text(), measured)
        except (ValueError, KeyError) as error:
            raise ValueError(f"tour/{path.name}: {error}") from None
        if text != path.read_text():
            new[path] = text
    return new


@torch.no_grad()
def measure(only: list[int]) -> None:
    """Draw the figures, of `only` these chapters if any, and write the numbers beside them."""
    from . import figures, panels  # text alone needs no matplotlib

    last = len(figures.CHAPTERS)
    if absent := [i for i in only if not 1 <= i <= last]:
        sys.exit(f"--figures {absent[0]}: give numbers of chapters, 1 to {last}")
    torch.set_num_threads(1)  # the bytes depend on it
    path = HERE / "figures/numbers.json"
    numbers = json.loads(path.read_text()) if path.exists() else {}
    for i, chapter in enumerate(figures.CHAPTERS, 1):
        if not only or i in only:
            print(f"{i:02d} {chapter.__name__}")
            numbers[chapter.__name__] = chapter()
    numbers["weights"] = {file.name: sha256(file)[:16] for file in panels.WEIGHTS}
    path.write_text(json.dumps(rounded(numbers), indent=1) + "\n")


def rounded(x):
    """To three digits: the last ones are another processor's."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.3g}") if isinstance(x, float) else x


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tour.make",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument("--figures", nargs="*", type=int, metavar="N", help="draw them (these)")
    parser.add_argument("--all", action="store_true", help="draw all pictures of the tour")
    args = parser.parse_args(argv)
    if args.check and (args.figures is not None or args.all):
        parser.error("--check writes nothing; leave out --figures and --all")
    if args.figures is not None or args.all:
        measure(args.figures or [])
    if args.all:
        one = {**os.environ, "OMP_NUM_THREADS": "1"}
        for module in ("tour.make_explorer", "tour.idea", "tour.lcm_lora"):
            subprocess.run([sys.executable, "-m", module], cwd=HERE.parent, env=one, check=True)
    measured = json.loads((HERE / "figures/numbers.json").read_text())
    try:
        new = stale(measured)
    except ValueError as error:
        sys.exit(str(error))
    if not args.check:
        for path, text in new.items():
            path.write_text(text)
            print(f"tour/{path.name}: filled in")
        return
    lines = [f"tour/{path.name} is stale; run python -m tour.make" for path in new]
    for name, checksum in measured["weights"].items():
        if sha256(EMOJI / name)[:16] != checksum:
            lines.append(f"{name} has changed since the figures; run python -m tour.make --figures")
    if lines:
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
