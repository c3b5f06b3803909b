"""Which model is in a file, or what else is in it, from its header alone."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import NamedTuple, get_args

from ..model.text import TextConfig, sd2_text, sdxl_text
from ..model.unet import UNetConfig, emoji, sd2, sd15, sdxl, small_sd, ssd1b, tiny_sd, vega
from ..model.vae import VAEConfig
from .lora_keys import of_lora
from .parts import PARTS, UNET, part_of
from .safetensors_file import FLOATS, MALFORMED, Header, read_header

QUANTISED = re.compile(
    r".*(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|absmax|quant_(map|state)).*"
)


@dataclass(frozen=True)
class Config:
    """What a model's tensors do not tell about it; written into the file's metadata as JSON."""

    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    size: int  # native width and height in pixels
    guidance: float  # default guidance (1 + w) for ddim and dpmpp
    names: tuple[str, ...] = ()  # what the model can draw, if that is a closed list

    @property
    def multiple(self) -> int:
        """Of width and height: pixels per point of the UNet's lowest level."""
        return 2 ** (len(self.vae.channels) + len(self.unet.channels) - 2)


def to_json(config: Config) -> str:
    return json.dumps(asdict(config))


def from_json(text: str) -> Config:
    """The inverse of `to_json`. Raises one of MALFORMED unless all fields have the right types."""

    def tuples(x):
        return tuple(tuples(y) for y in x) if isinstance(x, list) else x

    def fits(value, kind) -> bool:
        args = get_args(kind)
        if isinstance(kind, UnionType):
            return any(fits(value, k) for k in args)
        if args:  # tuple[int, ...] or tuple[int, int, int]
            if type(value) is not tuple or args[1:] not in ((...,), args[:1] * (len(value) - 1)):
                return False
            return all(fits(x, args[0]) for x in value)
        if kind in (int, float):
            return type(value) in (int, kind) and 0 <= value <= 1 << 16
        return type(value) is kind

    def build(cls, values: dict):
        out = cls(**{key: tuples(value) for key, value in values.items()})
        for field in fields(cls):
            if not fits(value := getattr(out, field.name), field.type):
                raise ValueError(f"{field.name} is {value!r}")
        return out

    raw = json.loads(text)
    classes = {"unet": UNetConfig, "vae": VAEConfig, "text": TextConfig}
    return build(Config, raw | {part: build(cls, raw[part]) for part, cls in classes.items()})


def sd15_config() -> Config:
    return Config(sd15(), VAEConfig(), TextConfig(), size=512, guidance=7.5)


def sd2_config() -> Config:
    return Config(sd2(), VAEConfig(), sd2_text(), size=512, guidance=7.5)


def sdxl_config() -> Config:
    return Config(sdxl(), VAEConfig(scale=0.13025), sdxl_text(), size=1024, guidance=5.0)


def ssd1b_config() -> Config:
    return replace(sdxl_config(), unet=ssd1b())


class Family(NamedTuple):
    """A UNet that has a name: by these the modules of LoRA files are looked up."""

    title: str
    unet: Callable[[], UNetConfig]
    config: Callable[[], Config] | None = None  # of official checkpoints, for train.py --plan


FAMILIES = {
    "emoji": Family("the emoji model", emoji),
    "sd15": Family("SD1.x", sd15, sd15_config),
    "sd2": Family("SD2.x", sd2, sd2_config),
    "ssd1b": Family("SSD-1B", ssd1b, ssd1b_config),
    "sdxl": Family("SDXL base", sdxl, sdxl_config),  # after SSD-1B, whose modules it all has, too
    "vega": Family("Segmind Vega", vega),
    "small-sd": Family("small-sd", small_sd),
    "tiny-sd": Family("tiny-sd", tiny_sd),
}
SUPPORTED = "SD1.x, SD2.x, SDXL and what is distilled from them (SSD-1B, Vega, tiny-sd, ...)"


def check_size(config: Config, size: int) -> None:
    """Raises ValueError unless the UNet's lowest level divides this width and height evenly."""
    if size < 1 or size % config.multiple:
        raise ValueError(f"--size is {size}; give a multiple of {config.multiple}")


