"""Draw pictures from prompts: LCM-LoRA in 4 steps, or the plain model by DDIM or DPM-Solver++.

    python sample.py "a slice of pizza"
    python sample.py "penguin" "rocket, noto style, on a pink background" --sheet sheet.png
    python sample.py "cat face" --lora weights/emoji/blueprint.safetensors:0.8 --lora lcm:1.0
    python sample.py "cat face" --sampler ddim --steps 25 --guidance 3

With an LCM-LoRA the guidance is distilled into the weights: --guidance 1 (off) is right, at most 2.
The paper's w is guidance - 1. Several --lora add up exactly: tau_mix = lambda1 tau_style + lambda2
tau_lcm.
"""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minilcm import __version__
from minilcm.data.pictures import contact_sheet, read_image, save_png, to_images
from minilcm.files.checkpoint import load_checkpoint, weight_shapes
from minilcm.files.identify import open_checkpoint
from minilcm.files.lora_file import check_lora, parse_lora, read_recipe, read_tau
from minilcm.files.names import split_parts
from minilcm.files.tools import Lora
from minilcm.generate import SAMPLERS, generate, timesteps
from minilcm.lcm import GRID, guidance_embedding
from minilcm.lora import Tau
from minilcm.merge import combine, merge_into
from minilcm.model.precision import DTYPES, default_dtype, resident
from minilcm.model.text import TextEncoder, lora_weights
from minilcm.model.tiny_vae import TinyDecoder
from minilcm.model.unet import Cond, UNet
from minilcm.schedule import make_schedule
from minilcm.solver import EpsFn, guided_eps

WEIGHTS = Path(__file__).parent / "weights/emoji"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = lambda message: sys.exit(f"sample.py: {message}")  # one line, exit 1
    add = parser.add_argument
    grammar = "what to draw: NAME[, STYLE style][, on a COLOR background]"
    add("prompts", nargs="*", metavar="PROMPT", help=grammar)
    add("--list", action="store_true", help="print the names the model knows, one a line, and stop")
    add("--count", type=int, default=1, metavar="N", help="pictures per prompt (default 1)")
    add("--seed", type=int, default=0, help="picture i of all, prompt by prompt, has seed + i")
    steps = ", ".join(f"{name} 1-{x.most} (default {x.steps})" for name, x in SAMPLERS.items())
    add("--steps", type=int, help=f"sampling steps: {steps}")
    add("--sampler", choices=SAMPLERS, default="lcm", help="lcm needs an LCM-LoRA (default lcm)")
    guidance = "1 is off; above, 2 evaluations per step (default: 1 for lcm, else the model's own)"
    add("--guidance", type=float, help=guidance)
    add("--negative", default="", metavar="PROMPT", help="steer away from it, by guidance above 1")
    add(
        "--lora",
        action="append",
        metavar="FILE[:LAMBDA]",
        help="add a LoRA, times LAMBDA (default 1); repeatable. The word lcm means the shipped "
        "LCM-LoRA, which the shipped model uses with --sampler lcm if no --lora is given; other "
        "models need their own",
    )
    from_image = " or ".join(name for name, way in SAMPLERS.items() if way.stochastic)
    image = f"start from this picture (image to image, --sampler {from_image})"
    add("--image", type=Path, metavar="FILE", help=image)
    add("--strength", type=float, default=0.5, help="of --image, 0-1: how much to redraw (0.5)")
    add("--size", metavar="WxH", help="pixels, e.g. 64x64 (default: the model's own size)")
    add(
        "--model",
        type=Path,
        default=WEIGHTS / "model.safetensors",
        help="a checkpoint: SD1.x, SD2.x, SDXL or a relative (default: the shipped emoji model)",
    )
    says = "what the UNet predicts, noise or v (default: what the file says, else eps)"
    add("--prediction", choices=["eps", "v"], help=says)
    vae = "a VAE, or a tiny decoder (TAESD, TAESDXL), in place of the checkpoint's"
    add("--vae", type=Path, metavar="FILE", help=vae)
    add("--dtype", choices=DTYPES, help="of UNet and text encoder (default: the fastest safe one)")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=cuda, help="default: cuda if available")
    where = "one picture's file, or a folder (default pictures/)"
    add("--out", default="pictures/", metavar="FILE.png|DIR/", help=where)
    add("--sheet", type=Path, metavar="FILE.png", help="also write a labelled sheet of all")
    args = parser.parse_args(argv)
    check_values(args, parser.error)
    return args


