"""The hostile set: files that are damaged, foreign or malicious, and the line that each must get.

A case is (reader, content, line). `reader` says who is to refuse the file: test_hostile.READERS.
`content` is bytes, or a function that gives them, or gives {key: shape} for a file of its full size
whose data is a hole that takes no room on disk. `line` is a regular expression for the message. A
name begins with the number of the refusal. `python tests/test_hostile.py list FOLDER` writes all
files and prints the lines.
"""

import dataclasses
import io
import json
import pickle
import re
import struct
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from test_checkpoint import TEXT, UNET, VAE, unet_keys, with_shape
from tiny import CONFIG, write_model
from torch import Tensor

from minilcm.files.identify import SUPPORTED, to_json
from minilcm.lora import target_paths
from minilcm.model.text import TextEncoder
from minilcm.model.unet import UNet, UNetConfig, emoji, sd15, sdxl, ssd1b

REFUSALS = {
    "R1": "not safetensors",
    "R2": "truncated or malformed",
    "R3": "a LoRA as checkpoint, a checkpoint as LoRA",
    "R4": "a known family that is not supported",
    "R5": "inpainting, pix2pix, video",
    "R6": "unknown structure",
    "R7": "missing weights",
    "R8": "EDM",
    "R9": "wrong shape",
    "R10": "diffusers' layout",  # R11, a full LCM, is none here: minilcm runs it
    "R12": "LoRA of another family",
    "R13": "adapters that are not LoRA",
    "R14": "half a module, ranks that do not fit, a module twice",
    "R15": "unknown module",
    "R16": "NaN and infinity",
    "R17": "quantised",
    "R18": "LoRA of a text encoder that is not there",
    "R19": "writing over an input or another file",
}
FAMILIES = {"sd15": sd15, "sdxl": sdxl, "ssd1b": ssd1b, "emoji": emoji}
BIG_G = "conditioner.embedders.1.model."
CANARY = Path(tempfile.gettempdir()) / "minilcm_was_here"

Shapes = dict[str, list[int]]


class Case(NamedTuple):
    reader: str
    content: bytes | Callable[[], bytes | Shapes]
    line: str


def case(reader: str, content: bytes | Callable, *line: str) -> Case:
    return Case(reader, content, "".join(line))


class Evil:
    """Unpickling this writes a file: whoever opens a pickle shows it."""

    def __reduce__(self):
        return open, (str(CANARY), "w")


# ---- wrong as files, whoever reads them


def no_safetensors() -> dict[str, Case]:
    file = io.BytesIO()
    torch.save({"state_dict": Evil()}, file)
    pickled = "not a safetensors file; pickle files .* can run code: convert to safetensors"
    gguf = "GGUF is not supported; give the safetensors file"
    files = {
        "zip of torch.save": (file.getvalue(), pickled),
        "GGUF": (b"GGUF" + bytes(100), gguf),
        "GGUF of 123 tensors": (b"GGUF\x03\0\0\0{" + bytes(100), gguf),
        "ONNX": (b"\x08\x07\x12\x07pytorch" + bytes(100), "not a safetensors file"),
        "HTML": (b"<!DOCTYPE html><html>404</html>", "not a safetensors file"),
        "git LFS pointer": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "not a safetensors file, but a Git LFS pointer to one; run: git lfs pull",
        ),
        "login page": (
            b"\n<html><title>Sign in</title>",
            r"but a web page \('<html><title>Sign in",
        ),
        "error in JSON": (b'{"a": {"error": "Unauthorized"}}', r"but a text \('{\"a\": {\"error"),
        "error in words": (b"Invalid username or password.", r"but a text \('Invalid username"),
    }
    files |= {f"pickle of protocol {i}": (pickle.dumps(Evil(), i), pickled) for i in range(6)}
    return {f"R1 {name}": Case("any", *file) for name, file in files.items()}


def cuts() -> dict[str, Case]:
    """A LoRA cut at each boundary: of the length, the header, each entry in it, each tensor."""
    whole = save(good_lora(), {"format": "pt"})
    n = struct.unpack("<Q", whole[:8])[0]
    entries = [9 + i for i, byte in enumerate(whole[8 : 8 + n]) if byte in b"{},"]
    tensors = [
        8 + n + x["data_offsets"][1]
        for x in json.loads(whole[8 : 8 + n]).values()
        if "data_offsets" in x
    ]
    cut = {0, 1, 7, 8, *entries, 8 + n - 1, 8 + n, 8 + n + 1, *tensors, len(whole) - 1} - {
        len(whole)
    }
    line = r"file is damaged or incomplete \(.+\); download or make it again"
    return {
        f"R2 cut at byte {i} of {len(whole)}": Case("any", whole[:i], line) for i in sorted(cut)
    }


