"""One file, one model: UNet, VAE and text tower under the official prefixes; and the state of a training run."""

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import NamedTuple, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .safefile import Header, all_finite, read_header, read_tensors, write_tensors
from .text import RENAMED, TextConfig, TextEncoder, clip_l_to_open_clip, open_clip_to_clip_l, sdxl_text
from .unet import UNet, UNetConfig, sd15, sdxl, ssd1b
from .vae import VAE, VAEConfig

# prefixes of each part in files; the first is the one written
UNET = ("model.diffusion_model.", "diffusion_model.")
VAE_ = ("first_stage_model.", "vae.")
CLIP_L = (
    "cond_stage_model.transformer.text_model.",
    "conditioner.embedders.0.transformer.text_model.",
    "cond_stage_model.transformer.",  # old merges
)
BIG_G = ("conditioner.embedders.1.model.transformer.text_model.", "conditioner.embedders.1.model.")
QUANTISED = re.compile(r".*(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|absmax|quant_(map|state)).*")
NO_WEIGHT = re.compile(  # buffers and leftovers of training that no network needs
    r"(betas|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recip(m1)?_alphas_cumprod|posterior_\w+"
    r"|.*\.position_ids|.*\.logit_scale|model_ema\..*|denoiser\.sigmas|loss\..*|embedding_manager\..*|global_step)"
)


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
    """The inverse of `to_json`. Raises ValueError and the like unless each field is there and of its type."""

    def tuples(x):
        return tuple(tuples(y) for y in x) if isinstance(x, list) else x

    def fits(value, kind) -> bool:
        args = get_args(kind)
        if isinstance(kind, UnionType):
            return any(fits(value, k) for k in args)
        if args:  # tuple[int, ...] or tuple[int, int, int]
            return type(value) is tuple and all(fits(x, args[0]) for x in value) and args[1:] in (
                (...,), args[:1] * (len(value) - 1)
            )  # fmt: skip
        if kind in (int, float):
            return type(value) in (int, kind) and 0 <= value <= 1 << 16
        return type(value) is kind

    def build(cls, values: dict):
        out = cls(**{key: tuples(value) for key, value in values.items()})
        for field in fields(cls):
            if not fits(getattr(out, field.name), field.type):
                raise ValueError(f"{field.name} is {getattr(out, field.name)!r}")
        return out

    raw = json.loads(text)
    parts = dict(
        unet=build(UNetConfig, raw["unet"]), vae=build(VAEConfig, raw["vae"]), text=build(TextConfig, raw["text"])
    )
    return build(Config, raw | parts)


def sd15_config() -> Config:
    return Config(sd15(), VAEConfig(), TextConfig(), size=512, guidance=7.5)


def sdxl_config() -> Config:
    return Config(sdxl(), VAEConfig(scale=0.13025), sdxl_text(), size=1024, guidance=5.0)


def ssd1b_config() -> Config:
    return replace(sdxl_config(), unet=ssd1b())


def count_blocks(config: Config) -> int:
    """About how many blocks the networks have; each has some tensors."""
    depths = [depth for level in (*config.unet.down, *config.unet.up) for depth in level]
    vae = 2 * len(config.vae.channels) * config.vae.res_blocks
    return (
        len(depths)
        + sum(depths)
        + (config.unet.middle or 0)
        + vae
        + config.text.layers
        + (config.text.big or (0, 0))[1]
    )


# ---- whose file is it?


def identify(path: str | Path) -> Config:
    """The family of a checkpoint from its header alone: what `load_model` would build.

    Raises ValueError with one line that says what the file is instead.
    """
    header, metadata = read_header(path)
    if lora := [k for k in header if re.search(r"^lora_|\.lora[._]|_lora\.|\.hada_|\.lokr_|\.processor\.", k)]:
        raise ValueError(f"{path}: this is a LoRA file; pass it with --lora, not as the checkpoint ({min(lora)})")
    unet = {k: shape for k, (_, shape) in part_of(header, UNET).items()}  # names and shapes, no prefix
    if "minilcm.config" not in metadata and "input_blocks.0.0.weight" not in unet:
        raise ValueError(f"{path}: {what_else(header)}; supported are SD1.x, SDXL base and SSD-1B single files")
    if marks := [k for k in header if k in ("v_pred", "ztsnr", "edm_mean", "edm_std")]:
        raise ValueError(f"{path}: a v-prediction or EDM checkpoint (key {marks[0]}); LCM-LoRA expects epsilon")
    if video := [k for k in unet if "time_stack" in k or "temporal" in k]:
        raise ValueError(f"{path}: detected a video UNet (key {video[0]}); supported: SD1.x, SDXL base, SSD-1B")
    refuse_quantised(path, header)
    if "minilcm.config" in metadata:
        try:
            config = from_json(metadata["minilcm.config"])
            if count_blocks(config) > len(header):
                raise ValueError("of a larger model than the file has tensors for")
            return config
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            what = ascii(str(error)[:200])
            raise ValueError(f"{path}: minilcm.config is not one of this version ({what})") from None

    matrices = {k: s for k, s in unet.items() if len(s) > 1}
    width, channels = matrices.get("input_blocks.0.0.weight", (None, None))[:2]
    context = next((s[1] for k, s in sorted(matrices.items()) if k.endswith("attn2.to_k.weight")), None)
    adm = matrices.get("label_emb.0.0.weight", (None, None))[1]
    i, depths = 1, []
    while any(k.startswith(f"input_blocks.{i}.") for k in unet):
        if f"input_blocks.{i}.0.in_layers.2.weight" in unet:
            depths.append(depth(unet, f"input_blocks.{i}.1"))
        i += 1
    middle = depth(unet, "middle_block.1") if "middle_block.2.in_layers.2.weight" in unet else None
    facts = width, channels, context, adm, tuple(depths), middle
    for config in (sd15_config(), sdxl_config(), ssd1b_config()):
        u = config.unet
        if facts == (u.channels[0], 4, u.context_dim, u.adm, tuple(d for level in u.down for d in level), u.middle):
            w_keys = [k for k in unet if k.endswith("cond_proj.weight")]
            if all(k in matrices for k in w_keys):
                return replace(config, unet=replace(u, w_dim=matrices[w_keys[0]][1])) if w_keys else config
    raise ValueError(f"{path}: detected {refused_family(*facts)}; supported: SD1.x, SDXL base, SSD-1B")


