"""Whose file is it? The family of a checkpoint, or what else a file is, from its header alone."""

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import get_args

from ..model.text import TextConfig, sdxl_text
from ..model.unet import UNetConfig, sd15, sdxl, ssd1b
from ..model.vae import VAEConfig
from .safetensors_file import Header, read_header

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


# ---- the parts of a file


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
