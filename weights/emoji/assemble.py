"""Put the trained autoencoder and text tower and a fresh UNet into one file for train.py.

    python -m weights.emoji.assemble --vae runs/vae/vae.safetensors \\
        --text runs/text/text.safetensors --names 300 --out runs/start.safetensors

With --unet FILE the UNet is taken from that model file instead: a new decoder for a trained UNet.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from minilcm.files.checkpoint import load_model, save_model
from minilcm.files.identify import Config
from minilcm.files.safetensors_file import read_tensors
from minilcm.model.layers import ResBlock, SpatialTransformer
from minilcm.model.text import TextConfig, TextEncoder, clip_l_to_open_clip
from minilcm.model.unet import UNet, emoji

from .train_vae import read_vae

HERE = Path(__file__).parent


def fresh_unet(seed: int) -> UNet:
    """Random weights; each residual branch's and the UNet's last layer is zero, as in LDM."""
    torch.manual_seed(seed)
    unet = UNet(emoji())
    last = [m.out_layers[3] for m in unet.modules() if isinstance(m, ResBlock)]
    last += [m.proj_out for m in unet.modules() if isinstance(m, SpatialTransformer)]
    for layer in [*last, unet.out[2]]:
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return unet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--unet", type=Path, help="a model file whose UNet to keep (default: a fresh one)"
    )
    parser.add_argument(
        "--names",
        type=int,
        default=300,
        help="how many names of names.txt it is to know (default 300)",
    )
    parser.add_argument(
        "--guidance", type=float, default=4.0, help="default guidance of ddim and dpmpp (default 4)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    vae = read_vae(args.vae)
    tensors, metadata = read_tensors(args.text)
    text = TextEncoder(TextConfig(**json.loads(metadata["config"])))
    text.tower.load_state_dict(clip_l_to_open_clip(tensors))
    unet = load_model(args.unet)[0] if args.unet else fresh_unet(args.seed)
    names = tuple((HERE / "names.txt").read_text().splitlines()[: args.names])
    config = Config(
        unet.cfg, vae.cfg, text.cfg, size=16 * vae.factor, guidance=args.guidance, names=names
    )
    save_model(args.out, unet.state_dict(), vae, text, config)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {len(names)} names")


if __name__ == "__main__":
    main()
