"""Train the judge: which name does a picture show, and in which style?

    python -m weights.emoji.train_judge --vae runs/vae/vae.safetensors --names 300 --out runs/judge

It has nothing in common with the text tower that conditions the UNet, has never seen a held-out
(name, style) pair, and reads the base's four styles and the sixteen of `styles.py`, of which a
drawing is composed only once. A third of what it is taught on has gone through the autoencoder,
with latents as inexact as few sampling steps leave them, and all of it is shifted, blurred and
noised: a judge must not mark blur. Writes judge.safetensors, for `minilcm/metrics.py`.
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
from .train_vae import read_vae
from .training import degrade, flags, pool_of

HERE = Path(__file__).parent
SIZE = 128


def parse() -> argparse.Namespace:
    parser = flags(__doc__, "judge.safetensors", steps=3000, batch=64, looks=8, lr=2e-3)
    vae = "vae.safetensors of the pictures that will be judged"
    parser.add_argument("--vae", type=Path, required=True, help=vae)
    names = "how many names of names.txt (default 300)"
    parser.add_argument("--names", type=int, default=300, help=names)
    return parser.parse_args()


# ---- pictures, and what is true of them


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


def styled_art(names: list[str]) -> tuple[list[Art], list[Art]]:
    """(seen, held out) in the sixteen styles."""
    with ProcessPoolExecutor() as pool:
        both = list(pool.map(partial(split_style, names=names), KINDS))
    return tuple([a for part in parts for a in part] for parts in zip(*both))


# ---- the loss, and what is measured


def judge_loss(judge: Judge, x: Tensor, name: Tensor, style: Tensor) -> Tensor:
    """- log p(name | x) - log p(style | x), mean over the batch; labels are smoothed by 0.1."""
    with autocast(x.device, forward_dtype(x.device.type)):
        of_names, of_styles = judge(x)  # (b, names), (b, styles)
    loss = F.cross_entropy(of_names.float(), name, label_smoothing=0.1)
    return loss + F.cross_entropy(of_styles.float(), style, label_smoothing=0.1)


@torch.no_grad()
def accuracy(judge: Judge, pixels: Tensor, *true: Tensor) -> list[float]:
    """Shares of right names and of right styles; `true`: the names (m,) and the styles (m,)."""
    parts = zip(*(judge(x / 127.5 - 1) for x in pixels.split(64)))
    picked = [torch.cat(logits).argmax(1) for logits in parts]
    return [(x == y).float().mean().item() for x, y in zip(picked, true)]


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    names, styles = (HERE / "names.txt").read_text().splitlines()[: args.names], [*STYLES, *KINDS]
    generator = torch.Generator(args.device).manual_seed(args.seed)

    # ---- what it is trained on
    vae = read_vae(args.vae).to(args.device)

    def lessons(art: list[Art], looks: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(pixels (m, 3, S, S) uint8, names (m,), styles (m,)) on the device."""
        pixels = decoded(vae, pool_of(art, SIZE, looks, seed, args.device)[0], 0.5, generator)
        true = [(names.index(a.name), styles.index(a.style)) for a in art for _ in range(looks)]
        return pixels, *torch.tensor(true, device=args.device).T

    seen, held_out = split_art(read_art(HERE / "art"), HERE / "art/held_out.txt", names)
    styled, styled_held_out = styled_art(names)
    sets = lessons(seen, args.looks, args.seed), lessons(styled, 1, args.seed + 1)
    tests = {"the base's": lessons(held_out, 2, -1), "others'": lessons(styled_held_out, 1, -2)}
    pixels, name, style = (torch.cat(pair) for pair in zip(*sets))
    # half of a batch is in the base's styles
    often = torch.cat([torch.full((len(x),), 1 / len(x)) for x, *_ in sets]).to(args.device)

    # ---- what is trained
    torch.manual_seed(args.seed)
    judge = Judge(names, styles).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), args.lr, weight_decay=0.05, fused=True)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    rate = one_cycle(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)

    # ---- the loop
    start = time.time()
    for step in tqdm(range(args.steps), disable=None):
        index = torch.multinomial(often, args.batch, replacement=True, generator=generator)
        x = degrade(pixels[index] / 127.5 - 1, generator)  # (b, 3, S, S)
        x = x.contiguous(memory_format=torch.channels_last)
        loss = judge_loss(judge, x, name[index], style[index])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), rate.step()

        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            judge.eval()
            said = [f"loss {loss.item():.3f}"]
            for what, test in tests.items():
                right = "names {:.3f} styles {:.3f}".format(*accuracy(judge, *test))
                said.append(f"held-out of {what} styles: {right}")
            judge.train()
            print(f"step {step + 1} {', '.join(said)}, {time.time() - start:.0f} s", flush=True)
            state, config = judge.state_dict().items(), json.dumps([names, styles])
            half = {key: x.half() if x.is_floating_point() else x for key, x in state}
            write_tensors(args.out / "judge.safetensors", half, {"config": config})


if __name__ == "__main__":
    main()