def is_large(config: Config) -> bool:
    """Of the size of an official checkpoint, for which saving memory is worth time."""
    return config.unet.channels[0] >= 320


def count_blocks(config: Config) -> int:
    """Roughly how many blocks the networks have: a bound on what a header may claim."""
    unet, text = config.unet, config.text
    depths = [depth for level in (*unet.down, *unet.up) for depth in level]
    vae = 2 * len(config.vae.channels) * config.vae.res_blocks
    towers = text.layers + (text.big or (0, 0))[1]
    return len(depths) + sum(depths) + (unet.middle or 0) + vae + towers


# ---- which model is it?


class Checkpoint(NamedTuple):
    """A checkpoint file that has been opened: its header, read once, and what it says."""

    path: Path
    header: Header
    metadata: dict[str, str]
    config: Config


def open_checkpoint(path: str | Path, prediction: str | None = None) -> Checkpoint:
    """Read the header and identify the family; `prediction`, "eps" or "v", overrules the file.

    Raises ValueError in one line for a file that is no checkpoint of a family we know.
    """
    header, metadata = read_header(path)
    config = identify_header(path, header, metadata, prediction)
    return Checkpoint(Path(path), header, metadata, config)


def of_adapter(key: str) -> bool:
    """Whether a key is of a LoRA file, or of a relative that `read_tau` refuses by name."""
    return of_lora(key) or bool(re.search(r"^lora_|\.hada_|\.lokr_|\.processor\.", key))


def identify_header(
    path: str | Path, header: Header, metadata: dict[str, str], prediction: str | None = None
) -> Config:
    """`open_checkpoint` for a header that has been read; `path` is for messages."""
    if lora := [key for key in header if of_adapter(key)]:
        what = "this is a LoRA file, not a checkpoint; pass it with --lora, or after the checkpoint"
        raise ValueError(f"{path}: {what} ({min(lora)})")
    unet = {k: shape for k, (_, shape) in part_of(header, UNET).items()}  # no prefix
    if "minilcm.config" not in metadata and "input_blocks.0.0.weight" not in unet:
        raise ValueError(f"{path}: {what_else(header)}; supported are single files of {SUPPORTED}")
    if marks := [k for k in header if k.startswith("edm_")]:
        raise ValueError(f"{path}: an EDM checkpoint (key {min(marks)}); supported: {SUPPORTED}")
    if video := [k for k in unet if "time_stack" in k or "temporal" in k]:
        raise ValueError(f"{path}: detected a video UNet (key {video[0]}); supported: {SUPPORTED}")
    refuse_quantised(path, header)
    if "minilcm.config" in metadata:
        try:
            config = from_json(metadata["minilcm.config"])
            if count_blocks(config) > len(header):
                raise ValueError("it describes a larger model than the file has tensors for")
        except MALFORMED as error:
            what = ascii(str(error)[:200])
            raise ValueError(f"{path}: minilcm.config is not of this version ({what})") from None
    else:
        config = config_of_shapes(path, unet)
    # keys as ComfyUI and NoobAI have them, metadata as kohya's and ComfyUI's
    said = {metadata.get(f"modelspec.{key}") for key in ("prediction_type", "predict_key")}
    v = config.unet.v or "v" in said or "v_pred" in header or "ztsnr" in header
    if prediction is not None:
        v = prediction == "v"
    elif config.text.open_clip and not v and said == {None} and "minilcm.config" not in metadata:
        print(f"{path}: SD2.x, taken to predict noise; give --prediction v for 768-v models")
    zero_snr = v and (config.unet.zero_snr or "ztsnr" in header)
    size = 768 if config.text.open_clip and v else config.size
    return replace(config, unet=replace(config.unet, v=v, zero_snr=zero_snr), size=size)


