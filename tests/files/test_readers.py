"""Where ComfyUI and A1111 put what minilcm writes, by their rules on names.

ComfyUI looks a module's flattened name up in a table of all modules, in LDM's and in diffusers'
spelling. A1111 turns diffusers' names into LDM's by arithmetic on the numbers of blocks, and takes
LDM's as they are. Neither is a package; programs that are one are run by
benchmarks/other_programs.py.
"""

import re

import pytest
import torch
from safetensors.torch import load_file

from minilcm.files.lora_file import write_tau
from minilcm.lora import target_paths
from minilcm.model.unet import UNet, sd15, sdxl, ssd1b

INSIDE = {  # a ResBlock: diffusers' name -> LDM's, flattened
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}


def comfyui_table(ldm_keys: dict[str, list[int]], to_diffusers: dict[str, str]) -> dict[str, str]:
    """{flattened name: LDM module} of every UNet module, from official keys, in both spellings."""
    modules = [key.removesuffix(".weight") for key in ldm_keys if key.endswith(".weight")]
    table = {path.replace(".", "_"): path for path in modules}
    return table | {to_diffusers[path].replace(".", "_"): path for path in modules}


def a1111_name(flat: str) -> str:
    """`down_blocks_1_attentions_0_proj_in` -> `input_blocks_4_1_proj_in`; other names stay.

    Three blocks a level: two layers and the downsampler, or three layers; the upsampler is in the
    third. It counts as that block's module 1 in the first level, 2 in others: right for SD1.x,
    whose first level has no transformers.
    """
    if m := re.fullmatch(r"(down|up)_blocks_(\d)_(attentions|resnets)_(\d)_(\w+)", flat):
        way, level, kind, layer, rest = m.groups()
        block = f"input_blocks_{3 * int(level) + int(layer) + 1}"
        if way == "up":
            block = f"output_blocks_{3 * int(level) + int(layer)}"
        return f"{block}_0_{INSIDE.get(rest, rest)}" if kind == "resnets" else f"{block}_1_{rest}"
    if m := re.fullmatch(r"mid_block_(attentions|resnets)_(\d)_(\w+)", flat):
        kind, layer, rest = m.groups()
        return (
            f"middle_block_{2 * int(layer)}_{INSIDE.get(rest, rest)}"
            if kind == "resnets"
            else f"middle_block_1_{rest}"
        )
    if m := re.fullmatch(r"down_blocks_(\d)_downsamplers_0_conv", flat):
        return f"input_blocks_{3 * int(m[1]) + 3}_0_op"
    if m := re.fullmatch(r"up_blocks_(\d)_upsamplers_0_conv", flat):
        return f"output_blocks_{3 * int(m[1]) + 2}_{1 if m[1] == '0' else 2}_conv"
    return flat


def a1111_table(ldm_keys: dict[str, list[int]], names: list[str]) -> dict[str, str]:
    """{flattened name: LDM module} of those `names` that A1111's arithmetic leads to a module."""
    modules = {
        key.removesuffix(".weight").replace(".", "_"): key.removesuffix(".weight")
        for key in ldm_keys
    }
    return {name: modules[a1111_name(name)] for name in names if a1111_name(name) in modules}


def write_numbered(path, family, style: str | None) -> dict[str, int]:
    """A LoRA of rank 1 for LCM-LoRA's modules, `lora_up` filled with its number; {path: number}."""
    with torch.device("meta"):
        unet = UNet(family())
    numbers = {target: i for i, target in enumerate(target_paths(unet))}
    tau = {}
    for target, i in numbers.items():
        out, *fan_in = unet.get_submodule(target).weight.shape
        up = torch.full((out, 1, *[1] * (len(fan_in) - 1)), float(i))
        tau[target] = up, torch.zeros(1, *fan_in), 0.5
    write_tau(path, tau, {}, style=style)
    return numbers


def read_names(path) -> dict[str, int]:
    """{flattened module: number} of such a file; every key is of three that all readers know."""
    tensors = load_file(path)
    names = [
        key.removesuffix(".lora_up.weight") for key in tensors if key.endswith(".lora_up.weight")
    ]
    endings = (".lora_up.weight", ".lora_down.weight", ".alpha")
    assert set(tensors) == {name + ending for name in names for ending in endings}
    return {
        name.removeprefix("lora_unet_"): int(tensors[f"{name}.lora_up.weight"].flatten()[0])
        for name in names
    }


CASES = [  # family, style, how many modules, which of them A1111 loses
    (sd15, None, 278, []),
    (sdxl, None, 788, []),
    (ssd1b, None, 423, []),
    (sd15, "ldm", 278, []),
    (sdxl, "diffusers", 788, ["up_blocks_0_upsamplers_0_conv"]),
    (ssd1b, "diffusers", 423, ["up_blocks_0_upsamplers_0_conv"]),
]


@pytest.mark.parametrize("family, style, modules, lost", CASES)
def test_comfyui_and_a1111_find_the_modules(
    tmp_path, official_keys, official_lora_keys, family, style, modules, lost
):
    """ComfyUI finds all; A1111 all but SDXL's lowest upsampler in diffusers' names: hence LDM."""
    numbers = write_numbered(tmp_path / "lora.safetensors", family, style)
    names = read_names(tmp_path / "lora.safetensors")
    keys = official_keys[family.__name__]
    comfyui = comfyui_table(keys, official_lora_keys[family.__name__])
    a1111 = a1111_table(keys, list(names))
    assert {comfyui[name]: number for name, number in names.items()} == numbers and len(
        numbers
    ) == modules
    assert [name for name in names if name not in a1111] == lost
    assert all(numbers[a1111[name]] == number for name, number in names.items() if name not in lost)


def test_a1111s_arithmetic_agrees_with_the_official_map(official_lora_keys):
    """Over SD1.5's attention and residual blocks, norms too: the rule above is not our own."""
    for ldm, diffusers in official_lora_keys["sd15"].items():
        if re.match(r"(input|middle|output)_block", ldm) and ldm != "input_blocks.0.0":
            assert a1111_name(diffusers.replace(".", "_")) == ldm.replace(".", "_")