def raw_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape=(1,), offsets=(0, 4), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def malformed() -> dict[str, Case]:
    def of(data: bytes = bytes(4), **header) -> bytes:
        return raw_file(json.dumps(header).encode(), data)

    def key(name: str) -> bytes:
        return of(**{name: entry()})

    twice = json.dumps({"a": entry()})[:-1] + ", " + json.dumps({"a": entry()})[1:]
    size = r"expected [\d,]+ bytes, found [\d,]+"
    in_bytes = r"header: a is F32 \[.*\] in -?\d+ bytes"
    no_number = "header: a has a shape or offset that is not a number"
    gap = "the tensors overlap or leave a gap"
    files = {
        "too long": (of(a=entry()) + b"\0", size),
        "huge header": (
            raw_file(b"{}", length=1 << 62),
            "expected a header of 4,611,686,018,427,387,904 bytes, found",
        ),
        "header past the end": (raw_file(b"{}", length=3), "expected a header of 3 bytes, found 2"),
        "header of 0 bytes": (raw_file(b"{", length=0), "header: JSONDecodeError"),
        "no JSON": (raw_file(b"{nonsense}"), "header: JSONDecodeError"),
        "more after the JSON": (raw_file(b'{"a": 1}[]'), "header: JSONDecodeError"),
        "not UTF-8": (raw_file(b'{"\xff\xfe": 1}'), "header: UnicodeDecodeError"),
        "UTF-16": (raw_file(json.dumps({"a": entry()}).encode("utf-16-le"), bytes(4)), "header: "),
        "deep": (raw_file(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "header: RecursionError"),
        "NaN": (raw_file(b'{"a": NaN}'), "header: TypeError"),
        "key twice": (raw_file(twice.encode(), bytes(4)), "header: a key is there twice"),
        "metadata twice": (
            raw_file(b'{"__metadata__": {}, "__metadata__": {}}'),
            "header: a key is there twice",
        ),
        "metadata not text": (of(a=entry(), __metadata__={"a": 1}), "header: metadata is not text"),
        "metadata a list": (of(a=entry(), __metadata__=["a"]), "header: AttributeError"),
        "no dtype": (of(a={"shape": [1], "data_offsets": [0, 4]}), "header: KeyError 'dtype'"),
        "unknown dtype": (of(a=entry(dtype="F7")), "header: KeyError 'F7'"),
        "dtype a list": (of(a=entry(dtype=["F32"])), "header: TypeError"),
        "no shape": (of(a={"dtype": "F32", "data_offsets": [0, 4]}), "header: KeyError 'shape'"),
        "no offsets": (of(a={"dtype": "F32", "shape": [1]}), "header: KeyError 'data_offsets'"),
        "shape negative": (of(a=entry((-1,))), no_number),
        "shape of floats": (of(a=entry((1.0,))), no_number),
        "shape of bools": (of(a=entry((True,))), no_number),
        "shape a word": (of(a=entry() | {"shape": "11"}), no_number),
        "shape a dict": (of(a=entry() | {"shape": {}}), "header: "),
        "shape huge": (of(a=entry((1 << 40, 1 << 40))), in_bytes),
        "shape huge with a 0": (of(b"", a=entry((1 << 62, 1 << 62, 0), (0, 0))), "header: "),
        "shape past int64": (of(b"", a=entry((0, 1 << 63), (0, 0))), "header: "),
        "one offset": (of(a=entry(offsets=(0,))), "header: not enough values"),
        "three offsets": (of(a=entry(offsets=(0, 4, 8))), "header: too many values"),
        "offsets of floats": (of(a=entry(offsets=(0, 4.0))), no_number),
        "offsets reversed": (of(a=entry(offsets=(4, 0))), in_bytes),
        "offsets negative": (of(a=entry(offsets=(-4, 0))), no_number),
        "offsets past the end": (of(a=entry((2,), (0, 8))), size),
        "offsets too short": (of(a=entry((2,))), in_bytes),
        "offsets overlap": (of(a=entry(), b=entry()), gap),
        "offsets leave a gap": (of(bytes(8), a=entry(offsets=(4, 8))), gap),
        "entry a number": (of(a=5), "header: TypeError"),
        "entry null": (of(a=None), "header: TypeError"),
        "key with a line break": (key("a\nb"), "header: "),
        "key with an escape": (key("a\x1b[2Jb"), "header: "),
        "key of half a surrogate": (key("\ud800"), "header: "),
        "key of 10,000 letters": (key("a" * 10_000), "header: "),
    }
    start, end = r"file is damaged or incomplete \(", r".*\); download or make it again"
    return {
        f"R2 {name}": case("any", content, start, why, end)
        for name, (content, why) in files.items()
    }


# ---- whole as files, wrong as LoRA

FLAT, UNFLAT = "lora_unet_down_blocks_0_resnets_0_conv1", "unet.down_blocks.0.resnets.0.conv1"
UP, DOWN, MID, ALPHA = (
    f"{FLAT}.{x}" for x in ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha")
)
PLACE = UNET + "input_blocks.1.0.in_layers.2.weight"  # of the same module, in a checkpoint


def good_lora() -> dict[str, Tensor]:
    return {UP: torch.ones(32, 2, 1, 1), DOWN: torch.ones(2, 32, 3, 3)}


def peft_lora() -> dict[str, Tensor]:
    return {f"{UNFLAT}.lora_{x}.weight": value for x, value in zip("BA", good_lora().values())}


def spoilt(good: dict[str, Tensor], change: dict[str, Tensor | None], **metadata: str) -> bytes:
    """The file with some of its tensors changed or, where None, left out."""
    return save(
        {k: v.clone().contiguous() for k, v in (good | change).items() if v is not None}, metadata
    )


def module(flat: str) -> dict[str, Tensor]:
    return {
        f"{flat}.lora_up.weight": torch.ones(2, 2),
        f"{flat}.lora_down.weight": torch.ones(2, 2),
    }


def bad_loras() -> dict[str, Case]:
    x, up, down, one = torch.ones(2, 2), *good_lora().values(), torch.tensor(1.0)
    te, flat = "lora_te_text_model_encoder_layers_0_mlp_fc1", FLAT.removeprefix("lora_unet_")
    in_ldm = {
        k.replace(FLAT, "lora_unet_input_blocks_1_0_in_layers_2"): v for k, v in good_lora().items()
    }
    adapters = {
        k.replace(".weight", f".{x}.weight"): v
        for k, v in peft_lora().items()
        for x in ("default", "second")
    }
    half = f"{flat} has only one of lora_down and lora_up"
    fit = f"{flat} up {{}} does not fit down {{}}"
    twice = "twice"
    small, fits, finite = torch.ones(2, 32, 1, 1), "does not fit", "has values that are not finite"
    changes = {
        "R13 LoHa": (
            {"lora_unet_x.hada_w1_a": x},
            r"LoHa is not LoRA .*\(first key: lora_unet_x\.hada_w1_a\)",
        ),
        "R13 LoKr": ({"lora_unet_x.lokr_w1": x}, r"LoKr is not LoRA .*\.lokr_w1\)"),
        "R13 DoRA": ({f"{FLAT}.dora_scale": x}, r"DoRA is not LoRA .*conv1\.dora_scale\)"),
        "R13 DoRA of PEFT": (
            {"unet.x.lora_magnitude_vector": x},
            r"DoRA is not LoRA .*\.lora_magnitude_vector\)",
        ),
        "R13 difference": (
            {f"{FLAT}.diff": x},
            r"a full weight difference is not LoRA .*conv1\.diff\)",
        ),
        "R13 difference of biases": (
            {f"{FLAT}.diff_b": x},
            r"a full weight difference is not LoRA .*\.diff_b\)",
        ),
        "R13 norms": ({"lora_unet_x.w_norm": x}, r"a norm difference is not LoRA .*\.w_norm\)"),
        "R13 biases of norms": (
            {"lora_unet_x.b_norm": x},
            r"a norm difference is not LoRA .*\.b_norm\)",
        ),
        "R13 IA3": (
            {"lora_unet_x.weight": x, "lora_unet_x.on_input": x},
            r"IA3 is not LoRA .*\.on_input\)",
        ),
        "R13 GLoRA": ({"lora_unet_x.a1.weight": x}, r"GLoRA is not LoRA .*\.a1\.weight\)"),
        "R13 modules of PEFT that are no LoRA": (
            {"unet.x.modules_to_save.weight": x},
            r"a full weight difference is not LoRA .*\.modules_to_save\.weight\); merge it by",
        ),
        "R13 OFT": ({"lora_unet_x.oft_blocks": x}, r"OFT is not LoRA .*\.oft_blocks\)"),
        "R14 up alone": ({DOWN: None}, half),
        "R14 down alone": ({UP: None}, half),
        "R14 alpha alone": (
            {f"{te}.alpha": one},
            "te1.encoder_layers_0_mlp_fc1 has only one of lora_down and lora_up",
        ),
        "R14 rank 0": (
            {UP: up[:, :0], DOWN: down[:0]},
            fit.format(r"\(32, 0, 1, 1\)", r"\(0, 32, 3, 3\)"),
        ),
        "R14 ranks 3 and 2": (
            {UP: torch.ones(32, 3, 1, 1)},
            fit.format(r"\(32, 3, 1, 1\)", r"\(2, 32, 3, 3\)"),
        ),
        "R14 up of one axis": ({UP: torch.ones(64)}, fit.format(r"\(64,\)", r"\(2, 32, 3, 3\)")),
        "R14 up of 3x3": ({UP: torch.ones(32, 2, 3, 3)}, fit.format(r"\(32, 2, 3, 3\)", "")),
        "R14 down a scalar": ({DOWN: one}, fit.format(".*", r"\(\)")),
        "R14 down of five axes": ({DOWN: down[..., None]}, fit.format(".*", r"\(2, 32, 3, 3, 1\)")),
        "R14 up of no rows": ({UP: up[:0]}, fit.format(r"\(0, 2, 1, 1\)", "")),
        "R14 mid of another rank": (
            {DOWN: small, MID: torch.ones(3, 3, 3, 3)},
            rf"{flat} mid \(3, 3, 3, 3\) {fits}",
        ),
        "R14 mid beside 3x3": ({MID: torch.ones(2, 2, 3, 3)}, rf"{flat} mid \(2, 2, 3, 3\) {fits}"),
        "R14 mid of 99x99": (
            {DOWN: small, MID: torch.ones(2, 2, 99, 99)},
            rf"{flat} mid \(2, 2, 99, 99\) {fits}",
        ),
        "R14 two scalars": ({f"{FLAT}.scalar": x}, f"{flat} scalar has 4 values, not one"),
        "R15 embeddings that change": (
            module("text_encoders.clip_l.transformer.text_model.embeddings.token_embedding"),
            "1 of 2 modules are in no known .*, first: te1.embeddings.token_embedding$",
        ),
        "R14 two alphas": ({ALPHA: torch.ones(2)}, f"{flat} alpha has 2 values, not one"),
        "R14 in LDM and diffusers names": (
            in_ldm,
            r"input_blocks\.1\.0\.in_layers\.2 is in the file twice",
        ),
        "R14 in kohya's and PEFT's names": (peft_lora(), rf"{flat} .*{twice}"),
        "R14 two adapters": (adapters, rf"{flat} .*{twice}"),
        "R14 te and te1": (
            module(te) | module(te.replace("te", "te1", 1)),
            rf"te1\.encoder_layers_0_mlp_fc1 .*{twice}",
        ),
        "R15 unknown module": (
            module("lora_unet_x"),
            "1 of 2 modules are in no known UNet, first: x$",
        ),
        "R15 unknown module of text": (
            module("lora_te_x"),
            "1 of 2 modules are in no known .*, first: te1.x$",
        ),
        "R15 another key": ({"hello": x}, "key hello does not belong to a LoRA"),
        "R16 NaN": ({UP: up * torch.nan}, rf"conv1\.lora_up\.weight {finite}"),
        "R16 infinity": ({DOWN: down / 0}, rf"conv1\.lora_down\.weight {finite}"),
        "R16 NaN in float8": (
            {UP: (up * torch.nan).to(torch.float8_e4m3fn)},
            rf"conv1\.lora_up\.weight {finite}",
        ),
        "R16 1e300 in float64": ({UP: up.double() * 1e300}, rf"conv1\.lora_up\.weight {finite}"),
        "R16 alpha NaN": ({ALPHA: one * torch.nan}, rf"conv1\.alpha {finite}"),
        "R16 alpha 1e300": ({ALPHA: one.double() * 1e300}, rf"conv1\.alpha {finite}"),
        "R17 int8": (
            {UP: up.to(torch.int8)},
            r"conv1\.lora_up\.weight is int8, quantised; dequantise it first",
        ),
        "R17 bool": (
            {UP: up.bool()},
            r"conv1\.lora_up\.weight is bool, quantised; dequantise it first",
        ),
    }
    out = {
        name: Case("lora", spoilt(good_lora(), change), line)
        for name, (change, line) in changes.items()
    }
    texts = (
        "{",
        "[]",
        "null",
        '{"unet.lora_alpha": null}',
        '{"unet.alpha_pattern": [1]}',
        "[" * 50_000,
        "9" * 5000,
    )
    for text in texts:
        content = spoilt(peft_lora(), {}, lora_adapter_metadata=text)
        out[f"R2 PEFT metadata {text[:30]}"] = Case("lora", content, "lora_adapter_metadata")
    content = spoilt(peft_lora(), {}, lora_adapter_metadata='{"unet.lora_alpha": NaN}')
    return out | {
        "R16 alpha NaN in PEFT metadata": Case(
            "lora", content, "lora_adapter_metadata.* not finite"
        ),
        "R3 checkpoint": case(
            "lora",
            save({PLACE: x}),
            r"this is a checkpoint, not a LoRA file; pass it with --model, .*: model\.diff",
        ),
        "R3 empty": Case("lora", save({}), r"this is not a LoRA file \(first key: none\)"),
        "R3 textual inversion": Case(
            "lora", save({"emb_params": x}), r"this is not a LoRA file \(first key: emb_par"
        ),
        "R3 LoRA": case(
            "model",
            save(good_lora()),
            r"this is a LoRA file, not a checkpoint; pass it with --lora, or after the chec.* \(",
            DOWN,
        ),
        "R3 LoRA of PEFT": Case(
            "model", save(peft_lora()), r"this is a LoRA file, not a checkpoint; pass it.*lora_A"
        ),
        "R3 LoRA as VAE": Case(
            "vae", save(good_lora()), "no VAE in the file; give one with --vae FILE"
        ),
        "R19 out is the LoRA": Case(
            "onto itself", save(good_lora()), "is one of the inputs; give another -o"
        ),
        "R19 out exists": Case(
            "onto another", save(good_lora()), "exists; give another -o, or --force"
        ),
    }


# ---- LoRA of another family


@cache
def meta_unet(family: str) -> UNet:
    with torch.device("meta"):
        return UNet(FAMILIES[family]())


def family_lora(family: str) -> bytes:
    """A LoRA of rank 1 on all targets, in LDM names."""
    tensors = {}
    for path in target_paths(meta_unet(family)):
        out, *fan_in = meta_unet(family).get_submodule(path).weight.shape
        flat = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{flat}.lora_up.weight"] = torch.zeros(
            out, 1, *[1] * (len(fan_in) - 1), dtype=torch.half
        )
        tensors[f"{flat}.lora_down.weight"] = torch.zeros(1, *fan_in, dtype=torch.half)
    return save(tensors)


