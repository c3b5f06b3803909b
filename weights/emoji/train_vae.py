"""Train the autoencoder on all four sets: f4, pictures of 64x64, latents 4x16x16.

    python weights/emoji/train_vae.py --out runs/vae --steps 6000
    python weights/emoji/train_vae.py --out runs/vae_decoder --init runs/vae/vae.safetensors --decoder-only --steps 4000

Loss: L1 + L1 of the picture's gradients (edges) + 1e-4 KL, which keeps the latents small and the decoder used to a
little noise. The scale factor in the written file is 1 / (measured std of the latents). --decoder-only freezes the
encoder, as Stable Diffusion's ft-MSE decoders did, so a UNet trained on the latents stays valid.
"""

import argparse
import json
import math
import random
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from minilcm.data.emoji import compose, read_art, split_art  # noqa: E402
from minilcm.files.safetensors_file import write_tensors  # noqa: E402
from minilcm.model.precision import default_dtype  # noqa: E402
from minilcm.model.vae import VAE, VAEConfig  # noqa: E402

CONFIG = VAEConfig(channels=(32, 64, 128), res_blocks=1, groups=8, scale=1.0)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def vae_loss(vae: VAE, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + edge L1 + 1e-4 KL(q(z|x) || N(0, 1)), each a mean over elements."""
    mean, std = vae.moments(pixels)
    x = vae.decode(mean + std * torch.randn(mean.shape, generator=generator))
    l1 = (x - pixels).abs().mean() + sum((a - b).abs().mean() for a, b in zip(edges(x), edges(pixels)))
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
    return l1 + 1e-4 * kl


@torch.no_grad()
def psnr(vae: VAE, pixels: Tensor) -> float:
    """Peak signal to noise ratio in dB of decode(encode_mean(x)), averaged over pictures; 8-bit range."""
    x = torch.cat([vae.decode(vae.encode_mean(p)).clamp(-1, 1) for p in pixels.split(32)])
    mse = ((x - pixels) / 2).square().flatten(1).mean(dim=1)  # (b,), range [0, 1]
    return (-10 * mse.log10()).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets vae.safetensors")
    parser.add_argument("--init", type=Path, help="start from this vae.safetensors")
    parser.add_argument("--decoder-only", action="store_true", help="freeze the encoder and its latents")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    vae = VAE(CONFIG)
    with torch.no_grad():  # start at a posterior std of 0.05: behind full noise two of four channels never come to life
        vae.quant_conv.bias[CONFIG.z_channels :] = -6
    if args.init:
        with safe_open(args.init, "pt") as f:
            vae = VAE(VAEConfig(**json.loads(f.metadata()["config"])))
        vae.load_state_dict(load_file(args.init))
    if args.decoder_only:
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
    seen, held_out = split_art(read_art(HERE / "art"), HERE / "art/held_out.txt")
    rng = random.Random(-1)
    fixed = torch.stack([compose(a, 64, rng)[0] for a in held_out])  # (b, 3, 64, 64)

    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    bf16 = default_dtype("cpu") == torch.bfloat16
    start = time.time()
    for step in tqdm(range(args.steps), disable=None):
        lr = args.lr * min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        rng = random.Random(f"{args.seed} {step}")
        pixels = torch.stack([compose(rng.choice(seen), 64, rng)[0] for _ in range(args.batch)])
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = vae_loss(vae, pixels, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), list(vae.state_dict().values()), 1 - rate)
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            now = {k: v.clone() for k, v in vae.state_dict().items()}
            vae.load_state_dict(average)
            with torch.no_grad():
                std = vae.encode_mean(fixed[:128]).std().item()
            seconds = time.time() - start
            good = f"held-out {psnr(vae, fixed):.2f} dB std {std:.3f}"
            print(f"step {step + 1} loss {loss.item():.4f} {good} {seconds:.0f} s", flush=True)
            scale = vae.cfg.scale if args.decoder_only else vae.cfg.scale / std
            config = json.dumps(asdict(replace(vae.cfg, scale=scale)))
            write_tensors(args.out / "vae.safetensors", average, {"config": config})
            vae.load_state_dict(now)


if __name__ == "__main__":
    main()