def refuse_quantised(path: str | Path, header: Header) -> None:
    """Raises ValueError, one line, if a part has tensors that are no floating-point numbers, or that others scale."""
    for prefixes in (UNET, VAE_, CLIP_L, BIG_G):
        for key, (file_key, _) in part_of(header, prefixes).items():
            stored = header[file_key].dtype
            is_weight = not NO_WEIGHT.fullmatch(file_key) and not NO_WEIGHT.fullmatch(key)
            if is_weight and not stored.startswith(("F", "BF")) or QUANTISED.fullmatch(key):
                raise ValueError(f"{path}: {file_key} is {stored}, quantised; dequantise it first")


def depth(unet: dict, block: str) -> int:
    """How many transformer blocks lie under `block`."""
    prefix = f"{block}.transformer_blocks."
    return len({k.removeprefix(prefix).split(".")[0] for k in unet if k.startswith(prefix)})


def what_else(header: Header) -> str:
    """What a file without an LDM UNet looks like."""
    for mark, what in (
        ("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet (down_blocks); give the LDM single file"),
        ("joint_blocks.", "Stable Diffusion 3"),
        ("double_blocks.", "Flux"),
        ("clf.1.", "Stable Cascade"),
        ("x_embedder.", "a diffusion transformer"),
        ("encoder.conv_in.weight", "a VAE without UNet; pass it with --vae"),
        ("text_model.encoder.", "a text encoder without UNet"),
    ):
        if found := [k for k in header if mark in k]:
            return f"this is {what} (key {min(found)})"
    return f"no LDM checkpoint (first key: {min(header, default='none')})"


def refused_family(width: int, channels: int, context: int | None, adm: int | None, depths: tuple, middle) -> str:
    """The name of a UNet that is none of the three, from its shapes. FORMATS.md section 2.2."""
    if width == 256:
        return "the x4 upscaler"
    if channels in (8, 9):
        return f"{'an inpainting' if channels == 9 else 'a pix2pix'} UNet ({channels} input channels)"
    if width == 384:
        return "the SDXL refiner"
    if context == 2048 and depths == (0, 0, 1, 1, 2, 2):
        return "Segmind Vega"
    if context == 2048 and depths[:2] == (0, 2):
        return "KOALA"
    if context == 1024 and depths == (1, 1, 1, 1, 1, 1, 0, 0):
        return "SD2.x"
    if context in (768, 1024) and depths != (1, 1, 1, 1, 1, 1, 0, 0):
        return "a distilled small SD (BK-SDM, SDXS or the like)"
    return (
        f"an unknown UNet (width {width}, in {channels}, context {context}, adm {adm}, depths {depths}, mid {middle})"
    )


# ---- loading


def part_of(header: Header, prefixes: tuple[str, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{key below the prefix: (key in the file, shape)} of one part, by the first of `prefixes` that the file has."""
    for prefix in prefixes:
        if keys := [k for k in header if k.startswith(prefix)]:
            return {k[len(prefix) :]: (k, header[k].shape) for k in keys}
    if prefixes in (UNET, VAE_):  # a file of this part alone
        mark = "input_blocks." if prefixes == UNET else "encoder."
        if any(k.startswith(mark) for k in header):
            return {k: (k, entry.shape) for k, entry in header.items()}
    return {}


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
    parts = {UNET[0]: unet, VAE_[0]: vae.state_dict(), CLIP_L[0]: open_clip_to_clip_l(text.tower.state_dict())}
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
