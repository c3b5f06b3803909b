"""Work on LoRA and checkpoint files, in float32; a checkpoint is written one tensor at a time.

    info     what is this file?             info LORA
    combine  tau_mix = sum lambda_i tau_i   combine style.safetensors:0.8 lcm.safetensors:1.0 -o OUT
    resize   the best tau of a lower rank   resize LORA --rank 16 -o OUT
    merge    W <- W + lambda dW             merge sd15.safetensors lcm.safetensors:1.0 -o OUT
    unmerge  W <- W - lambda dW             unmerge fast.safetensors lcm.safetensors:1.0 -o OUT
    extract  dW = W_tuned - W_base          extract BASE TUNED --rank 32 -o OUT
    diff     which keys differ, how far     diff a.safetensors b.safetensors
    plot     the course of a training run   plot runs/lcm
    live     a page that draws as you type  live

dW = (lora_alpha / rank) B A. combine concatenates ranks, which is exact; averaging A and B is not.
"""

import argparse
import sys
from pathlib import Path

import torch

from .cli.output import run_script
from .files.lora_file import find_lora, parse_lora
from .files.tools import check_out, combine_files, diff, extract_file, info, merge_file, resize_file
from .model.precision import DTYPES


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m minilcm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, what: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        if name in ("combine", "resize", "extract", "merge", "unmerge"):
            sub.add_argument("-o", "--out", type=Path, required=True, help="file to write")
            sub.add_argument("--force", action="store_true", help="overwrite --out if it exists")
        if name in ("combine", "resize", "extract"):
            dtype = "of the LoRA written (default float16)"
            sub.add_argument("--dtype", choices=DTYPES, default="float16", help=dtype)
            styles = "module names: diffusers, ldm or peft (default: what most programs read)"
            sub.add_argument("--style", choices=["diffusers", "ldm", "peft"], help=styles)
        return sub

    sub = command("info", "Family, ranks, alphas, norm of each block's delta, recipe.")
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE")
    what = "tau_mix = sum_i lambda_i tau_i, exact because ranks are concatenated."
    command("combine", what).add_argument("loras", nargs="+", metavar="FILE[:LAMBDA]")
    sub = command("resize", "The best approximation of a lower rank, by SVD; prints what it loses.")
    sub.add_argument("lora", type=Path)
    size = sub.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="at most this rank in each module")
    energy = "keep this share of the sum of squared singular values, e.g. 0.99"
    size.add_argument("--energy", type=float, help=energy)
    against = "also print how far another LoRA, of a lower rank, is from the given one"
    sub.add_argument("--against", type=Path, help=against)
    for name, sign in (("merge", "+"), ("unmerge", "-")):
        what = f"W {sign} lambda dW for each LoRA in a checkpoint, rounded to its number format"
        sub = command(name, f"{what}; all other tensors stay byte for byte.")
        sub.add_argument("checkpoint", type=Path)
        sub.add_argument("loras", nargs="+", metavar="FILE[:LAMBDA]")
    what = "A LoRA of a given rank, close to the best, for the difference of two checkpoints."
    sub = command("extract", what)
    sub.add_argument("base", type=Path)
    sub.add_argument("tuned", type=Path)
    sub.add_argument("--rank", type=int, required=True)
    sub = command("diff", "Which keys two files do not share, and how far their tensors are apart.")
    sub.add_argument("a", type=Path)
    sub.add_argument("b", type=Path)
    sub = command("plot", "RUN/plot.png from the RUN/metrics.jsonl that train.py writes.")
    sub.add_argument("run", type=Path, metavar="RUN", help="the run's --out folder")
    sub = command("live", "A page that draws as you type, for this machine only.")
    shipped = "default: the shipped model with its own"
    sub.add_argument("--model", type=Path, help=f"a checkpoint ({shipped})")
    lora = "gets a slider, at LAMBDA first (default 1); repeatable"
    sub.add_argument("--lora", action="append", default=[], metavar="FILE[:LAMBDA]", help=lora)
    for one in (parser, *commands.choices.values()):
        one.error = lambda message: sys.exit(f"minilcm: {message}")  # one line, exit 1
    args = parser.parse_args(argv or sys.argv[1:] or ["--help"])
    if getattr(args, "rank", None) is not None and args.rank < 1:
        parser.error(f"--rank is {args.rank}; give 1 or more")
    if getattr(args, "energy", None) is not None and not 0 < args.energy <= 1:
        parser.error(f"--energy is {args.energy}; give a number above 0, at most 1")
    return args


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    given = map(parse_lora, getattr(args, "loras", []))
    loras = [(find_lora(path), lam) for path, lam in given]
    if "out" in args:
        given = [getattr(args, x) for x in ("lora", "checkpoint", "base", "tuned") if x in args]
        check_out(args.out, [*given, *(path for path, _ in loras)], args.force)
    to = (args.out, DTYPES[args.dtype], args.style) if "style" in args else ()
    match args.command:
        case "info":
            failed = []
            for path in args.files:
                try:
                    info(find_lora(path))
                except (ValueError, OSError) as error:  # and go on with the others
                    failed.append(str(error))
            if failed:
                raise ValueError("\nminilcm: ".join(failed))
        case "combine":
            combine_files(loras, *to)
        case "resize":
            against = args.against and find_lora(args.against)
            resize_file(find_lora(args.lora), *to, args.rank, args.energy, against)
        case "merge" | "unmerge":
            merge_file(args.checkpoint, loras, args.out, 1.0 if args.command == "merge" else -1.0)
        case "extract":
            extract_file(args.base, args.tuned, args.rank, *to)
        case "diff":
            diff(find_lora(args.a), find_lora(args.b))
        case "plot":
            from .run.plot import plot_run  # the other commands need no metrics

            print(plot_run(args.run))
        case "live":
            from .run.live import live  # the other commands need no server

            live(args.model, args.lora)


if __name__ == "__main__":
    run_script("minilcm", main, parse, "stopped; nothing was written")
