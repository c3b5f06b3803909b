"""LoRA files <-> tau. A file names a module by its path with dots turned into underscores, after `lora_unet_`:

    lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.{lora_down.weight, lora_up.weight, alpha}

Such a name cannot be split again (`to_out_0`, `ff_net_2`): it is looked up among the module paths of the known UNets.
"""

import re
from functools import cache
from pathlib import Path

import torch
from torch import nn

from .lora import Tau
from .safefile import read_tensors, write_tensors
from .unet import UNet, emoji, sd15, sdxl, ssd1b

PREFIX = "lora_unet_"
PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


@cache
def module_table(family) -> dict[str, str]:
    """{flattened name: LDM path} of the Linear and Conv2d modules of a family's UNet, from the module tree itself."""
    with torch.device("meta"):
        unet = UNet(family())
    return {path.replace(".", "_"): path for path, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def to_ldm_path(flat: str) -> str | None:
    """`input_blocks_1_0_in_layers_2` -> `input_blocks.1.0.in_layers.2`; None if no known UNet has such a module."""
    for family in (emoji, sd15, ssd1b, sdxl):
        if flat in module_table(family):
            return module_table(family)[flat]
    return None


def read_tau(path: str | Path) -> Tau:
    """A LoRA file as {LDM path: (up, down, lora_alpha)}, tensors float32; a missing alpha means rank.

    Raises ValueError with one line: no such file, damaged, not a LoRA, a key that names no module, down without up,
    ranks that do not fit, values that are not finite.
    """
    tensors, _ = read_tensors(path)
    if not any(key.startswith(PREFIX) for key in tensors):
        what = "a checkpoint; pass it with --model" if any("diffusion_model." in k for k in tensors) else "no LoRA file"
        raise ValueError(f"{path}: this is {what} (first key: {min(tensors, default='none')})")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        match = re.fullmatch(rf"{PREFIX}(\w+)\.({'|'.join(map(re.escape, PARTS))})", key)
        target = to_ldm_path(match[1]) if match else None
        if target is None:
            raise ValueError(f"{path}: key {key} names no module of a known UNet")
        if not value.isfinite().all():
            raise ValueError(f"{path}: {key} has values that are not finite")
        modules.setdefault(target, {})[match[2]] = value.float()
    tau: Tau = {}
    for target, parts in modules.items():
        down, up = parts.get("lora_down.weight"), parts.get("lora_up.weight")
        if down is None or up is None:
            raise ValueError(f"{path}: {target} has only one of lora_down and lora_up; the file is incomplete")
        rank, kernel = down.shape[:1], (1,) * (down.ndim - 2)
        if down.ndim not in (2, 4) or up.shape[1:] != (*rank, *kernel) or 0 in rank:
            raise ValueError(f"{path}: {target} up {tuple(up.shape)} does not fit down {tuple(down.shape)}")
        if "alpha" in parts and parts["alpha"].numel() != 1:
            raise ValueError(f"{path}: {target} alpha has {parts['alpha'].numel()} values, not one")
        tau[target] = (up, down, parts["alpha"].item() if "alpha" in parts else float(down.shape[0]))
    return tau


def read_recipe(path: str | Path) -> dict[str, str]:
    """What `write_tau` recorded: {"w": "7.5", "K": "50", ...}, without the `minilcm.` prefix."""
    _, metadata = read_tensors(path)
    return {key.removeprefix("minilcm."): value for key, value in metadata.items() if key.startswith("minilcm.")}


def write_tau(path: str | Path, tau: Tau, recipe: dict[str, str], dtype: torch.dtype = torch.float16) -> None:
    """Write tau as a LoRA file, atomically, alpha kept; the recipe goes into the metadata under `minilcm.*`."""
    tensors = {}
    for target, (up, down, lora_alpha) in tau.items():
        flat = PREFIX + target.replace(".", "_")
        tensors[f"{flat}.lora_up.weight"] = up.to(dtype)
        tensors[f"{flat}.lora_down.weight"] = down.to(dtype)
        tensors[f"{flat}.alpha"] = torch.tensor(lora_alpha, dtype=dtype)
    ranks = sorted({down.shape[0] for _, down, _ in tau.values()})
    alphas = sorted({lora_alpha for _, _, lora_alpha in tau.values()})
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": ",".join(map(str, ranks)),
        "ss_network_alpha": ",".join(f"{a:g}" for a in alphas),
    }
    write_tensors(path, tensors, metadata | {f"minilcm.{key}": value for key, value in recipe.items()})
