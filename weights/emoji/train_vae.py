"""Train the autoencoder on all four sets: f8, 128x128 to 4x16x16, like Stable Diffusion's.

    python -m weights.emoji.train_vae --out runs/vae --steps 5000
    python -m weights.emoji.train_vae --out runs/decoder --steps 300 --lr 2e-4 --sharpen 12 \\
        --init runs/vae/vae.safetensors

Loss: L1 + L1 of the picture's gradients (edges) + 1e-4 KL, which keeps the latents small and the
decoder used to a little noise. The scale factor in the written file is 1 / (measured std of the
latents).

Where the place of an edge is not sure, L1 prefers a blurred one. --sharpen W freezes the encoder,
so that the latents stay those a UNet knows, and asks the decoder for edges as strong as the art's,
patch by patch, wherever in the patch they are. Latent Diffusion (2112.10752 section 3.1) has a
patch discriminator for that: here it reached 0.87 of the art's sharpness and this term 0.92, and it
is not stable at higher weights.
"""

import argparse
import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minilcm.data.emoji import read_art, split_art
from minilcm.files.checkpoint import load_model
from minilcm.files.safetensors_file import read_tensors, write_tensors
from minilcm.metrics import psnr, sharpness
from minilcm.model.precision import autocast, forward_dtype
from minilcm.model.vae import VAE, VAEConfig
from minilcm.objective import learning_rate

from .training import flags, pool_of

HERE = Path(__file__).parent
CONFIG = VAEConfig(channels=(32, 32, 64, 128), res_blocks=1, groups=8, scale=1.0)
SIZE = 128


def parse() -> argparse.Namespace:
    parser = flags(__doc__, "vae.safetensors", steps=5000, batch=16, looks=8, lr=1e-3)
    add = parser.add_argument
    add("--init", type=Path, help="start from this vae.safetensors")
    half = "start from this model's autoencoder of half the size, and keep to its latents"
    add("--grow", type=Path, metavar="MODEL", help=half)
    sharpen = "train the decoder only, with W times the L1 of edge energies"
    add("--sharpen", type=float, metavar="W", help=sharpen)
    add("--compile", action="store_true", help="torch.compile the loss: faster on a GPU")
    return parser.parse_args()


# ---- the loss


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def vae_loss(vae: VAE, pixels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L1 + edge L1 + 1e-4 KL(q(z|x) || N(0, 1)), means over elements; picture; mean latents)."""
    mean, std = vae.moments(pixels)  # (b, 4, h, w)
    x = vae.decode(mean + std * eps)  # (b, 3, H, W)
    pairs = zip(edges(x), edges(pixels))
    l1 = (x - pixels).abs().mean() + sum((a - b).abs().mean() for a, b in pairs)
    # KL = (mean^2 + std^2 - 1 - log std^2) / 2
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
    return l1 + 1e-4 * kl, x, mean


def latent_loss(small: VAE, pixels: Tensor, mean: Tensor) -> Tensor:
    """|mean - E_small(x / 2)|^2, mean over elements: latents that a UNet of the small one knows."""
    return (mean - small.encode_mean(F.avg_pool2d(pixels, 2))).square().mean()


def edge_energy(x: Tensor) -> Tensor:
    """Mean absolute Laplacian in patches of 7x7, 3 pixels apart: (b, 3, H, W) -> (b, 3, h, w)."""
    inner, around = x[..., 1:-1, 1:-1], (x[..., :-2, 1:-1], x[..., 2:, 1:-1])
    laplacian = 4 * inner - sum(around) - x[..., 1:-1, :-2] - x[..., 1:-1, 2:]
    return F.avg_pool2d(laplacian.abs(), 7, stride=3)


# ---- what training starts from


def read_vae(path: Path) -> VAE:
    """The autoencoder of a vae.safetensors."""
    tensors, metadata = read_tensors(path)
    vae = VAE(VAEConfig(**json.loads(metadata["config"])))
    vae.load_state_dict(tensors)
    return vae


def grow(vae: VAE, small: VAE) -> VAE:
    """Start from an autoencoder of half the size: only the new level keeps its random weights."""
    state = {}
    for key, value in small.state_dict().items():
        match = re.match(r"(.*\.(?:down|up)\.)(\d+)(\..*)", key)
        state[f"{match[1]}{int(match[2]) + 1}{match[3]}" if match else key] = value
    missing, unexpected = vae.load_state_dict(state, strict=False)
    new = [key for key in missing if re.search(r"\.(down|up)\.[01]\.", key)]
    assert missing == new and not unexpected, (missing, unexpected)
    vae.cfg = replace(vae.cfg, scale=small.cfg.scale)
    return vae


def start_vae(init: Path | None, small: VAE | None) -> VAE:
    """The file's autoencoder, or a fresh one, grown from `small` if there is one."""
    vae = VAE(CONFIG)
    # start at a posterior std of 0.05: behind full noise two of four channels never come to life
    with torch.no_grad():
        vae.quant_conv.bias[CONFIG.z_channels :] = -6
    vae = read_vae(init) if init else vae
    return grow(vae, small) if small else vae


