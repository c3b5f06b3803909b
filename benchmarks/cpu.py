"""Sampling on this processor, against diffusers and OpenVINO, side by side in one process.

    python -m benchmarks.cpu                 SD1.5's shapes, random weights, 512x512
    python -m benchmarks.cpu --size 256      a quarter of the pixels

Needs the `reference` extra; OpenVINO takes part if it is installed. All compute in the processor's
fast number format. Rounds take turns, so that a busy moment hits all alike; medians, and the share
of diffusers' time in channels_last, its fastest layout here. "4 steps" is four UNet evaluations and
one decoding, as sample.py draws with an LCM-LoRA.
"""

import argparse
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.check import unet_arguments, vae_arguments
from minilcm.model.packed import pack
from minilcm.model.precision import autocast, default_dtype
from minilcm.model.tiny_vae import TinyDecoder
from minilcm.model.unet import Cond, UNet, sd15
from minilcm.model.vae import VAE, VAEConfig

HALF = default_dtype("cpu")


def our_unet(x: Tensor, context: Tensor, packed: bool = False) -> Callable:
    unet = UNet(sd15()).requires_grad_(False).to(HALF)
    if packed:
        pack(unet, HALF)

    def call() -> Tensor:
        with autocast("cpu", HALF):
            return unet(x, 500, Cond(context))

    return call


def our_decoder(module: nn.Module, x: Tensor, channels_last: bool = False) -> Callable:
    if channels_last:
        module.to(memory_format=torch.channels_last)

    def call() -> Tensor:
        with autocast("cpu", HALF):
            return module.decode(x)

    return call


def diffusers_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**unet_arguments(sd15())).requires_grad_(False)


def diffusers_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**vae_arguments(VAEConfig())).requires_grad_(False)


def their_unet(x: Tensor, context: Tensor) -> Callable:
    unet = diffusers_unet().to(HALF, memory_format=torch.channels_last)
    return lambda: unet(x.to(HALF), 500, context.to(HALF)).sample


def their_decoder(x: Tensor) -> Callable:
    vae = diffusers_vae().to(HALF, memory_format=torch.channels_last)
    return lambda: vae.decode(x.to(HALF)).sample


def by_openvino(module: nn.Module, *inputs: Tensor) -> Callable:
    import openvino

    model = openvino.convert_model(module, example_input=inputs)
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if HALF == torch.bfloat16 else "f32"}
    compiled, arrays = openvino.compile_model(model, "CPU", hint), [x.numpy() for x in inputs]
    return lambda: compiled(arrays)


class Plain(nn.Module):
    """diffusers' UNet or VAE with tensors in and out, as OpenVINO's converter wants them."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.eval()

    def forward(self, z_t: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            return self.module.decode(z_t).sample
        return self.module(z_t, torch.tensor([500]), context).sample


@torch.no_grad()
def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", type=int, default=512, help="pixels across (default 512)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    args = parser.parse_args()
    torch.manual_seed(0)
    x, context = torch.randn(1, 4, args.size // 8, args.size // 8), torch.randn(1, 77, 768)
    ways = {
        "UNet": {
            "minilcm": our_unet(x, context),
            "minilcm, packed": our_unet(x, context, packed=True),
            "diffusers": their_unet(x, context),
        },
        "decode": {
            "minilcm, NCHW": our_decoder(VAE(VAEConfig()), x),
            "minilcm": our_decoder(VAE(VAEConfig()), x, channels_last=True),
            "minilcm, TAESD": our_decoder(TinyDecoder(), x),
            "diffusers": their_decoder(x),
        },
    }
    try:
        ways["UNet"]["OpenVINO"] = by_openvino(Plain(diffusers_unet()), x, context)
        ways["decode"]["OpenVINO"] = by_openvino(Plain(diffusers_vae()), x)
    except ImportError:
        print("OpenVINO is not installed (pip install openvino) and left out")

    times = {(part, way): [] for part, calls in ways.items() for way in calls}
    for i in range(args.rounds + 1):
        for (part, way), seconds in times.items():
            start = time.perf_counter()
            ways[part][way]()
            if i:  # the first call warms up
                seconds.append(time.perf_counter() - start)
    took = {key: median(seconds) for key, seconds in times.items()}
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    threads = f"{torch.get_num_threads()} threads"
    print(f"{(names or [platform.processor()])[0]}, {threads}, {str(HALF)[6:]}, {args.size} pixels")
    for (part, way), seconds in took.items():
        share = seconds / took[part, "diffusers"]
        print(f"{part:8} {way:18} {seconds:7.3f} s {share:6.2f}")
    whole = {
        "minilcm": ("minilcm, packed", "minilcm"),
        "minilcm, TAESD": ("minilcm, packed", "minilcm, TAESD"),
        "diffusers": ("diffusers", "diffusers"),
        "OpenVINO": ("OpenVINO", "OpenVINO"),
    }
    theirs = 4 * took["UNet", "diffusers"] + took["decode", "diffusers"]
    for way, (unet, decoder) in whole.items():
        if ("UNet", unet) in took:
            seconds = 4 * took["UNet", unet] + took["decode", decoder]
            print(f"{'4 steps':8} {way:18} {seconds:7.3f} s {seconds / theirs:6.2f}")


if __name__ == "__main__":
    main()
