"""The table: how often does a picture show what its prompt says, by sampler and evaluations?

    python -m weights.emoji.evaluate                table over all prompts
    python -m weights.emoji.evaluate styles         style LoRA alone, and added to the LCM-LoRA
    python -m weights.emoji.evaluate figure         the same as pictures
    python -m weights.emoji.evaluate distance       to the end of the teacher's 50 steps
    python -m weights.emoji.evaluate failures       what 4 steps get wrong, and what the judge saw
    python -m weights.emoji.evaluate autoencoder    the art, decoded; the judge on both
    python -m weights.emoji.evaluate blind          36 numbered pictures, their prompts apart

Prompts: seen (name, style) pairs with a colour ("said"), held-out pairs four times, and bare
names. The judge (`train_judge.py`) is right when it picks the prompt's name among all names, and
the prompt's style among the base's four. Intervals: 95 % bootstrap over pairs or names, seed 0. The
same seeds for all samplers. A guided DDIM or DPM-Solver++ step is two network evaluations, an
LCM-LoRA step one.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minilcm.data.emoji import COLORS, STYLES, Art, article, compose, read_art, split_art
from minilcm.data.pictures import contact_sheet, save_png, to_images
from minilcm.files.checkpoint import Model, load_judge, load_model
from minilcm.files.lora_file import read_tau
from minilcm.generate import generate
from minilcm.merge import combine, merge_into
from minilcm.metrics import Judge, accuracy, interval, picked, psnr, sharpness
from minilcm.model.precision import autocast, default_dtype
from minilcm.objective import run
from minilcm.solver import guided_eps

from . import recipe

HERE = Path(__file__).parent
HALF = default_dtype("cpu")
LABELS = {"lcm": "LCM sampler, no LoRA,", "ddim": "DDIM", "dpmpp": "DPM-Solver++"}


@torch.no_grad()
def latents(
    model: Model, prompts: list[str], sampler: str, steps: int, w: float, first_seed: int
) -> Tensor:
    """z0 (b, 4, h, w), 64 at a time; picture i has seed first_seed + i."""
    unet, vae, text, config = model
    side, parts = config.size // vae.factor, []
    for i in range(0, len(prompts), 64):
        cond = text.encode(prompts[i : i + 64])
        b = len(cond.context)
        guided = guided_eps(lambda *x: run(unet, HALF, *x), cond, text.null_cond(b), w)

        def eps_fn(z_t: Tensor, t: int | Tensor) -> Tensor:
            return guided(z_t, torch.as_tensor(t).expand(len(z_t)))

        seeds = range(first_seed + i, first_seed + i + b)
        parts.append(generate(eps_fn, seeds, (4, side, side), sampler, steps))
    return torch.cat(parts)


def draw(
    model: Model, prompts: list[str], sampler: str, steps: int, w: float, first_seed: int
) -> Tensor:
    """Pixels (b, 3, H, W) in [-1, 1]; picture i has seed first_seed + i."""
    return decode(model, latents(model, prompts, sampler, steps, w, first_seed))


@torch.no_grad()
def decode(model: Model, z0: Tensor) -> Tensor:
    """(b, 4, h, w) -> pixels (b, 3, H, W) in [-1, 1]."""
    with autocast("cpu", HALF):
        return torch.cat([model.vae.decode(z).float() for z in z0.split(32)]).clamp(-1, 1)


def art_of(config) -> tuple[list[Art], list[Art]]:
    """(seen, held out) drawings of the model's names."""
    return split_art(read_art(HERE / "art"), HERE / "art/held_out.txt", list(config.names))


def color_right(pixels: Tensor, colors: list[str]) -> Tensor:
    """Is the border of each picture nearest to the colour asked for? (b,) bool."""
    edges = pixels[:, :, :4].flatten(2), pixels[..., :4].flatten(2), pixels[..., -4:].flatten(2)
    median = torch.cat(edges, dim=2).median(dim=2).values  # (b, 3)
    table = torch.tensor(list(COLORS.values())) / 127.5 - 1
    asked = torch.tensor([list(COLORS).index(c) for c in colors])
    return torch.cdist(median, table).argmin(dim=1) == asked


