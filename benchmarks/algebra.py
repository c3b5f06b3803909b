"""The algebra of `python -m minilcm` at full size, on files with random weights; not in CI.

    python -m benchmarks.algebra sd15    (or sdxl, ssd1b; 20 GB of disk, some minutes)

combine against the sum of deltas, and against averaging A and B; merge then unmerge of a float32
and of a float16 checkpoint; the residual that resize prints against the one measured on the file it
wrote; extract(base, merged) against the delta that was merged. Every command runs as a user runs
it, on files. Prints one line each, exits 1 if one fails.
"""

import argparse
import contextlib
import io
import re
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.check import difference
from benchmarks.full_size import make_files
from minilcm.__main__ import main, parse
from minilcm.files.lora_file import read_tau, write_tau
from minilcm.files.safetensors_file import read_tensors, write_tensors
from minilcm.lora import Tau
from minilcm.merge import delta
from tests.reference.make_reference import fill

failed = []


def run(*argv) -> str:
    """What a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        main(parse([str(x) for x in argv]))
    return out.getvalue()


def say(what: str, value: float, goal: float) -> None:
    failed.extend([what] if value > goal else [])
    print(f"{what:64} {value:.2e}   goal {goal:.0e}", flush=True)


def combine(folder: Path, tau_a: Tau, tau_b: Tau) -> None:
    a, b, mix = (folder / f"{name}.safetensors" for name in ("lora", "style", "mix"))
    run("combine", f"{a}:1.0", f"{b}:0.8", "-o", mix, "--dtype", "float32")
    exact = worst = 0.0
    for path, parts in read_tau(mix).items():
        expected = delta(*tau_a[path]) + 0.8 * delta(*tau_b[path])
        exact = max(exact, difference(delta(*parts), expected))
        (up_a, down_a, alpha_a), (up_b, down_b, alpha_b) = tau_a[path], tau_b[path]
        # factors averaged separately, for the ranks that both have: B = B_a + B_b, A = A_a + A_b
        r = min(len(down_a), len(down_b))
        up = alpha_a / len(down_a) * up_a[:, :r] + 0.8 * alpha_b / len(down_b) * up_b[:, :r]
        worst = max(worst, difference(delta(up, down_a[:r] + down_b[:r], r), expected))
    say("combine against lambda1 dW1 + lambda2 dW2, worst module", exact, 1e-6)
    print(f"{'  A and B averaged instead: off by':64} {worst:.2e}   of the largest value")


def merge_and_back(folder: Path, model: Path, lora: Path, what: str) -> None:
    merged, back = folder / "merged.safetensors", folder / "back.safetensors"
    run("merge", model, f"{lora}:0.7", "-o", merged, "--force")
    run("unmerge", merged, f"{lora}:0.7", "-o", back, "--force")
    changed, worst = 0, 0.0
    with safe_open(model, "pt") as fa, safe_open(merged, "pt") as fb, safe_open(back, "pt") as fc:
        for key in fa.keys():
            x, y, z = (f.get_tensor(key).float() for f in (fa, fb, fc))
            if torch.equal(x, y):
                assert torch.equal(x, z), key
                continue
            changed += 1
            if what == "float32":
                worst = max(worst, difference(z, x))
            else:  # each of two roundings moves a value by half a unit of the larger of the two
                larger = torch.maximum(x.abs(), y.abs()).clamp(min=2**-14)
                unit = torch.finfo(torch.float16).eps * larger
                worst = max(worst, ((z - x).abs() / unit).max().item())
    units = "" if what == "float32" else ", in units of rounding"
    goal = 1e-6 if what == "float32" else 1.0
    say(f"{what} merge, unmerge: worst of {changed} changed{units}", worst, goal)
    back.unlink()


def resize(folder: Path, lora: Path, tau: Tau) -> None:
    small = folder / "small.safetensors"
    printed = run("resize", lora, "--rank", 16, "-o", small, "--dtype", "float32")
    worst = lost = norm = 0.0
    got = read_tau(small)
    for path, parts in tau.items():
        whole, rest = delta(*parts), delta(*parts) - delta(*got[path])
        residual = float(re.search(rf"(\S+)  rank \d+ -> 16  {re.escape(path)}$", printed, re.M)[1])
        worst = max(worst, abs(residual - (rest.double().norm() / whole.double().norm()).item()))
        lost += rest.double().square().sum().item()
        norm += whole.double().square().sum().item()
    # four digits are printed
    say("resize to 16: printed residual against the direct one, worst", worst, 6e-5)
    total = float(re.search(r"total .* = (\S+)", printed)[1])
    what = f"resize to 16: printed total {total:.4f}, against the direct one"
    say(what, abs(total - (lost / norm) ** 0.5), 6e-5)


def extract(folder: Path, base: Path, tau: Tau) -> None:
    out = folder / "extracted.safetensors"
    how = "--rank", 64, "--dtype", "float32"
    run("extract", base, folder / "merged.safetensors", "-o", out, *how)
    got = read_tau(out)
    assert got.keys() == tau.keys()
    worst = 0.0
    for path, parts in tau.items():
        expected = 0.7 * delta(*parts)
        worst = max(worst, ((delta(*got[path]) - expected).norm() / expected.norm()).item())
    say("extract(base, merged) against 0.7 dW, worst module, of its norm", worst, 1e-4)


@torch.no_grad()
def check(family: str, folder: Path) -> None:
    model, lora = make_files(family, folder)
    tau = read_tau(lora)
    style = {}
    for path, (up, down, _) in tau.items():
        style_up = fill(f"style up {path}", (up.shape[0], 16, *up.shape[2:]))
        style_down = fill(f"style down {path}", (16, *down.shape[1:]))
        style[path] = style_up, style_down, 4.0
    write_tau(folder / "style.safetensors", style, {}, torch.float32)
    combine(folder, tau, style)
    resize(folder, lora, tau)
    merge_and_back(folder, model, lora, "float16")
    base, tensors = folder / "float32.safetensors", read_tensors(model)[0].items()
    wide = {key: x.float() if x.is_floating_point() else x for key, x in tensors}
    write_tensors(base, wide, {})
    del tensors, wide
    model.unlink()
    merge_and_back(folder, base, lora, "float32")
    extract(folder, base, tau)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("family", choices=["sd15", "sdxl", "ssd1b"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        check(args.family, Path(name))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
