"""One file, one model: UNet, VAE and text encoders under official prefixes, loaded strictly."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..merge import no_kernel
from ..model.text import RENAMED, TextEncoder, clip_l_to_open_clip, open_clip_to_clip_l, qkv_rows
from ..model.tiny_vae import TinyDecoder
from ..model.unet import UNet
from ..model.vae import VAE
from .identify import Checkpoint, Config, open_checkpoint, refuse_quantised, to_json
from .names import text_paths
from .parts import BIG_G, CLIP_L, NO_WEIGHT, PARTS, UNET, VAE_, part_of
from .safetensors_file import Header, all_finite, read_header, read_tensors, write_tensors

if TYPE_CHECKING:
    from ..metrics import Judge


def read_part(
    path: str | Path, header: Header, prefixes: tuple[str, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of one part under official names. Raises as `read`."""
    part = part_of(header, prefixes)
    return read(path, {name: file_key for name, (file_key, _) in part.items()}, dtype)


def read(path: str | Path, keys: dict[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of {name: key}, one at a time into `dtype`. Raises ValueError on NaN."""
    out = {}
    with safe_open(path, "pt") as f:
        for name, key in keys.items():
            out[name] = f.get_tensor(key).to(dtype)
            if not all_finite(out[name]):
                raise ValueError(f"{path}: {key} has values that are not finite")
    return out


def tiny_keys(header: Header) -> dict[str, str]:
    """{name in TinyDecoder: key}, {} if there is none. diffusers counts from the first conv."""
    number = re.compile(r"(?:(?:taesd_)?decoder\.)?(layers\.)?(\d+)\.((?:conv\.\d\.)?\w+)")
    found = {key: match for key in header if (match := number.fullmatch(key))}
    keys = {f"{int(m[2]) + (m[1] is not None)}.{m[3]}": key for key, m in found.items()}
    return keys if {"1.weight", "3.conv.0.weight"} <= keys.keys() else {}


class Place(NamedTuple):
    """Where a file has the weight of a path of tau."""

    key: str
    rows: slice = slice(None)  # bigG's q, k and v are rows of one matrix
    transposed: bool = False  # bigG's text_projection

    def view(self, weight: Tensor) -> Tensor:
        """The weight itself, (out, in, ...), in the file's tensor."""
        return weight.T if self.transposed else weight[self.rows]


def places(header: Header) -> dict[str, Place]:
    """{path in a tau: Place} of all weights in a checkpoint that a LoRA may change."""
    out = {}
    for key, (file_key, shape) in part_of(header, UNET).items():
        if key.endswith(".weight") and len(shape) > 1:
            out[key.removesuffix(".weight")] = Place(file_key)
    for prefixes, te in ((CLIP_L, "te1."), (BIG_G, "te2.")):
        for key, (file_key, shape) in part_of(header, prefixes).items():
            for theirs, ours in RENAMED.items() if key.startswith("transformer.") else ():
                key = key.replace(ours, theirs)
            path = te + key.removesuffix(".weight")
            if fused := re.fullmatch(r"(encoder\.layers\.\d+)\.attn\.in_proj_weight", key):
                for x, rows in qkv_rows(shape[0]).items():
                    out[f"{te}{fused[1]}.self_attn.{x}_proj"] = Place(file_key, rows)
            elif path in text_paths() and len(shape) > 1:
                transposed = key == "text_projection"  # open_clip multiplies from the right
                out[path] = Place(file_key, transposed=transposed)
    return out


def weight_shapes(header: Header) -> dict[str, Tensor]:
    """{path in a tau + ".weight": a tensor of that shape without data}, for `merge.check_fit`."""
    return {
        f"{path}.weight": place.view(torch.empty(header[place.key].shape, device="meta"))
        for path, place in places(header).items()
    }


def load_strict(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Put `state` into a module built on meta; 1x1 kernels may be stored as matrices, and back."""
    want, problems = module.state_dict(), []
    for key in want.keys() & state.keys():
        if no_kernel(state[key].shape) == no_kernel(want[key].shape):
            state[key] = state[key].reshape(want[key].shape)
    missing, extra = sorted(set(want) - set(state)), sorted(set(state) - set(want))
    unused = f"first: {', '.join(extra[:5])}"
    if missing:
        problems += [f"{len(missing)} missing keys, first: {', '.join(missing[:5])}"]
        problems += [f"{len(extra)} unknown keys, {unused}"] if extra else []
    if wrong := sorted(k for k in want if k in state and want[k].shape != state[k].shape):
        k = wrong[0]
        problems += [f"{k} is {tuple(state[k].shape)}, not {tuple(want[k].shape)}"]
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}")
    if extra:
        print(f"{what}: {len(extra)} keys not used, {unused}")
    module.load_state_dict({k: state[k] for k in want}, assign=True)


class Model(NamedTuple):
    """The networks of a checkpoint."""

    unet: UNet
    vae: VAE | TinyDecoder
    text: TextEncoder
    config: Config


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, vae_path: str | Path | None = None
) -> Model:
    """(unet, vae, text, config) of a single-file checkpoint, frozen; UNet and text in `dtype`.

    SDXL's VAE overflows in float16, hence float32; `vae_path`: a file whose VAE, or tiny decoder,
    to take instead. One tensor at a time, so the peak is one model in `dtype`.
    """
    return load_checkpoint(open_checkpoint(path), dtype, vae_path)


def load_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, vae_path: str | Path | None = None
) -> Model:
    """`load_model` for a checkpoint whose header has been read."""
    path, header, _, config = checkpoint
    if narrow := [k for k, entry in header.items() if entry.dtype.startswith("F8")]:
        print(f"{path}: {len(narrow)} tensors are float8, less exact than the original weights")
    unet = build(UNet, config.unet, path)
    vae_header = header if vae_path is None else read_header(vae_path)[0]
    vae = load_vae(vae_path or path, vae_header, config)
    load_strict(unet, read_part(path, header, UNET, dtype), f"{path}: UNet")
    if not part_of(header, CLIP_L):
        raise ValueError(f"{path}: no text encoder in the file; give the whole checkpoint")
    text = build(TextEncoder, config.text, path)
    load_text(text, checkpoint, dtype)
    used = {key for prefixes in PARTS for key, _ in part_of(header, prefixes).values()}
    if stray := sorted(k for k in header if k not in used and not NO_WEIGHT.fullmatch(k)):
        first = ", ".join(stray[:5])
        print(f"{path}: {len(stray)} keys belong to no part and are not used, first: {first}")
    for module in (unet, vae, text):
        module.requires_grad_(False).eval()
    return Model(unet, vae, text, config)


def load_vae(path: Path, header: Header, config: Config) -> VAE | TinyDecoder:
    """The VAE of a file, or the tiny decoder in it, in float32."""
    refuse_quantised(path, header)
    if keys := tiny_keys(header):
        if len(config.vae.channels) != 4:
            raise ValueError(f"{path}: a tiny decoder of SD or SDXL does not fit this model")
        with torch.device("meta"):
            vae = TinyDecoder()
        load_strict(vae, read(path, keys, torch.float32), f"{path}: tiny decoder")
        return vae
    if not part_of(header, VAE_):
        raise ValueError(f"{path}: no VAE in the file; give one with --vae FILE")
    vae = build(VAE, config.vae, path)
    load_strict(vae, read_part(path, header, VAE_, torch.float32), f"{path}: VAE")
    return vae


def build(cls: type[nn.Module], cfg, path: Path) -> nn.Module:
    """The network, without memory for its weights. Raises ValueError for impossible sizes."""
    try:
        with torch.device("meta"):
            return cls(cfg)
    except (ValueError, RuntimeError, AssertionError, IndexError, ArithmeticError) as error:
        what = ascii(str(error)[:200])
        raise ValueError(f"{path}: a network of these sizes cannot be built ({what})") from None


def load_text(text: TextEncoder, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Fill one tower or, for SDXL, two. Raises ValueError as `load_strict` does."""
    path, header = checkpoint.path, checkpoint.header

    def tower(prefixes: tuple[str, ...], what: str) -> dict[str, Tensor]:
        state = read_part(path, header, prefixes, dtype)
        if prefixes is BIG_G and "text_projection.weight" in state:
            # Hugging Face multiplies from the left
            state["text_projection"] = state.pop("text_projection.weight").T.contiguous()
        try:
            return clip_l_to_open_clip(state)
        except (KeyError, RuntimeError) as error:
            why = f"q, k, v of a layer are incomplete or do not fit ({error})"
            raise ValueError(f"{path}: {what}: {why}") from None

    load_strict(text.tower, tower(CLIP_L, "text tower"), f"{path}: text tower")
    if text.cfg.big:
        load_strict(text.big, tower(BIG_G, "second text tower"), f"{path}: second text tower")


def save_model(
    path: str | Path, unet: dict[str, Tensor], vae: VAE, text: TextEncoder, config: Config
) -> None:
    """Write a single-file checkpoint in float16, atomically; `unet` is a state dict."""
    parts = {UNET[0]: unet, VAE_[0]: vae.state_dict()}
    if config.text.open_clip:  # SD2 keeps its tower by open_clip's own names
        parts[CLIP_L[3]] = text.tower.state_dict()
    else:
        parts[CLIP_L[1 if config.text.big else 0]] = open_clip_to_clip_l(text.tower.state_dict())
    if config.text.big:  # SDXL keeps its second tower by open_clip's own names
        parts[BIG_G[1]] = text.big.state_dict()
    tensors = {p + key: x.half() for p, state in parts.items() for key, x in state.items()}
    if config.unet.v:  # by which other programs know it
        tensors["v_pred"] = torch.empty(0)
    if config.unet.zero_snr:
        tensors["ztsnr"] = torch.empty(0)
    write_tensors(path, tensors, {"minilcm.config": to_json(config)})


def load_judge(path: str | Path) -> "Judge":
    """The judge of `weights/emoji/judge.safetensors`, in float32, frozen."""
    from ..metrics import Judge  # imports open_clip, which reading a header does without

    tensors, metadata = read_tensors(path)
    judge = Judge(*json.loads(metadata["config"]))
    state = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    judge.load_state_dict(state)
    return judge.eval().requires_grad_(False)
