"""The names of modules, LDM <-> diffusers, and flattened.

A tau has LDM's paths for the UNet, and te1. (CLIP-L) or te2. (bigG) + Hugging Face's for text.

    LDM        input_blocks.4.1.transformer_blocks.0.attn1.to_q   as in checkpoints and in a tau
    diffusers  down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q
    flattened  down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q

A flattened name cannot be split again (`to_out_0`, `ff_net_2`): it is looked up among the module
names of a known UNet.
"""

import re
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from ..model.unet import UNet, UNetConfig

RES = {  # inside a ResBlock: LDM's name -> diffusers'
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_NAMES = {  # in a VAE: diffusers' name, today's or the one before -> LDM's
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"attn_1\.group_norm": "attn_1.norm",
    r"attn_1\.(to_)?(q|k|v)(uery|ey|alue)?\.": r"attn_1.\2.",
    r"attn_1\.(to_out\.0|proj_attn)": "attn_1.proj_out",
    r"down_blocks\.": "down.",
    r"\.resnets\.": ".block.",
    r"(down|up)samplers\.0": r"\1sample",
    r"conv_shortcut": "nin_shortcut",
    r"conv_norm_out": "norm_out",
}

TOWERS = {"te1.": "CLIP-L", "te2.": "bigG"}  # prefix in a tau -> text encoder


def vae_key(key: str, levels: int) -> str:
    """A VAE's key as LDM or diffusers spell it -> LDM's; diffusers counts up_blocks backwards."""
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
    for theirs, ours in VAE_NAMES.items():
        key = re.sub(theirs, ours, key)
    return key


def official_key(key: str) -> str:
    """Other spellings in a UNet (cond_proj) or text encoder (bigG's projection) -> the official."""
    key = key.replace("time_embed.cond_proj.", "time_embedding.cond_proj.")
    return key.replace("transformer.text_projection", "text_projection")


@cache
def block_names(cfg: UNetConfig) -> dict[str, str]:
    """{LDM block: diffusers block}, in running order: diffusers numbers blocks level by level."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "time_embedding.cond_proj": "time_embedding.cond_proj",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    i = 1
    for level, depths in enumerate(cfg.down):
        for layer in range(len(depths)):
            names[f"input_blocks.{i}.0"] = f"down_blocks.{level}.resnets.{layer}"
            names[f"input_blocks.{i}.1"] = f"down_blocks.{level}.attentions.{layer}"
            i += 1
        names[f"input_blocks.{i}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        i += 1
    i = 0
    for level, depths in enumerate(cfg.up):
        for layer in range(len(depths)):
            names[f"output_blocks.{i}.0"] = f"up_blocks.{level}.resnets.{layer}"
            names[f"output_blocks.{i}.1"] = f"up_blocks.{level}.attentions.{layer}"
            i += 1
        # the upsampler follows the transformer, or the ResBlock where there is none
        upsampler = f"output_blocks.{i - 1}.{2 if depths[-1] else 1}.conv"
        names[upsampler] = f"up_blocks.{level}.upsamplers.0.conv"
    return names


def to_diffusers_path(path: str, cfg: UNetConfig) -> str:
    """`input_blocks.4.1.proj_in` -> `down_blocks.1.attentions.0.proj_in`."""
    names, parts = block_names(cfg), path.split(".")
    n = next(n for n in (4, 3, 2) if ".".join(parts[:n]) in names)
    rest = ".".join(parts[n:])
    return ".".join(filter(None, [names[".".join(parts[:n])], RES.get(rest, rest)]))


@cache
def module_table(config: Callable[[], UNetConfig]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{flattened name: (LDM path, shape of the weight)} of a UNet's layers, in both spellings."""
    with torch.device("meta"):
        unet = UNet(config())
    table = {}
    for path, m in unet.named_modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            for name in (path, to_diffusers_path(path, unet.cfg)):
                table[name.replace(".", "_")] = path, tuple(m.weight.shape)
    return table


@cache
def text_table() -> dict[str, str]:
    """{flattened name: Hugging Face's path below `text_model.`}, for 32 layers."""
    parts = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    paths = [f"encoder.layers.{i}.{part}" for i in range(32) for part in parts]
    return {path.replace(".", "_"): path for path in [*paths, "text_projection"]}


@cache
def text_paths() -> set[str]:
    """All paths of text encoders in a tau; CLIP-L has no text_projection."""
    paths = {te + path for te in TOWERS for path in text_table().values()}
    return paths - {"te1.text_projection"}
