"""Draw pictures from prompts: LCM-LoRA in 4 steps, or the plain model by DDIM or DPM-Solver++.

    python sample.py "a slice of pizza"
    python sample.py "penguin" "rocket, noto style, on a pink background" --count 4 --sheet sheet.png
    python sample.py "cat face" --lora weights/emoji/blueprint.safetensors:0.8 --lora lcm:1.0
    python sample.py "cat face" --sampler ddim --steps 25 --guidance 3

With an LCM-LoRA the guidance is distilled into the weights: --guidance 1 (off) is right, at most 2. The paper's w is
guidance - 1. Several --lora add up exactly: tau' = lambda1 tau_style + lambda2 tau_lcm.
"""

import argparse
import difflib
import math
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from minilcm import __version__
from minilcm.data.pictures import contact_sheet, read_image, save_png, to_images
from minilcm.files.checkpoint import load_model
from minilcm.files.lora_file import parse_lora, read_recipe, read_tau
from minilcm.lcm import K, guidance_embedding, lcm_grid, sample_lcm
from minilcm.merge import check_fit, combine, merge_into, split_parts
from minilcm.model.precision import default_dtype, resident
from minilcm.model.text import lora_weights
from minilcm.model.unet import Cond
from minilcm.schedule import add_noise, make_schedule
from minilcm.solver import EpsFn, ddim_grid, dpmpp_grid, guided_eps, sample_ddim, sample_dpmpp_2m

WEIGHTS = Path(__file__).parent / "weights/emoji"
STEPS = {"lcm": 4, "ddim": 25, "dpmpp": 20}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"sample.py: {message}")  # one line, exit 1
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw: NAME[, STYLE style][, on a COLOR background]")
    add("--list", action="store_true", help="print the names the model knows, one a line, and stop")
    add("--count", type=int, default=1, metavar="N", help="pictures a prompt (default 1)")
    add(
        "--seed", type=int, default=0, help="picture i of the run, prompts first, then count, uses seed + i (default 0)"
    )
    add("--steps", type=int, help="sampling steps: lcm 1-50 (default 4), ddim (25) and dpmpp (20) 1-1000")
    add("--sampler", choices=STEPS, default="lcm", help="lcm needs an LCM-LoRA to be sharp (default lcm)")
    add(
        "--guidance", type=float, help="1 is off; 2 evaluations a step above (default: 1 for lcm, else the model's own)"
    )
    add("--negative", default="", metavar="PROMPT", help="steer away from this; needs guidance above 1")
    add(
        "--lora",
        action="append",
        metavar="FILE[:LAMBDA]",
        help="add a LoRA, times LAMBDA (default 1); repeatable. The word lcm means the shipped LCM-LoRA, which the "
        "shipped model uses for --sampler lcm when no --lora is given; other models need their own",
    )
    add("--image", type=Path, metavar="FILE", help="start from this picture (image to image, --sampler lcm)")
    add("--strength", type=float, default=0.5, help="with --image: how much to redraw, 0-1 (default 0.5)")
    add("--size", metavar="WxH", help="pixels, e.g. 64x64 (default: the model's own size)")
    add(
        "--model",
        type=Path,
        default=WEIGHTS / "model.safetensors",
        help="checkpoint: SD1.x, SDXL, SSD-1B, or by minilcm (default: the shipped emoji model)",
    )
    add("--vae", type=Path, metavar="FILE", help="take the VAE from this file (for checkpoints without one)")
    add(
        "--dtype", choices=DTYPES, help="number format of UNet and text encoder (default: what the processor does well)"
    )
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda if there)",
    )
    add(
        "--out",
        default="pictures/",
        metavar="FILE.png|DIR/",
        help="one picture's file, or a folder (default pictures/)",
    )
    add("--sheet", type=Path, metavar="FILE.png", help="also write one labelled sheet of all pictures")
    args = parser.parse_args(argv)

    args.steps = STEPS[args.sampler] if args.steps is None else args.steps
    args.prompts = [" ".join(prompt.split()) for prompt in args.prompts]  # one line each, in the PNG and on the sheet
    args.negative = " ".join(args.negative.split())
    if not args.prompts and not args.list:
        parser.error('no prompt; try: python sample.py "a slice of pizza"')
    if args.count < 1:
        parser.error(f"--count is {args.count}; give 1 or more")
    if args.out.endswith(".png") and len(args.prompts) * args.count > 1:
        parser.error(f"--out {args.out} is one file for {len(args.prompts) * args.count} pictures; give a folder: DIR/")
    if re.search(r"\.(jpe?g|webp|gif|bmp|tiff?)$", args.out, re.IGNORECASE):
        parser.error(f"--out {args.out}: pictures are written as .png, with their recipe inside")
    if args.sheet and args.sheet.suffix != ".png":
        parser.error(f"--sheet {args.sheet}: give a file that ends in .png")
    if args.image and args.sampler != "lcm":
        parser.error("--image needs --sampler lcm")
    if args.guidance is not None and not math.isfinite(args.guidance):
        parser.error(f"--guidance is {args.guidance}; give a number, 1 for none")
    if not 1 / K <= args.strength <= 1:
        parser.error(f"--strength is {args.strength}; give a number from {1 / K:g} to 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch sees no CUDA device; give --device cpu")
    return args


