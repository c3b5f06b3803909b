"""The emoji model from nothing: autoencoder, text tower, UNet, judge, LCM-LoRA, style LoRAs.

    python -m weights.emoji.recipe runs/emoji --names 300 --steps 16000           two cores: days
    python -m weights.emoji.recipe runs/emoji --names 300 --steps 6000 --device cuda --at-once 3

Two numbers scale it: --names, of names.txt, and --steps, of the UNet; the other parts take their
share of those. Each part is a process with a log in the folder, and starts when the files that it
needs are there. The same line continues where it was stopped: finished parts are kept, and what
train.py trains continues from its last state.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ART = "--data weights/emoji/art"
STYLES = ("blueprint", "papercut")
LIKE_SD = "--objective diffusion --full --lr 1e-3 --looks 16"
LCM = "--objective lcm --rank 32 --w 3 --k 300 --psi-steps 3 --lr 1e-3 --looks 16 --average 0.998"
STYLE = "--objective diffusion --rank 8 --lr 1e-3 --looks 4"


class Part(NamedTuple):
    """One process of the recipe."""

    program: str  # a module of this folder, or train.py
    flags: str  # {out} is the recipe's folder, {names} a number
    needs: tuple[str, ...] = ()  # parts that come before
    share: float = 0.0  # of --steps
    batch: tuple[int, int] = (0, 0)  # on a processor, on a GPU


PARTS = {
    "vae": Part("train_vae", "--out {out}/vae", share=0.6, batch=(8, 64)),
    "text": Part("train_clip", "--out {out}/text --names {names}", share=0.4, batch=(64, 512)),
    "start": Part(
        "assemble",
        "--vae {out}/vae/vae.safetensors --text {out}/text/text.safetensors --names {names} "
        "--out {out}/start.safetensors",
        needs=("vae", "text"),
    ),
    "base": Part(
        "train.py",
        f"{LIKE_SD} {ART} --model {{out}}/start.safetensors --out {{out}}/base",
        needs=("start",),
        share=1.0,
        batch=(16, 512),
    ),
    "decoder": Part(
        "train_vae",
        "--init {out}/vae/vae.safetensors --sharpen 12 --lr 2e-4 --out {out}/decoder",
        needs=("vae",),
        share=0.03,
        batch=(8, 32),
    ),
    "judge": Part(
        "train_judge",
        "--vae {out}/vae/vae.safetensors --out {out}/judge --names {names}",
        needs=("vae",),
        share=0.4,
        batch=(64, 256),
    ),
    "model": Part(
        "assemble",
        "--vae {out}/decoder/vae.safetensors --text {out}/text/text.safetensors --names {names} "
        "--unet {out}/base/model.safetensors --out {out}/model.safetensors",
        needs=("base", "decoder"),
    ),
    "lcm": Part(
        "train.py",
        f"{LCM} {ART} --model {{out}}/model.safetensors --out {{out}}/lcm",
        needs=("model",),
        share=0.5,
        batch=(12, 256),
    ),
    "styles": Part("make_styles", "{out}/styles --names {names}"),
}
for style in STYLES:
    PARTS[style] = Part(
        "train.py",
        f"{STYLE} --data {{out}}/styles/{style} --model {{out}}/model.safetensors "
        f"--out {{out}}/{style}",
        needs=("model", "styles"),
        share=0.1,
        batch=(16, 64),
    )


def command(part: Part, args: argparse.Namespace) -> list[str]:
    """The part's command line."""
    script = part.program == "train.py"
    line = [part.program] if script else ["-m", f"weights.emoji.{part.program}"]
    line += [flag.format(out=args.out, names=args.names) for flag in part.flags.split()]
    if part.share:
        batch = args.batch or part.batch[args.device == "cuda"]
        line += ["--steps", str(max(1, round(part.share * args.steps))), "--batch", str(batch)]
        line += ["--device", args.device]
        line += ["--looks", str(args.looks)] if args.looks else []
    if script:
        folder = Path(line[line.index("--out") + 1])
        line += ["--resume"] if list(folder.glob("state_*.safetensors")) else []
        line += ["--compile"] if args.device == "cuda" else []
    return [sys.executable, *line]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("out", type=Path, help="folder for everything that is made")
    add("--names", type=int, default=300, help="how many names of names.txt (default 300)")
    add("--steps", type=int, default=16000, help="steps of the UNet (default 16000)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (default cpu)")
    at_once = "parts that train side by side (default 1)"
    add("--at-once", type=int, default=1, metavar="N", help=at_once)
    parts = f"only some of: {', '.join(PARTS)}"
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=parts)
    add("--batch", type=int, help="of every part, to try the recipe with tiny numbers")
    add("--looks", type=int, help="compositions of each drawing, likewise")
    args = parser.parse_args()
    for flag in ("names", "steps", "at_once", "batch", "looks"):
        if (value := getattr(args, flag)) is not None and value < 1:
            parser.error(f"--{flag.replace('_', '-')} is {value}; give 1 or more")
    if args.out.is_file():
        parser.error(f"{args.out} is a file; give a folder")
    args.out.mkdir(parents=True, exist_ok=True)

    def done(part: str) -> Path:
        return args.out / f"{part}.done"

    todo = [part for part in args.only or PARTS if not done(part).exists()]
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    while todo or running:
        ready = [name for name in todo if all(done(n).exists() for n in PARTS[name].needs)]
        for name in ready[: args.at_once - len(running)]:
            line = command(PARTS[name], args)
            print(f"{name}: python {' '.join(line[1:])}", flush=True)
            with open(args.out / f"{name}.log", "a") as log:
                process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
            running[name] = process, time.time()
            todo.remove(name)
        if not running:
            sys.exit(f"{todo[0]} needs {', '.join(PARTS[todo[0]].needs)} first")
        time.sleep(0.2)
        for name, (process, start) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            last = (args.out / f"{name}.log").read_text().splitlines()[-1:]
            print(f"{name}: {time.time() - start:.0f} s. {' '.join(last)}", flush=True)
            if process.returncode:
                [other.terminate() for other, _ in running.values()]
                sys.exit(f"{name} failed; see {args.out / name}.log")
            done(name).touch()


if __name__ == "__main__":
    main()
