"""Parity at full size with diffusers, transformers and open_clip on the same random weights.

    python -m benchmarks.full_size sd15    (or sd2, sdxl, sdxl_v, ssd1b, vega)

Needs the `reference` extra and 16 GB of memory. Makes a checkpoint with random weights under the
official keys and an LCM-LoRA-shaped LoRA (rank 64, alpha 8), writes that LoRA again in each of
minilcm's three spellings, and lets check.py compare; TAESD beside it. sd2 and
sdxl_v predict v, sdxl_v with zero terminal SNR. Seeds: each tensor's from the crc32 of its name.
"""

import argparse
import gzip
import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.check import EQUAL, check, difference
from minilcm.files.checkpoint import load_vae
from minilcm.files.identify import open_checkpoint
from minilcm.files.lora_file import read_tau, write_tau
from minilcm.files.names import to_diffusers_path
from minilcm.files.safetensors_file import read_header, read_tensors, write_tensors
from minilcm.lora import target_paths
from minilcm.model.tiny_vae import TinyDecoder
from minilcm.model.unet import UNet, sd2, sd15, sdxl, ssd1b, vega
from tests.reference.make_reference import fill

HERE = Path(__file__).resolve().parents[1] / "tests/reference"
OURS = {"sd15": sd15, "sd2": sd2, "sdxl": sdxl, "sdxl_v": sdxl, "ssd1b": ssd1b, "vega": vega}
SIDE = 32  # of latents, for the other benchmarks: 256 pixels
XL = ("sdxl", "sdxl_v", "ssd1b", "vega")


# the modules of an LCM-LoRA, by the ends of their names in diffusers
LAYERS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
).split()


def lora_shapes(family: str) -> dict[str, list[int]]:
    """Keys and shapes of the official LCM-LoRA, or of one that is made alike."""
    official = json.loads(gzip.decompress((HERE / "official_lora_keys.json.gz").read_bytes()))
    if keys := official.get(f"lcm_{family.removesuffix('_v')}"):
        return keys
    with torch.device("meta"):
        unet = UNet(OURS[family]())
    shapes = {}
    for path in target_paths(unet):
        out, *fan_in = unet.get_submodule(path).weight.shape
        name = f"lora_unet_{to_diffusers_path(path, unet.cfg).replace('.', '_')}"
        shapes[f"{name}.lora_up.weight"] = [out, 64, *[1] * (len(fan_in) - 1)]
        shapes[f"{name}.lora_down.weight"] = [64, *fan_in]
        shapes[f"{name}.alpha"] = []
    return shapes


def model_shapes(family: str) -> dict[str, list[int]]:
    """Keys and shapes of a checkpoint, all parts."""
    from open_clip.transformer import TextTransformer

    keys = json.loads(gzip.decompress((HERE / "official_keys.json.gz").read_bytes()))
    with torch.device("meta"):
        unet = {k: list(x.shape) for k, x in UNet(OURS[family]()).state_dict().items()}
        h = TextTransformer(77, 49408, 1024, 16, 24, output_dim=1024).state_dict()
    towers = {"cond_stage_model.transformer.text_model.": keys["clip_l"]}
    if family == "sd2":
        towers = {"cond_stage_model.model.": {k: list(x.shape) for k, x in h.items()}}
    if family in XL:
        towers = {"conditioner.embedders.0.transformer.text_model.": keys["clip_l"]}
        towers["conditioner.embedders.1.model."] = keys["big_g"]
    parts = {"model.diffusion_model.": unet, "first_stage_model.": keys["vae"]} | towers
    shapes = {prefix + k: shape for prefix, part in parts.items() for k, shape in part.items()}
    return shapes | ({"v_pred": [0], "ztsnr": [0]} if family == "sdxl_v" else {})


def make_files(family: str, folder: Path) -> tuple[Path, Path]:
    """(checkpoint, LoRA) with random float16 weights, and TAESD beside them; deltas are about a
    tenth of the weights.
    """
    tensors = {}
    for key, shape in model_shapes(family).items():
        if key.endswith("position_ids"):
            tensors[key] = torch.arange(77)[None]
        else:
            tensors[key] = fill(key, shape).half()
    write_tensors(folder / "model.safetensors", tensors, {})
    tensors = {}
    for key, shape in lora_shapes(family).items():
        alpha = key.endswith("alpha")
        tensors[key] = (torch.tensor(8.0) if alpha else fill(key, shape)).half()
        if key.endswith("lora_up.weight"):
            tensors[key] = tensors[key] * 0.8  # times alpha / rank = 1/8
    write_tensors(folder / "lora.safetensors", tensors, {})
    tiny = {k: fill(k, x.shape).half() for k, x in TinyDecoder().state_dict().items()}
    write_tensors(folder / "taesd.safetensors", tiny, {})
    return folder / "model.safetensors", folder / "lora.safetensors"


@torch.no_grad()
def tiny_difference(model: Path) -> float:
    """TAESD by minilcm and by diffusers, on the same latents."""
    from diffusers import AutoencoderTiny

    path = model.with_name("taesd.safetensors")
    z0 = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = load_vae(path, read_header(path)[0], open_checkpoint(model).config).decode(z0)
    theirs = AutoencoderTiny()
    # diffusers counts from 0, after the clamp that is layer 0 of the file
    keys = ((k.split(".", 1), w.float()) for k, w in read_tensors(path)[0].items())
    state = {f"layers.{int(number) - 1}.{rest}": w for (number, rest), w in keys}
    theirs.decoder.load_state_dict(state)
    return difference(ours, theirs.decode(z0).sample)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("family", choices=OURS)
    family = parser.parse_args().family
    with tempfile.TemporaryDirectory() as name:
        model, lora = make_files(family, Path(name))
        tiny = tiny_difference(model)
        print(f"{'TAESD, decode':34} {tiny:.1e}")
        loras = [lora]
        for style in ("default", "diffusers", "peft"):
            loras.append(lora.with_name(f"written_{style}.safetensors"))
            write_tau(loras[-1], read_tau(lora), {}, style=None if style == "default" else style)
        equal = check(model, loras, "v" if family == "sd2" else None)
    sys.exit(not (equal and tiny < EQUAL))


if __name__ == "__main__":
    main()