# ---- what is measured


@torch.no_grad()
def judged(vae: VAE, pixels: Tensor) -> tuple[float, float, float]:
    """(PSNR in dB, sharpness against the art's, std of the latents) of decode(encode_mean(x))."""
    z = torch.cat([vae.encode_mean(p) for p in pixels.split(32)])
    x = torch.cat([vae.decode(part).clamp(-1, 1) for part in z.split(32)])
    sharp = sharpness(x).mean() / sharpness(pixels).mean()
    return psnr(x, pixels).mean().item(), sharp.item(), z.std().item()


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)

    # ---- what is trained
    small = load_model(args.grow)[1].to(args.device).requires_grad_(False) if args.grow else None
    torch.manual_seed(args.seed)
    vae = start_vae(args.init, small).to(args.device, memory_format=torch.channels_last)
    if args.sharpen:
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    how = dict(weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    optimizer = torch.optim.AdamW(parameters, args.lr, **how)
    average = {key: x.clone() for key, x in vae.state_dict().items()}

    # ---- on what
    seen, held_out = split_art(read_art(HERE / "art"), HERE / "art/held_out.txt")
    shown = args.steps * args.batch  # no use in preparing more than that
    seen, held_out = (art[:: max(1, len(art) // shown)] for art in (seen, held_out[::3]))
    pool, _ = pool_of(seen, SIZE, args.looks, args.seed, args.device)
    fixed = pool_of(held_out, SIZE, 1, -1, args.device)[0] / 127.5 - 1

    # ---- the loop
    loss_fn = torch.compile(vae_loss, dynamic=False) if args.compile else vae_loss
    shape = args.batch, 4, SIZE // vae.factor, SIZE // vae.factor
    draw = dict(generator=torch.Generator(args.device).manual_seed(args.seed), device=args.device)
    start = time.time()
    for step in tqdm(range(args.steps), disable=None):
        optimizer.param_groups[0]["lr"] = args.lr * learning_rate(1.0, step, args.steps)
        index = torch.randint(len(pool), (args.batch,), **draw)
        pixels = pool[index].float() / 127.5 - 1  # (b, 3, S, S)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with autocast(args.device, forward_dtype(args.device)):
            loss, x, mean = loss_fn(vae, pixels, torch.randn(shape, **draw))
            if small:
                loss = loss + 0.05 * latent_loss(small, pixels, mean)
            if args.sharpen:
                gap = edge_energy(x.float()) - edge_energy(pixels)
                loss = loss + args.sharpen * gap.abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), optimizer.zero_grad()
        # average <- rate average + (1 - rate) weights
        rate = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), list(vae.state_dict().values()), 1 - rate)

        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            now = {key: x.clone() for key, x in vae.state_dict().items()}
            vae.load_state_dict(average)
            db, sharp, std = judged(vae, fixed)
            measured = f"held-out {db:.2f} dB, sharpness {sharp:.3f} of the art's, std {std:.3f}"
            took = f"{time.time() - start:.0f} s"
            print(f"step {step + 1} loss {loss.item():.4f} {measured}, {took}", flush=True)
            scale = vae.cfg.scale if args.sharpen else vae.cfg.scale / std
            config = json.dumps(asdict(replace(vae.cfg, scale=scale)))
            write_tensors(args.out / "vae.safetensors", average, {"config": config})
            vae.load_state_dict(now)


if __name__ == "__main__":
    main()