def config_of_shapes(path: str | Path, unet: dict[str, tuple[int, ...]]) -> Config:
    """The Config of the official family that reads such a prompt, with the sizes of this UNet."""
    matrices = {k: s for k, s in unet.items() if len(s) > 1}
    width, channels = matrices.get("input_blocks.0.0.weight", (None, None))[:2]
    contexts = [s[1] for k, s in sorted(matrices.items()) if k.endswith("attn2.to_k.weight")]
    context = next(iter(contexts), None)
    adm = matrices.get("label_emb.0.0.weight", (None, None))[1]
    w_dims = [matrices.get(k, (0, 0))[1] for k in unet if k.endswith("cond_proj.weight")]
    for config in (sd15_config(), sd2_config(), sdxl_config()):
        u = config.unet
        if (width, channels, context, adm) == (u.channels[0], 4, u.context_dim, u.adm):
            if 0 not in w_dims:
                sizes = replace(u, **sizes_of(path, matrices), w_dim=w_dims[0] if w_dims else None)
                return replace(config, unet=sizes)
    facts = f"an unknown UNet (width {width}, in {channels}, context {context}, adm {adm})"
    inputs = {8: "a pix2pix UNet (8 input channels)", 9: "an inpainting UNet (9 input channels)"}
    widths = {256: "the x4 upscaler", 384: "the SDXL refiner"}
    what = widths.get(width) or inputs.get(channels) or facts
    raise ValueError(f"{path}: detected {what}; supported: {SUPPORTED}")


def sizes_of(path: str | Path, unet: dict[str, tuple[int, ...]]) -> dict:
    """The widths and depths of a UNet: the fields of UNetConfig that distilled models change."""

    def depth(block: str) -> int:
        prefix = f"{block}.1.transformer_blocks."
        return len({k.removeprefix(prefix).split(".")[0] for k in unet if k.startswith(prefix)})

    def count(side: str) -> int:
        return len({k.split(".")[1] for k in unet if k.startswith(side)})

    channels, down, up = [], [()], [()]
    for i in range(1, count("input_blocks.")):
        block = f"input_blocks.{i}"
        if f"{block}.0.op.weight" in unet:
            down.append(())
            continue
        kernel = f"{block}.0.out_layers.3.weight"
        if kernel not in unet:
            raise ValueError(f"{path}: UNet: {kernel} is missing, or no kernel")
        channels[len(down) - 1 :] = [unet[kernel][0]]
        down[-1] += (depth(block),)
    for i in range(count("output_blocks.")):
        block = f"output_blocks.{i}"
        up[-1] += (depth(block),)
        if f"{block}.1.conv.weight" in unet or f"{block}.2.conv.weight" in unet:
            up.append(())
    middle = None if "middle_block.0.in_layers.2.weight" in unet else 0
    if "middle_block.2.in_layers.2.weight" in unet:
        middle = depth("middle_block")
    return dict(channels=tuple(channels), down=tuple(down), middle=middle, up=tuple(up))


def refuse_quantised(path: str | Path, header: Header) -> None:
    """Raises ValueError if a part has tensors that are no floats, or that other tensors scale."""
    for prefixes in PARTS:
        for key, (file_key, _) in part_of(header, prefixes).items():
            stored = header[file_key].dtype
            if stored not in FLOATS or QUANTISED.fullmatch(key):
                raise ValueError(f"{path}: {file_key} is {stored}, quantised; dequantise it first")


def what_else(header: Header) -> str:
    """What a file without an LDM UNet looks like."""
    diffusers = "a diffusers UNet (down_blocks); give the LDM single file"
    marks = {  # in a key
        "joint_blocks.": "Stable Diffusion 3",
        "double_blocks.": "Flux",
        "clf.1.": "Stable Cascade",
        "x_embedder.": "a diffusion transformer",
        "encoder.conv_in.weight": "a VAE without UNet; pass it with --vae",
        "down_blocks.0.resnets.0.conv1.weight": diffusers,
        "text_model.encoder.": "a text encoder without UNet",
    }
    for mark, what in marks.items():
        if found := [k for k in header if mark in k]:
            return f"this is {what} (key {min(found)})"
    return f"not an LDM checkpoint (first key: {min(header, default='none')})"