# {(LoRA of, UNet of): LoRA modules that the UNet has not}, by the official lists of keys; all of
# SSD-1B's 423 are in SDXL, in the same shapes: that pair is accepted
ABSENT = {
    ("sd15", "sdxl"): "117 of 278",
    ("sd15", "ssd1b"): "132 of 278",
    ("sd15", "emoji"): "206 of 278",
    ("sdxl", "sd15"): "627 of 788",
    ("sdxl", "ssd1b"): "365 of 788",
    ("sdxl", "emoji"): "680 of 788",
    ("ssd1b", "sd15"): "277 of 423",
    ("ssd1b", "emoji"): "330 of 423",
    ("emoji", "sd15"): "57 of 129",
    ("emoji", "sdxl"): "21 of 129",
    ("emoji", "ssd1b"): "36 of 129",
}


def other_families() -> dict[str, Case]:
    out = {}
    for (lora, unet), count in ABSENT.items():
        line = rf"made for another model: {count} modules are not here, first: \w+_blocks?\."
        out[f"R12 LoRA of {lora} into {unet}"] = Case(
            f"merge into {unet}", partial(family_lora, lora), line
        )
    flat, fc1 = "lora_unet_middle_block_1_proj_in", "text_model_encoder_layers_0_mlp_fc1"
    wide = {
        f"{flat}.lora_up.weight": torch.ones(1280, 1),
        f"{flat}.lora_down.weight": torch.ones(1, 640),
    }
    line = r"made for another model: middle_block\.1\.proj_in is \(1280, 1280\) here, "
    line += r"\(1280, 640\) in the LoRA"
    out["R12 width of another model"] = Case("merge into sdxl", save(wide), line)
    for te, prefix in (("lora_te_", "te1"), ("lora_te1_", "te1"), ("lora_te2_", "te2")):
        line = rf"first: {prefix}\.encoder\.layers\.0\.mlp\.fc1"
        out[f"R18 {te} into a UNet alone"] = Case("merge into sdxl", save(module(te + fc1)), line)
    return out