def said(art: list[Art], rng: random.Random, style: str | None = None) -> tuple[list, ...]:
    """(prompts that say style and colour, names, styles, colours); `style` for the drawing's."""
    colors, styles = [rng.choice(list(COLORS)) for _ in art], [style or a.style for a in art]
    said_of = zip(art, styles, colors)
    prompts = [f"{a.name}, {s} style, on {article(c)} background" for a, s, c in said_of]
    return prompts, [a.name for a in art], styles, colors


@torch.no_grad()
def decoded(model: Model, x: Tensor) -> Tensor:
    """Pixels (b, 3, S, S) through the model's autoencoder, in its own size, enlarged to S."""
    small = F.interpolate(x, model.config.size, mode="area")
    z0 = torch.cat([model.vae.encode_mean(p) for p in small.split(32)])
    return F.interpolate(decode(model, z0), x.shape[-1], mode="nearest")


def autoencoder(args: argparse.Namespace, model: Model, judge: Judge) -> None:
    """Is the judge a judge? And what does the autoencoder lose? On the art, drawn and decoded."""
    rng, rows, labels = random.Random(args.seed), [], []
    old = load_model(args.old) if args.old else None
    for what, art in zip(("seen", "held out"), art_of(model.config)):
        x, _ = compose(art, model.config.size, rng)
        new, names, styles = decoded(model, x), [a.name for a in art], [a.style for a in art]
        for how, pixels in (("drawn", x), ("decoded", new)):
            name, style = accuracy(judge, pixels, names, styles, list(STYLES))
            mean, low, high = interval(name.float()[:, None])
            share = f"names {mean:.3f} [{low:.3f}, {high:.3f}], styles {style.float().mean():.3f}"
            print(f"judge on {what} art, {how}: {share}", flush=True)
        db, sharp = psnr(new, x).mean(), sharpness(new).mean() / sharpness(x).mean()
        print(f"autoencoder, {what}: {db:.2f} dB, {sharp:.3f} of the art's sharpness", flush=True)
        shown = {"old autoencoder": decoded(old, x[:12])} if old else {}
        shown |= {"autoencoder": new[:12], f"{what} art": x[:12]}
        rows += shown.values()
        labels += [w for label in shown for w in [label] + [""] * 11]
    images = to_images(F.interpolate(torch.cat(rows), scale_factor=2, mode="nearest"))
    save_png(args.out, contact_sheet(images, labels, 12), "the art through the autoencoder")