def check_values(args: argparse.Namespace, error: Callable[[str], None]) -> None:
    """Call `error` for the first senseless value; fill in what depends on other flags."""
    args.steps = SAMPLERS[args.sampler].steps if args.steps is None else args.steps
    args.prompts = [" ".join(prompt.split()) for prompt in args.prompts]  # one line each
    args.negative = " ".join(args.negative.split())
    if not args.prompts and not args.list:
        error('no prompt; try: python sample.py "a slice of pizza"')
    if args.count < 1:
        error(f"--count is {args.count}; give 1 or more")
    if args.out.endswith(".png") and len(args.prompts) * args.count > 1:
        count = len(args.prompts) * args.count
        error(f"--out {args.out} is one file for {count} pictures; give a folder: DIR/")
    if re.search(r"\.(jpe?g|webp|gif|bmp|tiff?)$", args.out, re.IGNORECASE):
        error(f"--out {args.out}: pictures are written as .png, with their recipe inside")
    if args.sheet and args.sheet.suffix != ".png":
        error(f"--sheet {args.sheet}: give a file that ends in .png")
    if args.image and not SAMPLERS[args.sampler].stochastic:
        error("--image needs --sampler lcm")
    if args.guidance is not None and not math.isfinite(args.guidance):
        error(f"--guidance is {args.guidance}; give a number, 1 for none")
    if not 1 / GRID <= args.strength <= 1:
        error(f"--strength is {args.strength}; give a number from {1 / GRID:g} to 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        error("--device cuda, but PyTorch sees no CUDA device; give --device cpu")


def parse_size(text: str | None, native: int, multiple: int) -> tuple[int, int]:
    """`WxH` -> (W, H), both multiples of `multiple` so that every level of the networks halves
    evenly.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text or f"{native}x{native}")
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(size) < multiple or size[0] % multiple or size[1] % multiple:
        example = f"for example {native}x{native}"
        raise ValueError(f"--size {text}: give WxH in multiples of {multiple}, {example}")
    return size


def nearest_names(prompt: str, names: tuple[str, ...]) -> list[str]:
    """[] if the prompt holds a known name, or a word that only one name has; else the three most
    similar names.
    """
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    once = [w for w in words if sum(w in name.split() for name in names) == 1]
    if once or any(f" {name} " in f" {' '.join(words)} " for name in names):
        return []
    return difflib.get_close_matches(prompt.lower(), names, n=3, cutoff=0.0)


def speeds_up(path: Path) -> bool:
    """Whether the recipe in this LoRA file says that it holds an LCM-LoRA, alone or combined with
    others.
    """
    recipe = read_recipe(path)
    return recipe.get("objective") == "lcm" or "combined" in recipe


# ---- the steps of main


def read_loras(
    args: argparse.Namespace, shapes: dict[str, Tensor], full_lcm: bool
) -> tuple[list[Lora], list[Tau]]:
    """What --lora names, or else the shipped LCM-LoRA where it belongs; `shapes` is of the model
    that it must fit.
    """
    needs_lcm = SAMPLERS[args.sampler].needs_lcm_lora
    shipped = args.model.resolve() == (WEIGHTS / "model.safetensors").resolve()
    words = args.lora or (["lcm"] if shipped and needs_lcm else [])
    loras = [parse_lora(word) for word in words]
    lcm = WEIGHTS / "lcm_lora.safetensors"
    loras = [(lcm if str(path) == "lcm" else path, lam) for path, lam in loras]
    if needs_lcm and not loras and not full_lcm:
        print("no --lora: few steps will be blurred, unless an LCM-LoRA is merged into this model")
    taus = [read_tau(path) for path, _ in loras]
    if needs_lcm and shipped and not any(speeds_up(path) for path, _ in loras):
        print("no LCM-LoRA among these --lora: few steps will be blurred; add --lora lcm")
    for (path, _), tau in zip(loras, taus):
        check_lora(shapes, tau, str(path))
    return loras, taus


def add_loras(unet: UNet, text: TextEncoder, loras: list[Lora], taus: list[Tau]) -> None:
    """tau_mix = lambda1 tau_style + lambda2 tau_lcm, into the weights, summed in float32."""
    of_unet, of_text = split_parts(combine(taus, [lam for _, lam in loras]))
    merge_into(unet, of_unet)
    merge_into(lora_weights(text), of_text)


def encode(
    args: argparse.Namespace, text: TextEncoder, size: tuple[int, int]
) -> tuple[list[Cond], Cond]:
    """(the Cond of each prompt, that of --negative or the null condition), on the CPU."""
    with resident(text, args.device):
        # one at a time: a batch rounds differently
        conds = [text.encode([prompt], size).to("cpu") for prompt in args.prompts]
        neg_cond = text.encode([args.negative], size) if args.negative else text.null_cond(1, size)
    return conds, neg_cond.to("cpu")


def draw_all(
    args: argparse.Namespace,
    unet: UNet,
    conds: list[Cond],
    neg_cond: Cond,
    w: float,
    shape: tuple[int, ...],
    image: Tensor | None,
) -> list[Tensor]:
    """The latents of each prompt's --count pictures; on Ctrl-C those that are drawn."""
    jobs = [cond for cond in conds for _ in range(args.count)]
    latents, schedule = [], make_schedule(unet.cfg.v, unet.cfg.zero_snr)

    def network(cond: Cond) -> EpsFn:
        if unet.cfg.w_dim is not None:  # a full LCM takes w itself, as an input
            w_emb = guidance_embedding(torch.tensor([w]), unet.cfg.w_dim).to(args.device)
            return lambda z_t, t: unet(z_t, t, cond, w_emb).float()
        return guided_eps(unet, cond, neg_cond.to(args.device), w)

    with resident(unet, args.device):
        # one picture at a time: its bytes cannot depend on its neighbours
        bar = tqdm(jobs, desc="pictures", disable=None if len(jobs) > 1 else True)
        for i, cond in enumerate(bar):
            eps_fn, seeds = network(cond.to(args.device)), [args.seed + i]
            strength = args.strength if args.image else 1.0
            how = dict(image=image, strength=strength, device=args.device, schedule=schedule)
            try:
                latents.append(generate(eps_fn, seeds, shape, args.sampler, args.steps, **how))
            except KeyboardInterrupt:
                print(f"stopped after {i} of {len(jobs)} pictures")
                break
    return latents


def write_pictures(
    args: argparse.Namespace, images: list[Image.Image], settings: dict[str, str]
) -> None:
    """A PNG for each image, with its recipe in A1111's form, and the sheet."""
    out = Path(args.out)
    # pictures of earlier runs are kept
    there = out.glob("[0-9][0-9][0-9][0-9]_*.png") if out.is_dir() else []
    first = max((int(path.name[:4]) + 1 for path in there), default=0)
    jobs = [prompt for prompt in args.prompts for _ in range(args.count)]
    for i, (prompt, picture) in enumerate(zip(jobs, images)):
        recipe = settings | {"Seed": str(args.seed + i)}
        order = "Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "Lora", "Version"
        parameters = f"{prompt}\n" + (
            f"Negative prompt: {args.negative}\n" if args.negative else ""
        )
        parameters += ", ".join(f"{key}: {recipe[key]}" for key in order)
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        name = f"{first + i:04d}_{slug}_seed{args.seed + i}.png"
        path = out if args.out.endswith(".png") else out / name
        save_png(path, picture, parameters)
        print(path)
    if args.sheet and images:
        labels = [f"{prompt} ({args.seed + i})" for i, prompt in enumerate(jobs[: len(images)])]
        sheet = contact_sheet(images, labels, min(6, len(images)))
        save_png(args.sheet, sheet, " ".join(sys.argv[1:]))
        print(args.sheet)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    # ---- what is asked for, checked against the header before a tensor is read
    checkpoint = open_checkpoint(args.model, args.prediction)
    config = checkpoint.config
    if args.list:
        return print("\n".join(config.names))
    full_lcm = config.unet.w_dim is not None  # takes w as an input, and no LCM-LoRA
    # an LCM-LoRA has its guidance in the weights
    usual = config.guidance if full_lcm or not SAMPLERS[args.sampler].needs_lcm_lora else 1.0
    guidance = usual if args.guidance is None else args.guidance
    factor = 2 ** (len(config.vae.channels) - 1)  # pixels per point of the latent
    coarsest = factor * 2 ** (len(config.unet.channels) - 1)  # pixels per point of the lowest level
    size = width, height = parse_size(args.size, config.size, coarsest)
    grid = timesteps(args.sampler, args.steps, args.strength if args.image else 1.0)
    pixels = read_image(args.image, size) if args.image else None
    loras, taus = read_loras(args, weight_shapes(checkpoint.header), full_lcm)
    for path in [args.out] + ([args.sheet] if args.sheet else []):  # a wrong path costs no work
        folder = Path(path).parent if str(path).endswith(".png") else Path(path)
        folder.mkdir(parents=True, exist_ok=True)
    for prompt in args.prompts:
        if config.names and (near := nearest_names(prompt, config.names)):
            names = ", ".join(near)
            print(f"{prompt!r} holds no name this model knows; nearest: {names} (all: --list)")

    # ---- the model, with the LoRA in its weights
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(args.device)
    unet, vae, text, _ = load_checkpoint(checkpoint, dtype, args.vae)
    if args.image and isinstance(vae, TinyDecoder):
        raise ValueError(f"{args.vae}: a decoder alone cannot read --image; leave out --vae")
    add_loras(unet, text, loras, taus)

    # ---- prompts -> latents -> pictures
    conds, neg_cond = encode(args, text, size)
    image = None if pixels is None else vae.encode_mean(pixels)
    at = " ".join(map(str, grid))
    print(f"{args.sampler}, {args.steps} steps at t = {at}, {str(dtype)[6:]} on {args.device}")
    shape = (4, height // factor, width // factor)
    latents = draw_all(args, unet, conds, neg_cond, guidance - 1, shape, image)
    decode = vae.decode if width * height <= 1024 * 1024 else vae.decode_tiled
    with resident(vae, args.device):
        images = [to_images(decode(z0))[0] for z0 in latents]
    settings = {
        "Steps": str(args.steps),
        "Sampler": args.sampler,
        "CFG scale": f"{guidance:g}",
        "Size": f"{width}x{height}",
        "Model": args.model.stem,
        "Lora": ", ".join(f"{path.stem}:{lam:g}" for path, lam in loras) or "none",
        "Version": f"minilcm {__version__}",
    }
    write_pictures(args, images, settings)


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped")
