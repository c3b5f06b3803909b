"""Draw pictures from prompts: LCM-LoRA in 4 steps, or the plain model by DDIM or DPM-Solver++.

    python sample.py "a slice of pizza"
    python sample.py "penguin" "rocket, noto style, on a pink background" --sheet sheet.png
    python sample.py "cat face, blueprint style" --lora blueprint --lora lcm
    python sample.py "cat face" --sampler ddim --steps 25 --guidance 3
    python sample.py --again pictures/0000_a-slice-of-pizza_seed0.png

With an LCM-LoRA the guidance is distilled into the weights: --guidance 1 (off) is right, at most 2.
LCM's w is guidance - 1. Several --lora add up exactly: tau_mix = lambda1 tau_style + lambda2
tau_lcm.
"""

import math
import re
import secrets
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minilcm.cli.advice import advise, list_names, lora_tags
from minilcm.cli.output import run_script
from minilcm.cli.recipe import check_same_files, command_again, command_line, parameters, recipe_of
from minilcm.data import pictures
from minilcm.data.folders import one_line
from minilcm.files.checkpoint import load_checkpoint, weight_shapes
from minilcm.files.identify import Config, is_large, open_checkpoint
from minilcm.files.lora_file import (
    EMOJI,
    Lora,
    find_lora,
    is_shipped,
    parse_lora,
    read_taus,
    speeds_up,
)
from minilcm.files.safetensors_file import all_finite
from minilcm.generate import SAMPLERS, generate, timesteps
from minilcm.lcm import GRID, guidance_embedding
from minilcm.lora import Tau
from minilcm.merge import combine, merge_into
from minilcm.model.packed import pack_for_sampling
from minilcm.model.precision import DTYPES, batch_that_fits, default_dtype, resident
from minilcm.model.text import TextEncoder, lora_weights
from minilcm.model.tiny_vae import TinyDecoder
from minilcm.model.unet import Cond, UNet
from minilcm.schedule import make_schedule
from minilcm.solver import EpsFn, guided_eps

SEEDS = 1 << 64  # PyTorch's generators take 0 to one less; on the CPU the lower 32 bits count


# ---- the command line


