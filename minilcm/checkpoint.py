"""One file, one model: UNet, VAE and text tower under the official prefixes; and the state of a training run."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .safefile import read_tensors, write_tensors
from .text import TextConfig, TextEncoder, clip_l_to_open_clip, open_clip_to_clip_l
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

UNET, VAE_, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."


@dataclass(frozen=True)
class Config:
    """Everything about a model that its tensors do not say; written into the file's metadata as JSON."""

    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    size: int  # native width and height in pixels
    guidance: float  # default guidance (1 + w) for ddim and dpmpp
    names: tuple[str, ...] = ()  # what the model was taught to draw, if that is a closed list


def to_json(config: Config) -> str:
    return json.dumps(asdict(config))


def from_json(text: str) -> Config:
    def tuples(x):
        return tuple(tuples(y) for y in x) if isinstance(x, list) else x

    def build(cls, fields: dict):
        return cls(**{key: tuples(value) for key, value in fields.items()})

    raw = json.loads(text)
    parts = dict(
        unet=build(UNetConfig, raw["unet"]), vae=build(VAEConfig, raw["vae"]), text=build(TextConfig, raw["text"])
    )
    return build(Config, raw | parts)


def load_strict(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Put `state` into a module built on meta. Raises ValueError naming missing, unknown and misshapen keys."""
    want, problems = module.state_dict(), []
    missing, extra = sorted(set(want) - set(state)), sorted(set(state) - set(want))
    problems += [f"{len(missing)} missing keys, first: {', '.join(missing[:5])}"] if missing else []
    problems += [f"{len(extra)} unknown keys, first: {', '.join(extra[:5])}"] if extra else []
    wrong = [k for k in want if k in state and want[k].shape != state[k].shape]
    problems += [f"{wrong[0]} is {tuple(state[wrong[0]].shape)}, not {tuple(want[wrong[0]].shape)}"] if wrong else []
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}")
    module.load_state_dict(state, assign=True)


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[UNet, VAE, TextEncoder, Config]:
    """(unet, vae, text, config) of a single-file checkpoint, frozen, weights in `dtype`.

    Raises ValueError with one line: no such file, damaged, a LoRA, no config, keys that do not fit the config.
    """
    tensors, metadata = read_tensors(path)
    if any(key.startswith("lora_") for key in tensors):
        raise ValueError(f"{path}: this is a LoRA file; pass it with --lora, not as the checkpoint")
    if "minilcm.config" not in metadata:
        raise ValueError(f"{path}: no minilcm.config in the header; only models written by minilcm are supported")
    try:
        config = from_json(metadata["minilcm.config"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: minilcm.config is not one of this version ({error})") from None
    if stray := sorted(key for key in tensors if not key.startswith((UNET, VAE_, TEXT))):
        raise ValueError(f"{path}: {len(stray)} keys belong to no part of the model, first: {', '.join(stray[:5])}")
    part = {p: {k[len(p) :]: v.to(dtype) for k, v in tensors.items() if k.startswith(p)} for p in (UNET, VAE_, TEXT)}
    with torch.device("meta"):
        unet, vae = UNet(config.unet), VAE(config.vae)
    text = TextEncoder(config.text)
    load_strict(unet, part[UNET], f"{path}: UNet")
    load_strict(vae, part[VAE_], f"{path}: VAE")
    try:
        tower = clip_l_to_open_clip(part[TEXT])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: text tower: a layer's q, k, v are not all there or do not fit ({error})") from None
    load_strict(text.tower, tower, f"{path}: text tower")
    for module in (unet, vae, text):
        module.requires_grad_(False).eval()
    return unet, vae, text, config


def save_model(path: str | Path, unet: dict[str, Tensor], vae: VAE, text: TextEncoder, config: Config) -> None:
    """Write a single-file checkpoint in float16, atomically; `unet` is a state dict: it may be an average."""
    parts = {UNET: unet, VAE_: vae.state_dict(), TEXT: open_clip_to_clip_l(text.tower.state_dict())}
    tensors = {prefix + key: value.half() for prefix, state in parts.items() for key, value in state.items()}
    write_tensors(path, tensors, {"minilcm.config": to_json(config)})


def save_state(path: str | Path, named: dict[str, Tensor], optimizer: torch.optim.Optimizer, run: dict) -> None:
    """All a run needs to go on: trained tensors (and averages), optimizer moments, and `run` (step, flags) as JSON.

    There is no generator to save: everything random in a step is drawn from (seed, step). Safetensors, atomic.
    """
    moments = {
        f"optimizer.{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    write_tensors(path, {k: v.clone() for k, v in named.items()} | moments, {"minilcm.run": json.dumps(run)})


@torch.no_grad()
def load_state(path: str | Path, named: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict:
    """Fill `named` and the optimizer in place from `save_state`'s file; -> `run`. Raises ValueError on other keys."""
    tensors, metadata = read_tensors(path)
    moments = {k: tensors.pop(k) for k in list(tensors) if k.startswith("optimizer.")}
    if set(tensors) != set(named) or any(tensors[k].shape != named[k].shape for k in named):
        raise ValueError(f"{path}: state of another model or objective; give another --out, or the flags of that run")
    for key, value in named.items():
        value.copy_(tensors[key])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        _, i, name = key.split(".")
        state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads(metadata["minilcm.run"])
