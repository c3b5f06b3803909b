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

from minilcm.data.emoji import Art, compositions, read_art, split_art
from minilcm.files.checkpoint import load_model
from minilcm.files.safetensors_file import read_tensors, write_tensors
from minilcm.metrics import psnr, sharpness
from minilcm.model.precision import autocast, forward_dtype
from minilcm.model.vae import VAE, VAEConfig
from minilcm.objective import learning_rate

HERE = Path(__file__).parent
CONFIG = VAEConfig(channels=(32, 32, 64, 128), res_blocks=1, groups=8, scale=1.0)
SIZE = 128


def pool_of(
    art: list[Art], size: int, looks: int, seed: int, device="cpu"
) -> tuple[Tensor, list[str]]:
    """All compositions, to draw batches from: pixels (m, 3, S, S) as uint8, and m colours."""
    pixels, colors = [], []
    for x, color in compositions(art, size, looks, seed, device):
        pixels.append(((x + 1) * 127.5).round().byte())
        colors += color
    return torch.cat(pixels), colors


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def vae_loss(vae: VAE, pixels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L1 + edge L1 + 1e-4 KL(q(z|x) || N(0, 1)), means over elements; picture; mean latents)."""
    mean, std = vae.moments(pixels)
    x = vae.decode(mean + std * eps)
    l1 = (x - pixels).abs().mean() + sum(
        (a - b).abs().mean() for a, b in zip(edges(x), edges(pixels))
    )
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
    return l1 + 1e-4 * kl, x, mean


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
    assert not unexpected and all(re.search(r"\.(down|up)\.[01]\.", key) for key in missing), (
        missing,
        unexpected,
    )
    vae.cfg = replace(vae.cfg, scale=small.cfg.scale)
    return vae


def edge_energy(x: Tensor) -> Tensor:
    """Mean absolute Laplacian in patches of 7x7, 3 pixels apart: (b, 3, H, W) -> (b, 3, h, w)."""
    inner, around = x[..., 1:-1, 1:-1], (x[..., :-2, 1:-1], x[..., 2:, 1:-1])
    laplacian = 4 * inner - sum(around) - x[..., 1:-1, :-2] - x[..., 1:-1, 2:]
    return F.avg_pool2d(laplacian.abs(), 7, stride=3)


@torch.no_grad()
def judged(vae: VAE, pixels: Tensor) -> tuple[float, float, float]:
    """(PSNR in dB, sharpness against the art's, std of the latents) of decode(encode_mean(x))."""
    z = torch.cat([vae.encode_mean(p) for p in pixels.split(32)])
    x = torch.cat([vae.decode(part).clamp(-1, 1) for part in z.split(32)])
    sharp = sharpness(x).mean() / sharpness(pixels).mean()
    return psnr(x, pixels).mean().item(), sharp.item(), z.std().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that gets vae.safetensors")
    parser.add_argument("--init", type=Path, help="start from this vae.safetensors")
    half = "start from this model's autoencoder of half the size, and keep to its latents"
    parser.add_argument("--grow", type=Path, metavar="MODEL", help=half)
    sharpen = "train the decoder only, with W times the L1 of edge energies"
    parser.add_argument("--sharpen", type=float, metavar="W", help=sharpen)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--looks", type=int, default=8, help="compositions made of each drawing (default 8)"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the loss: faster on a GPU"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    vae = VAE(CONFIG)
    # start at a posterior std of 0.05: behind full noise two of four channels never come to life
    with torch.no_grad():
        vae.quant_conv.bias[CONFIG.z_channels :] = -6
    if args.init:
        vae = read_vae(args.init)
    small = load_model(args.grow)[1].to(args.device).requires_grad_(False) if args.grow else None
    if small:
        vae = grow(vae, small)
    vae.to(args.device, memory_format=torch.channels_last)
    if args.sharpen:
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)

    seen, held_out = split_art(read_art(HERE / "art"), HERE / "art/held_out.txt")
    shown = args.steps * args.batch  # no use in preparing more than that
    seen, held_out = (art[:: max(1, len(art) // shown)] for art in (seen, held_out[::3]))
    pool, _ = pool_of(seen, SIZE, args.looks, args.seed, args.device)
    fixed = pool_of(held_out, SIZE, 1, -1, args.device)[0] / 127.5 - 1

    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, args.lr, weight_decay=0.0, betas=(0.9, 0.99), fused=True
    )
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(1.0, step, args.steps)
    )
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    loss_fn = torch.compile(vae_loss, dynamic=False) if args.compile else vae_loss
    generator = torch.Generator(args.device).manual_seed(args.seed)
    start = time.time()
    for step in tqdm(range(args.steps), disable=None):
        index = torch.randint(len(pool), (args.batch,), generator=generator, device=args.device)
        pixels = (pool[index].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        shape = args.batch, 4, SIZE // vae.factor, SIZE // vae.factor
        eps = torch.randn(shape, generator=generator, device=args.device)
        with autocast(args.device, forward_dtype(args.device)):
            loss, x, mean = loss_fn(vae, pixels, eps)
            if small:  # latents that a UNet of the small one knows
                loss = (
                    loss
                    + 0.05 * (mean - small.encode_mean(F.avg_pool2d(pixels, 2))).square().mean()
                )
            if args.sharpen:
                gap = edge_energy(x.float()) - edge_energy(pixels)
                loss = loss + args.sharpen * gap.abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), optimizer.zero_grad()
        cosine.step()
        rate = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), list(vae.state_dict().values()), 1 - rate)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            now = {k: v.clone() for k, v in vae.state_dict().items()}
            vae.load_state_dict(average)
            db, sharp, std = judged(vae, fixed)
            print(
                f"step {step + 1} loss {loss.item():.4f} held-out {db:.2f} dB, "
                f"sharpness {sharp:.3f} of the art's, "
                f"std {std:.3f}, {time.time() - start:.0f} s",
                flush=True,
            )
            scale = vae.cfg.scale if args.sharpen else vae.cfg.scale / std
            config = json.dumps(asdict(replace(vae.cfg, scale=scale)))
            write_tensors(args.out / "vae.safetensors", average, {"config": config})
            vae.load_state_dict(now)


if __name__ == "__main__":
    main()