# ---- checkpoints of others, by their keys and shapes


def refiner() -> UNetConfig:
    down, up = ((0, 0), (4, 4), (4, 4), (0, 0)), ((0, 0, 0), (4, 4, 4), (4, 4, 4), (0, 0, 0))
    return UNetConfig(
        (384, 768, 1536, 1536), down, 4, up, context_dim=1280, head_dim=64, linear=True, adm=2560
    )


def upscaler() -> UNetConfig:
    down, up = ((0, 0), (1, 1), (1, 1), (1, 1)), ((1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0))
    return UNetConfig((256, 512, 512, 1024), down, 1, up, context_dim=1024, heads=8, linear=True)


def channels(config: UNetConfig, n: int) -> Shapes:
    return with_shape(unet_keys(config), "input_blocks.0.0.weight", 1, n)


def foreign_checkpoints() -> dict[str, Case]:
    ours, theirs = (
        f"; supported: {re.escape(SUPPORTED)}",
        f"; supported are single files of {re.escape(SUPPORTED)}",
    )
    first, cond_proj = UNET + "input_blocks.0.0.weight", UNET + "time_embedding.cond_proj.weight"
    video = UNET + "input_blocks.1.1.time_stack.0.ff.net.2.weight"
    facts = r"an unknown UNet \(width 320, in 4, context 4096, adm 2816\)"
    unets = {
        "R4 SDXL refiner": (lambda: unet_keys(refiner()), "the SDXL refiner"),
        "R4 x4 upscaler": (lambda: channels(upscaler(), 7), "the x4 upscaler"),
        "R5 SD1 inpainting": (
            lambda: channels(sd15(), 9),
            r"an inpainting UNet \(9 input channels\)",
        ),
        "R5 SD1 pix2pix": (lambda: channels(sd15(), 8), r"a pix2pix UNet \(8 input channels\)"),
        "R5 SDXL inpainting": (
            lambda: channels(sdxl(), 9),
            r"an inpainting UNet \(9 input channels\)",
        ),
        "R5 SDXL pix2pix": (lambda: channels(sdxl(), 8), r"a pix2pix UNet \(8 input channels\)"),
        "R5 video": (
            lambda: channels(sd15(), 8) | {video: [1]},
            r"a video UNet \(key .*time_stack.*\)",
        ),
        "R6 context 4096": (
            lambda: with_shape(unet_keys(sdxl()), "attn2.to_k.weight", 1, 4096),
            facts,
        ),
        "R6 first weight of one axis": (lambda: {first: [4]}, r"an unknown UNet \(.*\)"),
        "R6 label_emb of one axis": (
            lambda: {first: [320, 4, 3, 3], UNET + "label_emb.0.0.weight": [4]},
            r"an unknown UNet \(.*\)",
        ),
        "R6 cond_proj of one axis": (
            lambda: unet_keys(sd15()) | {cond_proj: [320]},
            r"an unknown UNet \(.*\)",
        ),
    }
    out = {
        name: case("model", content, "detected ", what, ours)
        for name, (content, what) in unets.items()
    }
    others = {
        "R4 SD3": (
            "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
            "Stable Diffusion 3",
        ),
        "R4 Flux": ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        "R4 Flux under a prefix": (
            "model.diffusion_model.double_blocks.0.img_mod.lin.weight",
            "Flux",
        ),
        "R4 Cascade": ("clf.1.weight", "Stable Cascade"),
        "R4 DiT": ("x_embedder.proj.weight", "a diffusion transformer"),
        "R7 VAE alone": (VAE + "encoder.conv_in.weight", "a VAE without UNet; pass it with --vae"),
        "R7 text encoder alone": (
            "text_model.encoder.layers.0.mlp.fc1.weight",
            "a text encoder without UNet",
        ),
        "R10 diffusers' UNet": (
            "down_blocks.0.resnets.0.conv1.weight",
            r"a diffusers UNet \(down_blocks\); give the LDM single file",
        ),
    }
    for name, (key, what) in others.items():
        out[name] = case(
            "model", partial(dict, {key: [1]}), f"this is {what} ", rf"\(key {key}\)", theirs
        )
    for name, key in (("a GAN", "model.0.weight"), ("ControlNet", "control_model.out.0.weight")):
        line = rf"not an LDM checkpoint \(first key: {key}\)"
        out[f"R6 {name}"] = case("model", partial(dict, {key: [1]}), line, theirs)
    kernel = UNET + "input_blocks.4.0.out_layers.3.weight"
    for name, change in (("missing", {}), ("without axes", {kernel: []})):
        keys = {k: s for k, s in unet_keys(sd15()).items() if k != kernel} | change
        line = r"UNet: input_blocks\.4\.0\.out_layers\.3\.weight is missing, or no kernel"
        out[f"R9 a kernel {name}"] = Case("model", partial(dict, keys), line)
    low = {
        k: s
        for k, s in unet_keys(sd15()).items()
        if not k.startswith((UNET + "input_blocks.10.", UNET + "input_blocks.11."))
    }
    line = "a network of these sizes cannot be built"
    out["R9 more blocks up than down"] = Case("model", partial(dict, low), line)
    out["R6 empty"] = case("model", save({}), r"not an LDM checkpoint \(first key: none\)", theirs)
    for name, key in (("CosXL", "edm_vpred.sigma_max"), ("Playground v2.5", "edm_mean")):
        line = rf"an EDM checkpoint \(key {key}\){ours}"
        out[f"R8 {name}"] = Case("model", lambda key=key: unet_keys(sdxl()) | {key: [1]}, line)
    return out


