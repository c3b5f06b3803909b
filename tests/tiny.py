"""A model, a LoRA and art small enough for seconds, with all that the shipped ones have."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from minilcm.files.checkpoint import save_model
from minilcm.files.identify import Config
from minilcm.lora import TARGETS, Tau, lora_layers, target_paths
from minilcm.model.text import TextConfig, TextEncoder
from minilcm.model.unet import UNet, UNetConfig
from minilcm.model.vae import VAE, VAEConfig

ROOT = Path(__file__).parents[1]
CONFIG = Config(
    # blocks that the emoji model has too, so that LoRA files name modules of a known UNet
    unet=UNetConfig(
        (32, 32, 32),
        ((0,), (0,), (1,)),
        1,
        ((1, 1), (0, 1), (0, 0)),
        context_dim=32,
        heads=2,
        groups=8,
    ),
    vae=VAEConfig((16, 16, 16), res_blocks=1, groups=4, scale=1.0),
    text=TextConfig(32, 1, 2),
    size=32,
    guidance=3.0,
    names=("pizza", "cat face", "rocket"),
)


TWO_TOWERS = (
    replace(  # SDXL in small: the second tower's pooled vector and six sizes go into the UNet
        CONFIG,
        unet=replace(CONFIG.unet, context_dim=32 + 48, adm=48 + 6 * 256),
        text=TextConfig(32, 1, 2, big=(48, 1, 2)),
        size=64,
        names=(),
    )
)


def tiny_unet(seed: int = 0, cfg: UNetConfig = CONFIG.unet) -> UNet:
    """Random weights; what writes into a residual is enlarged: prompt and LoRA move the output."""
    torch.manual_seed(seed)
    unet = UNet(cfg).requires_grad_(False).eval()
    for path in target_paths(unet, ("to_out.0", "proj_out", "ff.net.2", "out_layers.3")):
        unet.get_submodule(path).weight.mul_(3)
    return unet


def tiny_vae(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    vae = VAE(CONFIG.vae).requires_grad_(False).eval()
    vae.decoder.conv_out.weight.mul_(3)
    return vae


def tiny_text(seed: int = 0, cfg: TextConfig = CONFIG.text) -> TextEncoder:
    torch.manual_seed(seed)
    return TextEncoder(cfg).requires_grad_(False).eval()


def write_model(path: Path, seed: int = 0, config: Config = CONFIG) -> Path:
    save_model(
        path,
        tiny_unet(seed, config.unet).state_dict(),
        tiny_vae(seed),
        tiny_text(seed, config.text),
        config,
    )
    return path


def random_tau(
    model: torch.nn.Module,
    seed: int,
    rank: int,
    lora_alpha: float,
    targets=TARGETS,
    size: float = 0.2,
) -> Tau:
    """A LoRA for all targets of the model with both factors random, none of them zero."""
    generator, tau = torch.Generator().manual_seed(seed), {}
    for path in target_paths(model, targets):
        out, *fan_in = model.get_submodule(path).weight.shape
        up = size * torch.randn(out, rank, *[1] * (len(fan_in) - 1), generator=generator)
        down = size * torch.randn(rank, *fan_in, generator=generator)
        tau[path] = (up, down, lora_alpha)
    return tau


def load_tau(model: torch.nn.Module, tau: Tau) -> None:
    """Copy tau into the LoRA layers. Raises ValueError unless paths, ranks, lora_alpha fit."""
    layers = lora_layers(model)
    if set(layers) != set(tau):
        odd = sorted(set(layers) ^ set(tau))
        raise ValueError(f"{len(odd)} LoRA modules do not match, first: {odd[0]}")
    for path, (up, down, lora_alpha) in tau.items():
        layer = layers[path]
        if layer.lora_down.weight.shape != down.shape or layer.lora_alpha != lora_alpha:
            ours = f"rank {layer.rank} alpha {layer.lora_alpha}"
            raise ValueError(f"{path}: {ours}, file has {down.shape[0]}, {lora_alpha}")
        with torch.no_grad():
            layer.lora_up.weight.copy_(up), layer.lora_down.weight.copy_(down)


def noise(seed: int = 0, shape: tuple[int, ...] = (2, 4, 8, 8)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawing(seed: int) -> Image.Image:
    """A disc with a square in it on transparent ground, like an emoji."""
    image = Image.new("RGBA", (64, 64))
    draw = ImageDraw.Draw(image)
    draw.ellipse((2, 2, 61, 61), fill=(50 * seed % 256, 90 * seed % 256, 200, 255))
    draw.rectangle((20, 20, 30 + 2 * seed, 40), fill=(250, 40 * seed % 256, 0, 255))
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_art(path: Path, style: str = "noto") -> Path:
    """A webdataset shard with one drawing for each name of CONFIG."""
    files = {}
    for i, name in enumerate(CONFIG.names):
        meta = {"name": name, "label": name, "keywords": ["thing"], "style": style}
        files |= {f"{i}.png": png(drawing(i)), f"{i}.json": json.dumps(meta).encode()}
    return write_tar(path, files)
