"""The table: how often does a picture show what its prompt says, by sampler and number of network evaluations?

    python weights/emoji/evaluate.py                       table over all prompts, about 10 minutes on 2 cores
    python weights/emoji/evaluate.py --blind runs/blind    36 numbered pictures and, apart from them, their prompts
    python weights/emoji/evaluate.py --figure out.png      style LoRA, LCM-LoRA, both: the same prompts and seeds
    python weights/emoji/evaluate.py --failures out.png    all pairs that 4 steps get wrong, and what the judge saw

Prompts: every seen (name, style) pair with a colour ("said"), every held-out one four times, and bare names, four seeds
each. The judge is the small CLIP's image tower: right when the picture is nearest to its own name among all names.
Intervals: 95 % bootstrap over pairs or names, seed 0. The same seeds for all samplers. A guided DDIM or DPM++ step is
two evaluations, an LCM-LoRA step one. "style" and "colour": the share of said, seen prompts whose style and background
are obeyed.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from minilcm.data.emoji import COLORS, STYLES, article, compose, read_art, split_art  # noqa: E402
from minilcm.data.pictures import contact_sheet, save_png, to_images  # noqa: E402
from minilcm.files.checkpoint import load_model  # noqa: E402
from minilcm.files.lora_file import read_tau  # noqa: E402
from minilcm.lcm import sample_lcm  # noqa: E402
from minilcm.merge import combine, merge_into, unmerge  # noqa: E402
from minilcm.metrics import load_judge, prompt_accuracy  # noqa: E402
from minilcm.model.precision import default_dtype  # noqa: E402
from minilcm.objective import run  # noqa: E402
from minilcm.schedule import make_schedule  # noqa: E402
from minilcm.solver import guided_eps, sample_ddim, sample_dpmpp_2m  # noqa: E402

SCHEDULE, HALF = make_schedule(), default_dtype("cpu")
SAMPLERS = {"lcm": "LCM sampler, no LoRA,", "ddim": "DDIM", "dpmpp": "DPM-Solver++"}


def noise(seeds: list[int], side: int) -> tuple[Tensor, list[torch.Generator]]:
    """z_T (b, 4, h, w) of b seeds, and each picture's generator: the same for every sampler."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(4, side, side, generator=g) for g in generators]), generators


@torch.no_grad()
def latents(
    unet, text, prompts: list[str], z_T: Tensor, generators: list, sampler: str, steps: int, w: float, *w_emb: Tensor
) -> Tensor:
    """z0 (b, 4, h, w) of b prompts by the UNet as it is, guided by w. w_emb: (1, c), what a full LCM takes besides."""
    parts = []
    for i in range(0, len(prompts), 64):
        part = slice(i, i + 64)
        cond = text.encode(prompts[part])
        network = lambda z_t, t, cond: run(unet, HALF, z_t, t, cond, *w_emb)  # noqa: E731
        guided = guided_eps(network, cond, text.null_cond(len(z_T[part])), w)
        eps_fn = lambda z_t, t: guided(z_t, torch.as_tensor(t).expand(len(z_t)))  # noqa: E731
        if sampler == "lcm":
            parts.append(sample_lcm(eps_fn, z_T[part], SCHEDULE, steps, generators[part]))
        elif sampler == "ddim":
            parts.append(sample_ddim(eps_fn, z_T[part], SCHEDULE, steps))
        else:
            parts.append(sample_dpmpp_2m(eps_fn, z_T[part], SCHEDULE, steps))
    return torch.cat(parts)


@torch.no_grad()
def decode(vae, z0: Tensor) -> Tensor:
    """(b, 4, h, w) -> pixels (b, 3, H, W) in [-1, 1], 64 at a time."""
    with torch.autocast("cpu", dtype=HALF, enabled=HALF != torch.float32):
        return torch.cat([vae.decode(z).float() for z in z0.split(64)]).clamp(-1, 1)