def parse_size(text: str | None, native: int, multiple: int) -> tuple[int, int]:
    """`WxH` -> (W, H), both multiples of `multiple` so that every level of the networks halves evenly."""
    match = re.fullmatch(r"(\d+)x(\d+)", text or f"{native}x{native}")
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(size) < multiple or size[0] % multiple or size[1] % multiple:
        raise ValueError(f"--size {text}: give WxH in multiples of {multiple}, for example {native}x{native}")
    return size


def nearest_names(prompt: str, names: tuple[str, ...]) -> list[str]:
    """[] if the prompt holds a known name, or a word that only one name has; else the three most similar names."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    once = [w for w in words if sum(w in name.split() for name in names) == 1]
    if once or any(f" {name} " in f" {' '.join(words)} " for name in names):
        return []
    return difflib.get_close_matches(prompt.lower(), names, n=3, cutoff=0.0)


def speeds_up(path: Path) -> bool:
    """Does this LoRA file of minilcm say that it holds an LCM-LoRA, alone or combined with others?"""
    recipe = read_recipe(path)
    return recipe.get("objective") == "lcm" or "combined" in recipe


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    schedule = make_schedule()
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(args.device)
    unet, vae, text, config = load_model(args.model, dtype, args.vae)
    if args.list:
        return print("\n".join(config.names))
    full_lcm = config.unet.w_dim is not None  # takes w through an embedding, and no LCM-LoRA
    if args.guidance is None:  # an LCM-LoRA has its guidance in the weights
        args.guidance = 1.0 if args.sampler == "lcm" and not full_lcm else config.guidance
    w = args.guidance - 1
    multiple = vae.factor * 2 ** (len(config.unet.channels) - 1)
    width, height = parse_size(args.size, config.size, multiple)
    strength = args.strength if args.image else 1.0
    if args.sampler == "lcm":
        grid = lcm_grid(args.steps, strength)
    else:
        grid = dpmpp_grid(args.steps) if args.sampler == "dpmpp" else [t for t, _ in ddim_grid(args.steps)]
    image = vae.encode_mean(read_image(args.image, (width, height))) if args.image else None

    # tau' = lambda1 tau_style + lambda2 tau_lcm, into the weights, summed in float32
    shipped = args.model.resolve() == (WEIGHTS / "model.safetensors").resolve()
    words = args.lora or (["lcm"] if shipped and args.sampler == "lcm" else [])
    loras = [parse_lora(word) for word in words]
    loras = [(WEIGHTS / "lcm_lora.safetensors" if str(path) == "lcm" else path, lam) for path, lam in loras]
    if args.sampler == "lcm" and not loras and not full_lcm:
        print("no --lora: few steps are blurred, unless an LCM-LoRA is merged into this model")
    taus = [read_tau(path) for path, _ in loras]
    if args.sampler == "lcm" and shipped and not any(speeds_up(path) for path, _ in loras):
        print("no LCM-LoRA among these --lora: few steps are blurred; add --lora lcm")
    weights = lora_weights(text)
    for (path, _), tau in zip(loras, taus):
        for model, part in zip((unet, weights), split_parts(tau)):
            check_fit(model, part, str(path))
    of_unet, of_text = split_parts(combine(taus, [lam for _, lam in loras]))
    merge_into(unet, of_unet)
    merge_into(weights, of_text)

    out = Path(args.out)
    for folder in [out.parent if args.out.endswith(".png") else out] + ([args.sheet.parent] if args.sheet else []):
        folder.mkdir(parents=True, exist_ok=True)  # before the work, so that a wrong path costs none

    for prompt in args.prompts:
        if config.names and (near := nearest_names(prompt, config.names)):
            print(f"{prompt!r} holds no name this model knows; nearest: {', '.join(near)} (all: --list)")
    with resident(text, args.device):
        # one at a time too: a batch rounds differently
        conds = [text.encode([prompt], (width, height)).to("cpu") for prompt in args.prompts]
        neg_cond = (
            text.encode([args.negative], (width, height)) if args.negative else text.null_cond(1, (width, height))
        )
    print(f"{args.sampler}, {args.steps} steps at t = {' '.join(map(str, grid))}, {str(dtype)[6:]} on {args.device}")

    def network(cond: Cond) -> EpsFn:
        if full_lcm:
            w_emb = guidance_embedding(torch.tensor([w]), config.unet.w_dim).to(args.device)
            return lambda z_t, t: unet(z_t, t, cond, w_emb).float()
        return guided_eps(unet, cond, neg_cond.to(args.device), w)

    jobs = [(i, prompt) for i, prompt in enumerate(args.prompts) for _ in range(args.count)]
    latents = []
    with resident(unet, args.device):
        # one picture at a time: its bytes cannot depend on its neighbours
        for k, (i, _) in enumerate(tqdm(jobs, desc="pictures", disable=None if len(jobs) > 1 else True)):
            generator = torch.Generator().manual_seed(args.seed + k)
            shape = (1, 4, height // vae.factor, width // vae.factor)
            z_T = torch.randn(shape, generator=generator).to(args.device)
            eps_fn = network(conds[i].to(args.device))
            try:
                if args.sampler == "lcm":
                    start = z_T if image is None else add_noise(image.to(args.device), z_T, grid[0], schedule)
                    z0 = sample_lcm(eps_fn, start, schedule, args.steps, [generator], strength)
                elif args.sampler == "ddim":
                    z0 = sample_ddim(eps_fn, z_T, schedule, args.steps)
                else:
                    z0 = sample_dpmpp_2m(eps_fn, z_T, schedule, args.steps)
            except KeyboardInterrupt:  # keep what is drawn
                print(f"stopped after {k} of {len(jobs)} pictures")
                break
            latents.append(z0)
    decode = vae.decode if width * height <= 1024 * 1024 else vae.decode_tiled
    with resident(vae, args.device):
        images = [to_images(decode(z0))[0] for z0 in latents]

    there = out.glob("[0-9][0-9][0-9][0-9]_*.png") if out.is_dir() else []  # of earlier runs, which are kept
    first = max((int(path.name[:4]) + 1 for path in there), default=0)
    for k, ((_, prompt), picture) in enumerate(zip(jobs, images)):
        lora = ", ".join(f"{path.stem}:{lam:g}" for path, lam in loras)
        parameters = f"{prompt}\n" + (f"Negative prompt: {args.negative}\n" if args.negative else "")
        parameters += f"Steps: {args.steps}, Sampler: {args.sampler}, CFG scale: {1 + w:g}, Seed: {args.seed + k}, "
        parameters += (
            f"Size: {width}x{height}, Model: {args.model.stem}, Lora: {lora or 'none'}, Version: minilcm {__version__}"
        )
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        path = out if args.out.endswith(".png") else out / f"{first + k:04d}_{slug}_seed{args.seed + k}.png"
        save_png(path, picture, parameters)
        print(path)
    if args.sheet and images:
        labels = [f"{prompt} ({args.seed + k})" for k, (_, prompt) in enumerate(jobs[: len(images)])]
        save_png(args.sheet, contact_sheet(images, labels, min(6, len(images))), " ".join(sys.argv[1:]))
        print(args.sheet)


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped")
