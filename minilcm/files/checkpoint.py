"""One file, one model: UNet, VAE and text tower under the official prefixes; and the state of a training run."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..model.text import RENAMED, TextEncoder, clip_l_to_open_clip, open_clip_to_clip_l
from ..model.unet import UNet
from ..model.vae import VAE
from ..run.processes import share_of, whole
from .identify import BIG_G, CLIP_L, NO_WEIGHT, UNET, VAE_, Config, identify, part_of, refuse_quantised, to_json
from .safetensors_file import Header, all_finite, read_header, read_tensors, write_tensors

# ---- loading


def rename(key: str) -> str:
    """Spellings of the wild -> official, within a part: VAE attention by diffusers' names, cond_proj."""
    key = re.sub(r"^(.*mid\.attn_1\.)to_([qkv])\.", r"\1\2.", key).replace("attn_1.to_out.0.", "attn_1.proj_out.")
    return key.replace("time_embed.cond_proj.", "time_embedding.cond_proj.")


def read_part(path: str | Path, header: Header, prefixes: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one part under official names, one at a time into `dtype`. Raises ValueError on NaN."""
    out = {}
    with safe_open(path, "pt") as f:
        for key, (file_key, _) in part_of(header, prefixes).items():
            if NO_WEIGHT.fullmatch(file_key) or NO_WEIGHT.fullmatch(key):
                continue
            value = f.get_tensor(file_key).to(dtype)
            if not all_finite(value):
                raise ValueError(f"{path}: {file_key} has values that are not finite")
            out[rename(key)] = value
    return out


class Place(NamedTuple):
    """Where a file keeps the weight of a tau's path."""

    key: str
    rows: slice = slice(None)  # bigG's q, k and v are thirds of one matrix
    transposed: bool = False  # bigG's text_projection


def places(header: Header) -> dict[str, Place]:
    """{path in a tau: Place} of all weights that a LoRA may change in a checkpoint."""
    out = {}
    for prefixes, te in ((UNET, ""), (CLIP_L, "te1."), (BIG_G, "te2.")):
        for key, (file_key, shape) in part_of(header, prefixes).items():
            path = te + key.removesuffix(".weight")
            if fused := re.fullmatch(r"te2\.transformer\.resblocks\.(\d+)\.attn\.in_proj_weight", path):
                for i, x in enumerate("qkv"):
                    rows = slice(i * shape[0] // 3, (i + 1) * shape[0] // 3)
                    out[f"te2.encoder.layers.{fused[1]}.self_attn.{x}_proj"] = Place(file_key, rows)
            elif path == "te2.text_projection":
                out[path] = Place(file_key, transposed=key == "text_projection")
            elif key.endswith(".weight"):
                if te == "te2.":
                    for theirs, ours in RENAMED.items():
                        path = path.replace(ours, theirs)
                out[path] = Place(file_key)
    return out


def load_strict(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Put `state` into a module built on meta; 1x1 kernels may be matrices and the reverse.

    Raises ValueError naming missing and misshapen keys; what is left over is named in one printed line.
    """
    want, problems = module.state_dict(), []
    for key in want.keys() & state.keys():
        there, here = tuple(state[key].shape), tuple(want[key].shape)
        if there != here and (*there, 1, 1) == here or there == (*here, 1, 1):
            state[key] = state[key].reshape(here)
    missing, extra = sorted(set(want) - set(state)), sorted(set(state) - set(want))
    problems += [f"{len(missing)} missing keys, first: {', '.join(missing[:5])}"] if missing else []
    problems += [f"{len(extra)} unknown keys, first: {', '.join(extra[:5])}"] if extra and missing else []
    wrong = sorted(k for k in want if k in state and want[k].shape != state[k].shape)
    problems += [f"{wrong[0]} is {tuple(state[wrong[0]].shape)}, not {tuple(want[wrong[0]].shape)}"] if wrong else []
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}")
    if extra:
        print(f"{what}: {len(extra)} keys not used, first: {', '.join(extra[:5])}")
    module.load_state_dict({k: state[k] for k in want}, assign=True)


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, vae_path: str | Path | None = None
) -> tuple[UNet, VAE, TextEncoder, Config]:
    """(unet, vae, text, config) of a single-file checkpoint, frozen. UNet and text in `dtype`, the VAE in float32.

    Families: SD1.x, SDXL base, SSD-1B and what minilcm writes. SDXL's VAE overflows in float16, hence float32.
    `vae_path`: a file whose VAE to take instead. One tensor at a time: the peak is one model in `dtype`.
    Raises ValueError with one line: no such file, damaged, another family, a part that is missing or does not fit.
    """
    config = identify(path)
    header, _ = read_header(path)
    vae_path = Path(vae_path or path)
    vae_header, _ = read_header(vae_path)
    refuse_quantised(vae_path, vae_header)
    if narrow := [k for k, entry in header.items() if entry.dtype.startswith("F8")]:
        print(f"{path}: {len(narrow)} tensors are float8 and are widened: less exact than the file they were made from")
    try:
        with torch.device("meta"):
            unet, vae, text = UNet(config.unet), VAE(config.vae), TextEncoder(config.text)
    except (ValueError, RuntimeError, AssertionError, IndexError, ArithmeticError) as error:
        what = ascii(str(error)[:200])
        raise ValueError(f"{path}: minilcm.config describes a network that cannot be built ({what})") from None
    load_strict(unet, read_part(path, header, UNET, dtype), f"{path}: UNet")
    if not part_of(vae_header, VAE_):
        raise ValueError(f"{vae_path}: no VAE in the file; give one with --vae FILE")
    load_strict(vae, read_part(vae_path, vae_header, VAE_, torch.float32), f"{vae_path}: VAE")

    def tower(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
        try:
            return clip_l_to_open_clip(state)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: {what}: a layer's q, k, v are not all there or do not fit ({error})") from None

    if not part_of(header, CLIP_L):
        raise ValueError(f"{path}: no text encoder in the file; give the whole checkpoint")
    load_strict(text.tower, tower(read_part(path, header, CLIP_L, dtype), "text tower"), f"{path}: text tower")
    if config.text.big:
        state = read_part(path, header, BIG_G, dtype)
        if "text_projection.weight" in state:  # Hugging Face multiplies from the left
            state["text_projection"] = state.pop("text_projection.weight").T.contiguous()
        load_strict(text.big, tower(state, "second text tower"), f"{path}: second text tower")
    parts = [part_of(header, prefixes).values() for prefixes in (UNET, VAE_, CLIP_L, BIG_G)]
    used = {file_key for part in parts for file_key, _ in part}
    if stray := sorted(k for k in header if k not in used and not NO_WEIGHT.fullmatch(k)):
        print(f"{path}: {len(stray)} keys belong to no part and are not used, first: {', '.join(stray[:5])}")
    for module in (unet, vae, text):
        module.requires_grad_(False).eval()
    return unet, vae, text, config


def save_model(path: str | Path, unet: dict[str, Tensor], vae: VAE, text: TextEncoder, config: Config) -> None:
    """Write a single-file checkpoint in float16, atomically; `unet` is a state dict: it may be an average."""
    parts = {UNET[0]: unet, VAE_[0]: vae.state_dict()}
    parts[CLIP_L[1 if config.text.big else 0]] = open_clip_to_clip_l(text.tower.state_dict())
    if config.text.big:  # SDXL keeps its second tower by open_clip's own names
        parts[BIG_G[1]] = text.big.state_dict()
    tensors = {prefix + key: value.half() for prefix, state in parts.items() for key, value in state.items()}
    write_tensors(path, tensors, {"minilcm.config": to_json(config)})


# ---- the state of a run


def state_tensors(named: dict[str, Tensor], optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Tensor]:
    """All a run needs to go on, on the CPU: trained tensors (and averages), and the optimizer's moments.

    There is no generator to save: everything random in a step is drawn from (seed, step). Where ranks have shares of
    the tensors, all must call this, and those that do not `keep` get {}.
    """
    moments = {
        f"optimizer.{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    out = {}
    for key, value in (named | moments).items():
        value = whole(value).detach()
        if keep:
            out[key] = value.cpu().clone()
    return out


def save_state(path: str | Path, tensors: dict[str, Tensor], run: dict) -> None:
    """Write `state_tensors` and `run` (step, flags) as safetensors with JSON in the header, atomically."""
    write_tensors(path, tensors, {"minilcm.run": json.dumps(run)})


def latest_state(folder: str | Path) -> Path:
    """The newest whole state of a run. Raises ValueError if there is none."""
    for path in sorted(Path(folder).glob("state_*.safetensors"), reverse=True):
        try:
            read_run(path)
            return path
        except ValueError as error:
            print(f"{error}; going on from the one before")
    raise ValueError(f"{folder}: no state of a run to go on from; start one without --resume")


def read_run(path: str | Path) -> dict:
    """{"step", "flags"} of a state. Raises ValueError if the file is no whole state."""
    _, metadata = read_header(path)
    if "minilcm.run" not in metadata:
        raise ValueError(f"{path}: not the state of a run")
    return json.loads(metadata["minilcm.run"])


@torch.no_grad()
def load_state(path: str | Path, named: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict:
    """Fill `named` and the optimizer in place from `save_state`'s file; -> `run`. Raises ValueError on other keys."""
    tensors, _ = read_tensors(path)
    moments = {k: tensors.pop(k) for k in list(tensors) if k.startswith("optimizer.")}
    if set(tensors) != set(named) or any(tensors[k].shape != named[k].shape for k in named):
        raise ValueError(f"{path}: state of another model or objective; give another --out, or the flags of that run")
    for key, value in named.items():
        value.copy_(share_of(tensors[key], value))
    parameters = optimizer.param_groups[0]["params"]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        _, i, name = key.split(".")
        like = parameters[int(i)]
        state.setdefault(int(i), {})[name] = share_of(value, like) if value.shape == like.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return read_run(path)