def draw(model, prompts: list[str], sampler: str, steps: int, w: float, first_seed: int) -> Tensor:
    """Pixels (b, 3, H, W) in [-1, 1]; picture i has seed first_seed + i."""
    unet, vae, text, config = model
    z_T, generators = noise([first_seed + i for i in range(len(prompts))], config.size // vae.factor)
    z0 = latents(unet, text, prompts, z_T, generators, sampler, steps, w)
    return decode(vae, z0)


def interval(
    x: Tensor, y: Tensor | None = None, ratio: bool = False, groups: Tensor | None = None, draws: int = 2000
) -> list[float]:
    """[mean, low, high] of x (prompts, seeds), of x - y or of mean(x) / mean(y): 95 % bootstrap, x and y in pairs.

    Groups of prompts (default: each prompt) are drawn with replacement, whole and with all seeds, since pictures of one
    prompt are not independent.
    """
    groups = torch.arange(len(x)) if groups is None else groups.unique(return_inverse=True)[1]
    n = int(groups.max()) + 1
    rows = torch.randint(0, n, (draws, n), generator=torch.Generator().manual_seed(0))
    size = torch.bincount(groups).double()

    def means(v: Tensor) -> Tensor:
        total = torch.zeros(n, dtype=torch.float64).index_add(0, groups, v.double().mean(dim=1))
        return total[rows].sum(dim=1) / size[rows].sum(dim=1)

    point, drawn = x.mean(), means(x)
    if y is not None:
        drawn, point = (drawn / means(y), point / y.mean()) if ratio else (drawn - means(y), point - y.mean())
    return [round(v, 4) for v in (point.item(), drawn.quantile(0.025).item(), drawn.quantile(0.975).item())]


def color_right(pixels: Tensor, colors: list[str]) -> Tensor:
    """Is the border of each picture nearest to the colour asked for? (b,) bool."""
    border = torch.cat(
        [pixels[:, :, :2].flatten(2), pixels[:, :, :, :2].flatten(2), pixels[:, :, :, -2:].flatten(2)], dim=2
    )
    mean = border.median(dim=2).values  # (b, 3)
    table = torch.tensor(list(COLORS.values())) / 127.5 - 1
    return torch.cdist(mean, table).argmin(dim=1) == torch.tensor([list(COLORS).index(c) for c in colors])


@torch.no_grad()
def style_right(judge, text, pixels: Tensor, pairs: list[tuple[str, str]]) -> Tensor:
    """Among the four styles of its own name, does the picture pick the one asked for? (b,) bool."""
    images = judge.image_features(pixels)
    right = []
    for image, (name, style) in zip(images, pairs):
        choices = judge.text_features(text, [f"{name}, {s} style" for s in STYLES])
        right.append(STYLES[(choices @ image).argmax()] == style)
    return torch.tensor(right)


def table(args, model, judge) -> None:
    unet, vae, text, config = model
    names = list(config.names)
    seen, held_out = split_art(read_art(HERE / "art"), HERE / "art/held_out.txt", names)
    rng = random.Random(args.seed)

    # is the judge a judge? on the art itself, as the autoencoder decodes it
    for what, art in (("seen", seen), ("held out", held_out)):
        x = torch.stack([compose(a, config.size, rng)[0] for a in art])
        decoded = decode(vae, torch.cat([vae.encode_mean(p) for p in x.split(64)]))
        right = prompt_accuracy(judge, text, decoded, [a.name for a in art], names).float()
        mean, low, high = interval(right[:, None])
        style = style_right(judge, text, decoded, [(a.name, a.style) for a in art]).float().mean()
        psnr = -10 * ((decoded - x) / 2).square().flatten(1).mean(dim=1).log10()
        line = f"{mean:.3f} [{low:.3f}, {high:.3f}], style {style:.3f}; autoencoder {psnr.mean():.1f} dB"
        print(f"judge on decoded art, {what:9} {line}", flush=True)

    def said(art):
        colors = [rng.choice(list(COLORS)) for _ in art]
        prompts = [f"{a.name}, {a.style} style, on {article(c)} background" for a, c in zip(art, colors)]
        return prompts, [a.name for a in art], [a.style for a in art], colors

    kinds = {
        "said, seen": said(seen),
        "said, held out": said(held_out * 4),
        "bare names": (names * 4, names * 4, None, None),
    }
    tau = read_tau(args.lora)
    w = config.guidance - 1
    rows = [("ddim", 50, w, 0), *[("lcm", n, 0.0, 1) for n in (1, 2, 4, 8)], ("lcm", 4, 0.0, 0), ("lcm", 4, w, 0)]
    rows += [(s, n, w, 0) for s in ("ddim", "dpmpp") for n in (2, 4, 8)]
    print(f"UNet in {str(HALF)[6:]}, guidance {config.guidance:g}, seed {args.seed}")
    columns = "".join(f" {kind} ({len(prompts)}) |" for kind, (prompts, *_) in kinds.items())
    print(f"\n| sampler, steps | evaluations |{columns} style | colour |")
    print("|---" * (len(kinds) + 4) + "|")
    results = []
    for sampler, steps, w_, lora in rows:
        if lora:
            merge_into(unet, tau)
        cells, row = [], {"sampler": sampler, "steps": steps, "lora": lora, "evaluations": steps * (1 + (w_ > 0))}
        style = color = None
        for kind, (prompts, right_names, styles, colors) in kinds.items():
            pixels = draw(model, prompts, sampler, steps, w_, args.seed)
            right = prompt_accuracy(judge, text, pixels, right_names, names).float()
            times = 1 if kind == "said, seen" else 4  # prompts of one pair, or name, are not independent
            row[kind] = interval(right.reshape(times, -1).T)
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*row[kind]))
            if kind == "said, seen":
                style = style_right(judge, text, pixels, list(zip(right_names, styles))).float().mean().item()
                color = color_right(pixels, colors).float().mean().item()
        if lora:
            unmerge(unet, tau)
        label = "**LCM-LoRA**" if lora else SAMPLERS[sampler]
        label += f" {steps}" + (f", guidance {1 + w_:g}" if w_ else "")
        print(f"| {label} | {row['evaluations']} | {' | '.join(cells)} | {style:.2f} | {color:.2f} |", flush=True)
        results.append(row | {"style": style, "color": color})
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def blind(args, model) -> None:
    """36 prompts in 4 steps, drawn without labels; the answers go to another file."""
    config = model[3]
    rng = random.Random(args.seed + 1)
    names = rng.sample(list(config.names), 36)
    prompts = []
    for i, name in enumerate(names):
        style = f", {rng.choice(STYLES)} style" if i % 3 == 1 else ""
        color = f", on {article(rng.choice(list(COLORS)))} background" if i % 3 else ""
        prompts.append(name + style + color)
    merge_into(model[0], read_tau(args.lora))
    pixels = draw(model, prompts, "lcm", 4, 0.0, args.seed)
    big = F.interpolate(pixels, scale_factor=2, mode="nearest")
    args.blind.mkdir(parents=True, exist_ok=True)
    save_png(args.blind / "numbers.png", contact_sheet(to_images(big), [str(i + 1) for i in range(36)], 9), "")
    save_png(args.blind / "prompts.png", contact_sheet(to_images(big), prompts, 6), "")
    (args.blind / "prompts.txt").write_text("".join(f"{i + 1}\t{p}\n" for i, p in enumerate(prompts)))


