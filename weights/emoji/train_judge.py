"""Train the judge: which name does a picture show, and in which style?

    python -m weights.emoji.train_judge --vae runs/vae/vae.safetensors --names 300 --out runs/judge

It has nothing in common with the text tower that conditions the UNet, has never seen a held-out
(name, style) pair, and reads the base's four styles and the sixteen of `styles.py`. Half of what it
is taught on has gone through the autoencoder, with latents as inexact as few sampling steps
leave them, and all of it is shifted, blurred and noised: a judge must not mark blur. Writes
judge.safetensors, for `minilcm/metrics.py`.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minilcm.data.emoji import STYLES, Art, read_art, split_art
from minilcm.files.safetensors_file import write_tensors
from minilcm.metrics import Judge
from minilcm.model.precision import autocast, forward_dtype
from minilcm.model.vae import VAE

from .styles import KINDS, split_style
from .train_clip import degrade
from .train_vae import pool_of, read_vae

HERE = Path(__file__).parent
SIZE = 128


@torch.no_grad()
def decoded(vae: VAE, pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Every third picture (m, 3, S, S) uint8 through the VAE, its latents noised by `strength`."""
    pixels, device = pixels.clone(), generator.device
    for part in pixels[::3].split(64):
        with autocast(device, forward_dtype(device.type)):
            z = vae.encode_mean(part.to(device) / 127.5 - 1)
            draw = dict(generator=generator, device=device)
            z = z + strength * torch.rand(len(z), 1, 1, 1, **draw) * torch.randn(z.shape, **draw)
            part.copy_((vae.decode(z).clamp(-1, 1) + 1).mul(127.5).round())
    return pixels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for judge.safetensors")
    parser.add_argument(
        "--vae",
        type=Path,
        required=True,
        help="vae.safetensors of the pictures that will be judged",
    )
    parser.add_argument(
        "--names", type=int, default=300, help="how many names of names.txt (default 300)"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--looks",
        type=int,
        default=8,
        help="compositions of a drawing in the base's styles (default 8)",
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    names, styles = (HERE / "names.txt").read_text().splitlines()[: args.names], [*STYLES, *KINDS]
    vae = read_vae(args.vae).to(args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)

    def lessons(art: list[Art], looks: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(pixels (m, 3, S, S) uint8, names (m,), styles (m,)) on the device."""
        pixels = decoded(vae, pool_of(art, SIZE, looks, seed, args.device)[0], 0.5, generator)
        shown = [a for a in art for _ in range(looks)]
        true = torch.tensor(
            [(names.index(a.name), styles.index(a.style)) for a in shown], device=args.device
        )
        return pixels, true[:, 0], true[:, 1]

    seen, held_out = split_art(read_art(HERE / "art"), HERE / "art/held_out.txt", names)
    with ProcessPoolExecutor() as pool:
        both = list(pool.map(partial(split_style, names=names), KINDS))
    styled, styled_held_out = ([a for part in parts for a in part] for parts in zip(*both))
    base = lessons(seen, args.looks, args.seed)
    extra = lessons(styled, 1, args.seed + 1)
    pixels, name, style = (torch.cat(pair) for pair in zip(base, extra))
    tests = {"the base's": lessons(held_out, 2, -1), "others'": lessons(styled_held_out, 1, -2)}

    torch.manual_seed(args.seed)
    judge = Judge(names, styles).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), args.lr, weight_decay=0.05, fused=True)
    cosine = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.1
    )
    # half of the pictures are in the base's styles
    often = torch.cat(
        [torch.full((len(x[0]),), 1 / len(x[0]), device=args.device) for x in (base, extra)]
    )
    start = time.time()
    for step in tqdm(range(args.steps), disable=None):
        index = torch.multinomial(often, args.batch, replacement=True, generator=generator)
        x = degrade(pixels[index] / 127.5 - 1, generator).contiguous(
            memory_format=torch.channels_last
        )
        with autocast(args.device, forward_dtype(args.device)):
            of_names, of_styles = judge(x)
        loss = F.cross_entropy(of_names.float(), name[index], label_smoothing=0.1)
        loss = loss + F.cross_entropy(of_styles.float(), style[index], label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), cosine.step()
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            judge.eval()
            said = [f"loss {loss.item():.3f}"]
            for what, (test, true_name, true_style) in tests.items():
                with torch.no_grad():
                    found = [
                        torch.cat(x)
                        for x in zip(*(judge(part / 127.5 - 1) for part in test.split(64)))
                    ]
                right = [
                    (x.argmax(1) == y).float().mean().item()
                    for x, y in zip(found, (true_name, true_style))
                ]
                said.append(
                    f"held-out of {what} styles: names {right[0]:.3f} styles {right[1]:.3f}"
                )
            judge.train()
            print(f"step {step + 1} {', '.join(said)}, {time.time() - start:.0f} s", flush=True)
            half = {
                k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()
            }
            write_tensors(
                args.out / "judge.safetensors", half, {"config": json.dumps([names, styles])}
            )


if __name__ == "__main__":
    main()