def parse(argv: list[str] | None = None) -> Namespace:
    how = dict(formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = ArgumentParser(description=__doc__, **how)
    parser.error = lambda message: sys.exit(f"sample.py: {message}")  # one line, exit 1
    add, group = parser.add_argument, parser.add_argument_group
    add("prompts", nargs="*", metavar="PROMPT", help="NAME[, STYLE style][, on a COLOR background]")
    add("--list", action="store_true", help="print the names, styles, colours it knows, and stop")
    again = "draw this picture again, by the recipe inside it; flags beside it replace its own"
    add("--again", type=Path, metavar="FILE.png", help=again)
    add("--count", type=int, default=1, metavar="N", help="pictures per prompt (default 1)")
    add("--batch", type=int, metavar="N", help="pictures at a time (default: what fits; CPU: 1)")
    add("--seed", type=int, default=0, help="picture i has seed + i (default 0; -1: random)")
    add_flags_of_sampling(group("sampling").add_argument)
    add = group("model").add_argument
    add("--size", metavar="WxH", help="pixels, e.g. 128x128 (default: the model's own size)")
    model = "a checkpoint: SD1.x, SD2.x, SDXL or a relative (default: the shipped emoji model)"
    add("--model", type=Path, default=EMOJI / "model.safetensors", help=model)
    says = "what the UNet predicts, noise or v (default: what the file says, else eps)"
    add("--prediction", choices=["eps", "v"], help=says)
    vae = "a VAE, or a tiny decoder (TAESD, TAESDXL), in place of the checkpoint's"
    add("--vae", type=Path, metavar="FILE", help=vae)
    add("--dtype", choices=DTYPES, help="of UNet and text encoder (default: the fastest safe one)")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    device = "mps is Apple's GPU (default: cuda if available, else cpu)"
    add("--device", choices=["cpu", "cuda", "mps"], default=cuda, help=device)
    add = group("output").add_argument
    add("--out", default="pictures/", metavar="FILE.png|DIR/", help="default: the folder pictures/")
    add("--sheet", type=Path, metavar="FILE.png", help="also write a labelled sheet of all")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.again:
        if args.prompts:
            parser.error(f"--again draws the picture's own prompt; leave out {args.prompts[0]!r}")
        args = parser.parse_args(command_again(args.again, argv, args.sampler))
    args.argv = argv
    check_values(args, parser.error)
    return args


def add_flags_of_sampling(add: Callable) -> None:
    steps = [f"{name} 1-{x.most_steps} (default {x.default_steps})" for name, x in SAMPLERS.items()]
    add("--steps", type=int, help=f"sampling steps: {', '.join(steps)}")
    at = "the timesteps to step through, descending, in place of --steps"
    add("--timesteps", metavar="T1,T2,...", help=at)
    add("--gamma", type=float, help="lcm: TCD's, from no fresh noise, 0, to all, 1 (default: off)")
    add("--sampler", choices=SAMPLERS, default="lcm", help="lcm needs an LCM-LoRA (default lcm)")
    guidance = "CFG; 1 or 0 is off; above, 2 evaluations a step (default: 1 for lcm, else the "
    guidance += "model's; a full LCM takes it as an input: the model's, 1 evaluation)"
    add("--guidance", type=float, help=guidance)
    add("--negative", default="", metavar="PROMPT", help="steer away from it, by guidance above 1")
    lora = "add a LoRA, times LAMBDA (default 1); repeatable; lcm, blueprint and papercut are the "
    lora += "shipped files; without any --lora the shipped model takes lcm for --sampler lcm"
    add("--lora", action="append", metavar="FILE[:LAMBDA]", help=lora)
    add("--image", type=Path, metavar="FILE", help="start from this picture (image to image)")
    add("--strength", type=float, help="of --image, 0.02-1: how much to redraw (default 0.5)")


def check_values(args: Namespace, error: Callable[[str], None]) -> None:
    """Call `error` for the first senseless value; fill in what depends on other flags."""
    if args.timesteps is not None:
        if args.steps is not None or args.strength is not None:
            error("--timesteps says which steps to take; leave out --steps and --strength")
        if not re.fullmatch(r"\d+(,\d+)*", args.timesteps):
            error(f"--timesteps is {args.timesteps!r}; give numbers, for example 999,749,499,249")
        args.timesteps = [int(t) for t in args.timesteps.split(",")]
        args.steps = len(args.timesteps)
    args.steps = SAMPLERS[args.sampler].default_steps if args.steps is None else args.steps
    try:
        *args.prompts, args.negative = map(one_line, (*args.prompts, args.negative))
    except UnicodeEncodeError as wrong:
        error(f"{wrong.object!a} is not UTF-8 ({wrong.reason}); type it anew")
    count = len(args.prompts) * args.count
    if not args.prompts and not args.list:
        error('no prompt; try: python sample.py "a slice of pizza"')
    for tag, lora in lora_tags(" ".join([*args.prompts, args.negative])):
        lcm = "" if args.lora or args.sampler != "lcm" else " --lora lcm"
        error(f"{tag} in a prompt is not read; give --lora {lora}{lcm}")
    for flag in ("count", "batch"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            error(f"--{flag} is {getattr(args, flag)}; give 1 or more")
    if not -1 <= args.seed < SEEDS:
        error(f"--seed is {args.seed}; give 0 to {SEEDS - 1}, or -1 for a random one")
    if args.seed + count > SEEDS:
        error(f"--seed {args.seed} leaves no seeds for {count} pictures; the last is {SEEDS - 1}")
    png, suffix = pictures.is_png(args.out), Path(args.out).suffix.lower()
    if png and count > 1:
        error(f"--out {args.out} is one file for {count} pictures; give a folder: DIR/")
    if not png and args.out[-1:] != "/" and suffix in Image.registered_extensions():
        error(f"--out {args.out}: pictures are written as .png, with their recipe inside")
    same = args.sheet and args.sheet.resolve() == Path(args.out).resolve()
    if args.sheet and (not pictures.is_png(args.sheet) or same):
        error(f"--sheet {args.sheet}: give a file that ends in .png, other than --out")
    if args.gamma is not None and not SAMPLERS[args.sampler].stochastic:
        error(f"--gamma needs --sampler lcm; {args.sampler} draws no noise between steps")
    if args.gamma is not None and not 0 <= args.gamma <= 1:
        error(f"--gamma is {args.gamma}; give a number from 0 to 1")
    if args.strength is not None and not args.image:
        error("--strength tells how much of --image to redraw; give --image FILE too")
    if args.strength is None:
        args.strength = 0.5 if args.image and not args.timesteps else 1.0
    if not 1 / GRID <= args.strength <= 1:
        error(f"--strength is {args.strength}; give a number from {1 / GRID:g} to 1")
    g = args.guidance
    if g is not None and (not math.isfinite(g) or g < 1 and g != 0):
        error(f"--guidance is {g}; give 1 or more (1 is off, and so is 0)")
    if args.device == "cuda" and not torch.cuda.is_available():
        error("--device cuda, but PyTorch sees no CUDA device; give --device cpu")
    if args.device == "mps" and not torch.backends.mps.is_available():
        error("--device mps, but PyTorch sees no GPU of Apple's; give --device cpu")


def parse_size(text: str | None, native: int, multiple: int) -> tuple[int, int]:
    """`WxH` -> (W, H), multiples of `multiple`, so that every level halves evenly."""
    match = re.fullmatch(r"(\d+)x(\d+)", text or f"{native}x{native}")
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(size) < multiple or size[0] % multiple or size[1] % multiple:
        example = f"for example {native}x{native}"
        raise ValueError(f"--size {text}: give WxH in multiples of {multiple}, {example}")
    return size


# ---- the steps of main


def settle(args: Namespace, config: Config) -> tuple[int, int]:
    """Fill in what depends on the model: size, guidance, LoRA, dtype; -> (h, w) of the latent."""
    way, shipped = SAMPLERS[args.sampler], is_shipped(args.model)
    factor = 2 ** (len(config.vae.channels) - 1)  # pixels per point of the latent
    args.size = parse_size(args.size, config.size, config.multiple)
    # an LCM-LoRA has its guidance in the weights; a full LCM takes it as an input
    own = 1.0 if way.needs_lcm_lora and config.unet.w_dim is None else config.guidance
    args.guidance = own if args.guidance is None else max(1.0, args.guidance)  # 0 is off, too
    words = args.lora or (["lcm"] if shipped and way.needs_lcm_lora else [])
    args.lora = [f"{path}:{lam}" for path, lam in map(parse_lora, words)]
    args.dtype = args.dtype or str(default_dtype(args.device)).removeprefix("torch.")
    if args.seed == -1:
        args.seed = secrets.randbelow(1 << 32)
        print(f"seed {args.seed}")
    return args.size[1] // factor, args.size[0] // factor


def add_loras(unet: UNet, text: TextEncoder, loras: list[Lora], taus: list[Tau]) -> None:
    """tau_mix = lambda1 tau_style + lambda2 tau_lcm, into the weights, summed in float32."""
    weights = dict(unet.named_parameters()) | lora_weights(text)
    merge_into(weights, combine(taus, [lam for _, lam in loras]))
    for path, lam in loras:
        name = f"{path.parent.name}/lora" if path.stem == "lora" else path.stem  # each run's is so
        print(f"{'LCM-LoRA' if speeds_up(path) else 'LoRA'} added: {name}, times {lam:g}")


def encode(args: Namespace, text: TextEncoder) -> tuple[Cond, Cond]:
    """(a row for each prompt, a row for --negative or the null condition), on the CPU."""
    # Apple's GPUs may err in PyTorch's own attention, which is the text encoder's: see layers.py
    with resident(text, "cpu" if args.device == "mps" else args.device):
        # one at a time: a batch rounds differently
        conds = [text.encode([prompt], args.size).to("cpu") for prompt in args.prompts]
        neg_cond = text.null_cond(1, args.size)
        if args.negative:
            neg_cond = text.encode([args.negative], args.size)
    return reduce(Cond.cat, conds), neg_cond.to("cpu")


def draw_all(args: Namespace, unet: UNet, conds: Cond, neg_cond: Cond, how: dict) -> list[Tensor]:
    """All pictures' latents, on the CPU; on Ctrl-C those that are drawn. `how`: for `generate`."""
    count, latents = len(args.prompts) * args.count, []
    w, full_lcm = args.guidance - 1, unet.cfg.w_dim is not None
    passes = 1 if w == 0 or full_lcm else 2  # rows of the network for a picture
    schedule = make_schedule(unet.cfg.v, unet.cfg.zero_snr)

    def network(cond: Cond, n: int) -> EpsFn:
        if full_lcm:  # takes w itself, as an input
            w_emb = guidance_embedding(torch.tensor([w]), unet.cfg.w_dim).to(args.device)
            return lambda z_t, t: unet(z_t, t, cond, w_emb).float()
        return guided_eps(unet, cond, neg_cond.rows([0] * n).to(args.device), w)

    with resident(unet, args.device):
        n = args.batch = args.batch or batch_that_fits(unet, how["shape"], passes, count)
        start = time.perf_counter()
        for first in tqdm(range(0, count, n), "pictures", unit_scale=n, disable=count == 1 or None):
            # a picture's last bits depend on its row and on how many there are: always n rows, and
            # a seed in row seed mod n
            rows = [first + (row - args.seed - first) % n for row in range(n)]
            cond = conds.rows([min(i, count - 1) // args.count for i in rows]).to(args.device)
            eps_fn, seeds = network(cond, n), [(args.seed + i) % SEEDS for i in rows]
            try:
                z0 = generate(eps_fn, seeds, schedule=schedule, device=args.device, **how).cpu()
            except KeyboardInterrupt:
                print(f"stopped after {len(latents)} of {count} pictures")
                break
            latents += [z0[[(args.seed + i) % n]] for i in range(first, min(first + n, count))]
        seconds = time.perf_counter() - start
    if latents:
        evaluations = args.steps * passes
        each, s = " a picture" if count > 1 else "", "s" if evaluations > 1 else ""
        print(f"{evaluations} network evaluation{s}, {seconds / len(latents):.2f} s{each}")
    return latents


def write_pictures(args: Namespace, images: list[Image.Image], recipe: dict[str, object]) -> None:
    """A PNG for each image, with its recipe, and the sheet. Pictures of other runs are kept."""
    jobs = [prompt for prompt in args.prompts for _ in range(args.count)]
    model = None if is_shipped(args.model) else args.model
    recipe |= {"Batch size": args.batch} if args.batch > 1 else {}
    for seed, (prompt, picture) in enumerate(zip(jobs, images), args.seed):
        text = parameters(prompt, args.negative, recipe | {"Seed": seed})
        what = picture, text, command_line(args, prompt, seed, model)
        path = Path(args.out)
        if pictures.is_png(args.out):
            pictures.save_new_png(path, *what)
        else:
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
            path = pictures.save_numbered(path, f"{slug}_seed{seed}", *what)
        print(path)
    if args.sheet and images:
        zoom = max(1, 256 // max(images[0].size))  # whole-number: pixels stay pixels
        large = [x.resize((zoom * x.width, zoom * x.height), Image.NEAREST) for x in images]
        labels = [f"{prompt} ({seed})" for seed, prompt in enumerate(jobs, args.seed)]
        columns = args.count if args.count > 1 else min(6, len(images))
        sheet = pictures.contact_sheet(large, labels[: len(images)], columns)
        pictures.save_new_png(args.sheet, sheet, shlex.join(["python", "sample.py", *args.argv]))
        print(args.sheet)


@torch.no_grad()
def main(args: Namespace) -> None:
    # ---- what is asked for, checked before the model's tensors are read
    checkpoint = open_checkpoint(args.model, args.prediction)
    config = checkpoint.config
    if args.list:
        return list_names(config.names)
    height, width = settle(args, config)
    how = dict(sampler=args.sampler, steps=args.timesteps or args.steps, strength=args.strength)
    grid = timesteps(**how)
    pixels = pictures.read_image(args.image, args.size) if args.image else None
    loras = [(find_lora(path), lam) for path, lam in map(parse_lora, args.lora)]
    taus = read_taus(loras, weight_shapes(checkpoint.header))
    for path in [args.out] + ([args.sheet] if args.sheet else []):
        pictures.make_place(path)
    recipe = recipe_of(args, loras)
    if args.again:
        check_same_files(args.again, recipe, args.argv)
    advise(args, checkpoint, loras)

    # ---- the model, with the LoRA in its weights
    unet, vae, text, _ = load_checkpoint(checkpoint, DTYPES[args.dtype], args.vae)
    if args.image and isinstance(vae, TinyDecoder):
        raise ValueError(f"{args.vae}: a decoder alone cannot read --image; leave out --vae")
    add_loras(unet, text, loras, taus)

    # ---- prompts -> latents -> pictures
    conds, neg_cond = encode(args, text)
    image = None if pixels is None else vae.encode_mean(pixels)
    if args.device == "cpu" and is_large(config):
        pack_for_sampling(unet, vae, DTYPES[args.dtype])
    how |= dict(shape=(4, height, width), image=image, gamma=args.gamma)
    few = grid if len(grid) <= 20 else [*grid[:3], "...", grid[-1]]
    at = " ".join(map(str, few)) + ("" if args.gamma is None else f", gamma {args.gamma:g}")
    where = f"guidance {args.guidance:g}, {args.dtype} on {args.device}"
    print(f"{args.sampler}, {args.steps} steps at t = {at}, {where}")
    latents = draw_all(args, unet, conds, neg_cond, how)
    decode = vae.decode if args.size[0] * args.size[1] <= 1024 * 1024 else vae.decode_tiled
    with resident(vae, args.device):
        pixels = [decode(z0.to(args.device)) for z0 in latents]
    for seed in [seed for seed, x in enumerate(pixels, args.seed) if not all_finite(x)]:
        more = "give lower --guidance or LAMBDA of --lora, or --dtype float32"
        print(f"seed {seed}: values not finite in {args.dtype}, so the picture is black; {more}")
    images = [pictures.to_images(x)[0] for x in pixels]
    write_pictures(args, images, recipe)
    if len(images) < len(args.prompts) * args.count:
        sys.exit(1)  # by Ctrl-C


if __name__ == "__main__":
    run_script("sample.py", main, parse, "stopped")