# ---- checkpoints with a fault inside


@cache
def tiny_model() -> tuple[dict[str, Tensor], str]:
    """Tensors and settings of the tiny model, with a second tower like SDXL's."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = load_file(write_model(Path(folder) / "model.safetensors"))
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, big=(64, 1, 2)))
    torch.manual_seed(0)
    tower = TextEncoder(config.text).big.state_dict()
    return tensors | {BIG_G + k: v.half() for k, v in tower.items()}, to_json(config)


def faulty(change: Callable[[dict[str, Tensor]], dict]) -> bytes:
    tensors, config = tiny_model()
    return spoilt(tensors, change(tensors), **{"minilcm.config": config})


def faulty_checkpoints() -> dict[str, Case]:
    query = TEXT + "encoder.layers.0.self_attn.q_proj.weight"
    token = TEXT + "embeddings.token_embedding.weight"
    quant, fp8, nan = VAE + "quant_conv.weight", torch.float8_e4m3fn, torch.nan
    ours, norm, one = "input_blocks.1.0.in_layers.2.weight", BIG_G + "ln_final.bias", torch.ones(1)
    scale = PLACE.replace("weight", "{}")

    def without(prefix: str):
        return lambda x: dict.fromkeys(k for k in x if k.startswith(prefix))

    files = {
        "R7 UNet": (lambda x: {PLACE: None}, f"UNet: 1 missing keys, first: {ours}"),
        "R7 VAE": (lambda x: {quant: None}, "VAE: 1 missing keys, first: quant_conv.weight"),
        "R7 text": (
            lambda x: {token: None},
            "text tower: 1 missing keys, first: token_embedding.weight",
        ),
        "R7 one of q, k, v": (lambda x: {query: None}, "text tower: "),
        "R7 bigG": (
            lambda x: {norm: None},
            "second text tower: 1 missing keys, first: ln_final.bias",
        ),
        "R7 whole VAE": (without(VAE), "no VAE in the file; give one with --vae FILE"),
        "R7 whole text": (without(TEXT), "no text encoder in the file; give the whole checkpoint"),
        "R7 whole bigG": (
            without(BIG_G),
            "second text tower: 17 missing keys, first: ln_final.bias, ln_final",
        ),
        "R9 UNet": (lambda x: {PLACE: one}, rf"UNet: {ours} is \(1,\), not \(32, 32, 3, 3\)"),
        "R9 VAE": (lambda x: {quant: one}, r"VAE: quant_conv.weight is \(1,\), not \(8, 8, 1, 1\)"),
        "R9 text": (
            lambda x: {token: one},
            r"text tower: token_embedding.weight is \(1,\), not \(49408, 32\)",
        ),
        "R9 one of q, k, v": (
            lambda x: {query: one},
            "text tower: q, k, v of a layer are incomplete or do not fit",
        ),
        "R9 bigG": (
            lambda x: {norm: one},
            r"second text tower: ln_final.bias is \(1,\), not \(64,\)",
        ),
        "R16 NaN in the UNet": (
            lambda x: {PLACE: x[PLACE] * nan},
            f"{PLACE} has values that are not finite",
        ),
        "R16 infinity in the VAE": (
            lambda x: {quant: x[quant] / 0},
            f"{quant} has values that are not finite",
        ),
        "R16 NaN in the text": (
            lambda x: {query: x[query] * nan},
            f"{query} has values that are not finite",
        ),
        "R16 NaN in bigG": (
            lambda x: {norm: x[norm] * nan},
            f"{norm} has values that are not finite",
        ),
        "R17 int8": (
            lambda x: {PLACE: x[PLACE].to(torch.int8)},
            f"{PLACE} is I8, quantised; dequantise it first",
        ),
        "R17 int8 in the VAE": (
            lambda x: {quant: x[quant].char()},
            f"{quant} is I8, quantised; dequantise it first",
        ),
        "R17 nf4": (
            lambda x: {PLACE: torch.ones(4608, 1).byte(), scale.format("weight.absmax"): one},
            f"{PLACE}.* quantised",
        ),
    }
    for name in ("scale_weight", "weight_scale", "scaled_fp8"):
        key = UNET + name if name == "scaled_fp8" else scale.format(name)
        files[f"R17 float8 with {name}"] = (
            lambda x, key=key: {PLACE: x[PLACE].to(fp8), key: one},
            f"{key} is F32, quantised; dequantise it first",
        )
    out = {
        name: Case("model", partial(faulty, change), line) for name, (change, line) in files.items()
    }
    for name in ("R16 NaN in the UNet", "R17 int8", "R17 nf4", "R17 float8 with scale_weight"):
        out[f"{name}, merged"] = out[name]._replace(reader="merge a LoRA into")
    out["R19 out is the checkpoint"] = Case(
        "onto the model", partial(faulty, dict), "is one of the inputs; give another"
    )
    large = {PLACE: torch.full((32, 32, 3, 3), 65504.0).half()}
    out["R16 a sum beyond float16"] = case(
        "merge a LoRA into",
        partial(faulty, lambda x: large),
        f"{PLACE}: the sum is beyond float16's",
    )
    to_k = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    nf4 = {
        UNET + "input_blocks.0.0.weight": torch.ones(320, 4, 3, 3),
        to_k: torch.ones(122880, 1).byte(),
    }
    return out | {
        "R17 nf4 of SD1": Case(
            "model", save(nf4), "to_k.weight is U8, quantised; dequantise it first"
        )
    }


def hostile_settings() -> dict[str, Case]:
    """minilcm.config is anyone's JSON: of another form or type, or of an endless network."""
    good = json.loads(to_json(CONFIG))

    def changed(part: str, **fields) -> str:
        return json.dumps(good | {part: good[part] | fields})

    texts = {
        "no JSON": "{",
        "a list": "[]",
        "UNet a list": json.dumps(good | {"unet": []}),
        "deep": '{"a":' * 50_000,
        "a field more": changed("unet", flash=True),
        "channels a word": changed("unet", channels="abc"),
        "no channels": changed("unet", channels=[]),
        "groups 0": changed("unet", groups=0),
        "groups 7": changed("unet", groups=7),
        "depth a word": changed("unet", middle="x"),
        "depth 100,000,000": changed("unet", middle=10**8),
        "context -1": changed("unet", context_dim=-1),
        "context past int64": changed("unet", context_dim=10**30),
        "VAE of 1 channel": changed("vae", channels=[1]),
        "VAE scale null": changed("vae", scale=None),
        "VAE of 100,000,000 blocks": changed("vae", res_blocks=10**8),
        "5 heads for width 32": changed("text", heads=5),
        "second tower of one number": changed("text", big=[3]),
        "100,000,000 layers": changed("text", layers=10**8),
        "names a number": json.dumps(good | {"names": 5}),
        "size a word": json.dumps(good | {"size": "x"}),
    }
    few = {PLACE: torch.ones(1)}
    return {
        f"R2 config: {name}": Case("model", save(few, {"minilcm.config": text}), "minilcm.config")
        for name, text in texts.items()
    }


def hostile_set() -> dict[str, Case]:
    out = no_safetensors() | cuts() | malformed() | bad_loras() | other_families()
    return out | foreign_checkpoints() | faulty_checkpoints() | hostile_settings()