def table(args: argparse.Namespace, model: Model, judge: Judge) -> None:
    config, rng, w = model.config, random.Random(args.seed), model.config.guidance - 1
    seen, held_out = art_of(config)
    seen = rng.sample(seen, min(args.pairs, len(seen)))
    held_out = rng.sample(held_out, min(args.pairs // 4, len(held_out)))
    names = rng.sample(config.names, min(args.pairs // 4, len(config.names)))
    kinds = {
        "said, seen": said(seen, rng),
        "said, held out": said(held_out * 4, rng),
        "bare names": (names * 4, names * 4, None, None),
    }
    tau = read_tau(args.lora)
    rows = [("ddim", 50, w, 0), *[("lcm", n, 0.0, 1) for n in (1, 2, 4, 8)]]
    rows += [("lcm", 4, 0.0, 0), *[(s, n, w, 0) for s in ("ddim", "dpmpp") for n in (2, 4, 8)]]
    print(f"UNet in {str(HALF)[6:]}, guidance {config.guidance:g}, seed {args.seed}")
    columns = "".join(f" {kind} ({len(prompts)}) |" for kind, (prompts, *_) in kinds.items())
    print(f"\n| sampler, steps | evaluations |{columns} style | colour | sharpness | s a picture |")
    print("|---" * (len(kinds) + 6) + "|")
    results = []
    for sampler, steps, w_, lora in rows:
        if lora:
            merge_into(model.unet, tau)
        evaluations = steps * (1 + (w_ > 0))
        row = {"sampler": sampler, "steps": steps, "lora": lora, "evaluations": evaluations}
        cells, start, drawn = [], time.time(), 0
        for kind, (prompts, right, styles, colors) in kinds.items():
            pixels = draw(model, prompts, sampler, steps, w_, args.seed)
            drawn += len(pixels)
            name, style = accuracy(judge, pixels, right, styles, list(STYLES))
            times = 1 if kind == "said, seen" else 4  # prompts of one pair are not independent
            row[kind] = interval(name.float().reshape(times, -1).T)
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*row[kind]))
            if kind == "said, seen":
                row["style"] = style.float().mean().item()
                row["color"] = color_right(pixels, colors).float().mean().item()
                row["sharpness"] = sharpness(pixels).mean().item()
        row["seconds"] = (time.time() - start) / drawn
        if lora:
            merge_into(model.unet, tau, -1.0)
        label = "**LCM-LoRA**" if lora else LABELS[sampler]
        label += f" {steps}" + (f", guidance {1 + w_:g}" if w_ else "")
        cells += [f"{row['style']:.2f}", f"{row['color']:.2f}", f"{row['sharpness']:.3f}"]
        print(
            f"| {label} | {evaluations} | {' | '.join(cells)} | {row['seconds']:.3f} |", flush=True
        )
        results.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


def distance(args: argparse.Namespace, model: Model) -> None:
    """RMS distance in latents to the end of the teacher's guided 50 steps, from the same noise."""
    rng, w = random.Random(args.seed), model.config.guidance - 1
    prompts = said(rng.sample(art_of(model.config)[0], args.pairs // 2), rng)[0]
    end = latents(model, prompts, "ddim", 50, w, args.seed)
    other = latents(model, prompts, "ddim", 50, w, args.seed + 100_000)
    tau = read_tau(args.lora)
    print(f"to another seed's end: {(other - end).square().mean().sqrt():.3f}")
    for lora, steps, w_ in ((0, 1, 0.0), (0, 1, w), (1, 1, 0.0), (1, 2, 0.0), (1, 4, 0.0)):
        if lora:
            merge_into(model.unet, tau)
        z0 = latents(model, prompts, "lcm", steps, w_, args.seed)
        if lora:
            merge_into(model.unet, tau, -1.0)
        what = "LCM-LoRA" if lora else f"no LoRA, guidance {1 + w_:g}"
        print(f"{what}, {steps} steps: {(z0 - end).square().mean().sqrt():.3f}", flush=True)


def styles(args: argparse.Namespace, model: Model, judge: Judge) -> None:
    """The style LoRA alone at 25 steps, and with the LCM-LoRA at 4, by the judge."""
    tau_lcm, w = read_tau(args.lora), model.config.guidance - 1
    for file in args.style_loras:
        rng, tau = random.Random(args.seed), read_tau(file)
        art = rng.sample(art_of(model.config)[0], args.pairs // 2)
        prompts, names, asked, _ = said(art, rng, file.stem)
        rows = [(f"{file.stem} alone, DDIM 25", tau, "ddim", 25, w)]
        for lambda1 in (1.0, 0.8):
            label = f"{file.stem} + LCM-LoRA at ({lambda1}, 1.0), 4"
            rows.append((label, combine([tau, tau_lcm], [lambda1, 1.0]), "lcm", 4, 0.0))
        for label, mix, sampler, steps, w_ in rows:
            merge_into(model.unet, mix)
            pixels = draw(model, prompts, sampler, steps, w_, args.seed)
            merge_into(model.unet, mix, -1.0)
            shares = [x.float().mean() for x in accuracy(judge, pixels, names, asked)]
            print(f"{label}: names {shares[0]:.3f}, style {shares[1]:.3f}", flush=True)


def blind(args: argparse.Namespace, model: Model) -> None:
    """36 prompts in 4 steps, drawn without labels; the answers go to another file."""
    rng = random.Random(args.seed + 1)
    names, prompts = rng.sample(list(model.config.names)[args.skip :], 36), []
    for i, name in enumerate(names):
        style = f", {rng.choice(STYLES)} style" if i % 3 == 1 else ""
        color = f", on {article(rng.choice(list(COLORS)))} background" if i % 3 else ""
        prompts.append(name + style + color)
    merge_into(model.unet, read_tau(args.lora))
    images = to_images(draw(model, prompts, "lcm", 4, 0.0, args.seed))
    args.out.mkdir(parents=True, exist_ok=True)
    numbers = contact_sheet(images, [str(i + 1) for i in range(36)], 9)
    save_png(args.out / "numbers.png", numbers, "")
    save_png(args.out / "prompts.png", contact_sheet(images, prompts, 6), "36 prompts in 4 steps")
    answers = "".join(f"{i + 1}\t{p}\n" for i, p in enumerate(prompts))
    (args.out / "prompts.txt").write_text(answers)


def figure(args: argparse.Namespace, model: Model) -> None:
    """Report Fig. 3: the LCM-LoRA alone at 4 steps; each style LoRA alone at 25 guided steps, and
    lambda1 tau_style + lambda2 tau_lcm at 4.
    """
    names = ["cat face", "rocket", "house", "butterfly", "guitar", "mushroom", "penguin", "castle"]
    tau_lcm, w = read_tau(args.lora), model.config.guidance - 1
    rows = [("lcm, 4 steps", "", tau_lcm, "lcm", 4, 0.0)]
    for file in args.style_loras:
        tau, style = read_tau(file), f", {file.stem} style"
        both = combine([tau, tau_lcm], [1.0, 1.0])
        rows.append((f"{file.stem}, 25 steps", style, tau, "ddim", 25, w))
        rows.append((f"{file.stem} + lcm, 4 steps", style, both, "lcm", 4, 0.0))
    images, labels = [], []
    for label, style, tau, sampler, steps, w_ in rows:
        prompts = [f"{n}{style}, on {article(c)} background" for n, c in zip(names, COLORS)]
        merge_into(model.unet, tau)
        images += to_images(draw(model, prompts, sampler, steps, w_, args.seed))
        merge_into(model.unet, tau, -1.0)
        labels += [label] + [""] * (len(names) - 1)
    save_png(args.out, contact_sheet(images, labels, len(names)), "report figure 3")


def failures(args: argparse.Namespace, model: Model, judge: Judge) -> None:
    """What 4 steps of the LCM-LoRA get wrong among seen and held-out pairs, the first 48 of it."""
    rng = random.Random(args.seed)
    pairs = [a for part in art_of(model.config) for a in part]
    pairs = rng.sample(pairs, min(args.pairs, len(pairs)))
    prompts, names, *_ = said(pairs, rng)
    merge_into(model.unet, read_tau(args.lora))
    pixels = draw(model, prompts, "lcm", 4, 0.0, args.seed)
    with torch.no_grad():
        saw = picked(torch.cat([judge(p)[0] for p in pixels.split(64)]), judge.names)
    wrong = [i for i, name in enumerate(names) if saw[i] != name]
    print(f"{len(wrong)} of {len(pairs)} wrong")
    if not wrong:
        return
    labels = [f"{pairs[i].name}, {pairs[i].style}\n-> {saw[i]}" for i in wrong[:48]]
    sheet = contact_sheet(to_images(pixels[wrong[:48]]), labels, 8)
    save_png(args.out, sheet, "prompts that 4 steps get wrong")


# section -> (function, whether it needs the judge, where its picture goes by default)
SECTIONS = {
    "table": (table, True, None),
    "styles": (styles, True, None),
    "distance": (distance, False, None),
    "figure": (figure, False, "figure3.png"),
    "failures": (failures, True, "failures.png"),
    "autoencoder": (autoencoder, True, "autoencoder.png"),
    "blind": (blind, False, "blind"),
}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("section", nargs="?", choices=SECTIONS, default="table", help="(default table)")
    add("--model", type=Path, default=HERE / "model.safetensors")
    add("--lora", type=Path, default=HERE / "lcm_lora.safetensors", help="the LCM-LoRA")
    add("--judge", type=Path, default=HERE / "judge.safetensors")
    shipped = [HERE / f"{style}.safetensors" for style in recipe.STYLES]
    files = "files named after their style"
    add("--style-loras", type=Path, nargs="+", default=shipped, help=files)
    add("--pairs", type=int, default=320, help="how many seen pairs to ask for (default 320)")
    add("--skip", type=int, default=0, help="blind: only names behind the first N (default 0)")
    add("--old", type=Path, help="autoencoder: a model whose decoding is drawn beside")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="also write the table as JSON")
    add("--out", type=Path, help="the sheet, or blind's folder (default: in the working directory)")
    args = parser.parse_args()
    section, judges, out = SECTIONS[args.section]
    args.out = args.out or out and Path(out)
    model = load_model(args.model)
    section(args, model, *[load_judge(args.judge)] * judges)


if __name__ == "__main__":
    main()