def figure(args, model) -> None:
    """Report Fig. 3: the style LoRA alone at 25 guided steps, the LCM-LoRA alone at 4, and lambda1 style + lambda2 lcm
    at 4.
    """
    unet, _, _, config = model
    names = ["cat face", "rocket", "house", "butterfly", "guitar", "mushroom", "penguin", "birthday cake"]
    images, labels = [], []
    for style in ("blueprint", "papercut"):
        tau_style, tau_lcm = read_tau(HERE / f"{style}.safetensors"), read_tau(args.lora)
        prompts = [f"{name}, {style} style, on {article(c)} background" for name, c in zip(names, COLORS)]
        rows = [
            (f"{style} 25 steps", combine([tau_style], [1.0]), "ddim", 25, config.guidance - 1),
            ("lcm 4 steps", combine([tau_lcm], [1.0]), "lcm", 4, 0.0),
            (f"0.8 {style} + 1.0 lcm 4 steps", combine([tau_style, tau_lcm], [0.8, 1.0]), "lcm", 4, 0.0),
        ]
        for label, tau, sampler, steps, w in rows:
            merge_into(unet, tau)
            pixels = draw(model, prompts, sampler, steps, w, args.seed)
            unmerge(unet, tau)
            images += to_images(pixels)
            labels += [label] + [""] * (len(names) - 1)
    save_png(args.figure, contact_sheet(images, labels, len(names)), "report figure 3")


def failures(args, model, judge) -> None:
    """What 4 steps of LCM-LoRA get wrong among all seen and held-out pairs."""
    unet, _, text, config = model
    names, rng = list(config.names), random.Random(args.seed)
    pairs = [a for part in split_art(read_art(HERE / "art"), HERE / "art/held_out.txt", names) for a in part]
    prompts = [f"{a.name}, {a.style} style, on {article(rng.choice(list(COLORS)))} background" for a in pairs]
    merge_into(unet, read_tau(args.lora))
    pixels = draw(model, prompts, "lcm", 4, 0.0, args.seed)
    with torch.no_grad():
        picked = (judge.image_features(pixels) @ judge.text_features(text, names).T).argmax(dim=1)
    wrong = [i for i, a in enumerate(pairs) if names[picked[i]] != a.name]
    print(f"{len(wrong)} of {len(pairs)} wrong")
    if not wrong:
        return
    images = to_images(F.interpolate(pixels[wrong], scale_factor=1.5, mode="bicubic"))
    labels = [f"{pairs[i].name}, {pairs[i].style}\n-> {names[picked[i]]}" for i in wrong]
    save_png(args.failures, contact_sheet(images, labels, 8), "prompts that 4 steps get wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model.safetensors")
    parser.add_argument("--lora", type=Path, default=HERE / "lcm_lora.safetensors", help="the LCM-LoRA")
    parser.add_argument("--judge", type=Path, default=HERE / "judge.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    parser.add_argument("--blind", type=Path, metavar="DIR", help="draw the blind test instead")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the figure of three rows instead")
    parser.add_argument("--failures", type=Path, metavar="FILE.png", help="draw what 4 steps get wrong instead")
    args = parser.parse_args()
    model = load_model(args.model)
    if args.blind:
        blind(args, model)
    elif args.figure:
        figure(args, model)
    elif args.failures:
        failures(args, model, load_judge(args.judge))
    else:
        table(args, model, load_judge(args.judge))


if __name__ == "__main__":
    main()
