"""Damaged, foreign and malicious files: each ends in one line, and nothing is executed.

`python tests/test_hostile.py N` mutates headers and LoRA dictionaries N times; 20,000 take some minutes.
"""

import json
import pickle
import random
import struct
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny import random_tau, tiny_unet, write_model

from minilcm.checkpoint import load_model
from minilcm.lora import ATTENTION
from minilcm.lora_io import read_tau, write_tau
from minilcm.safefile import read_header, read_tensors


class Evil:
    """Unpickling this writes a file: whoever opens a pickle shows it."""

    def __reduce__(self):
        return open, (str(Path(tempfile.gettempdir()) / "minilcm_was_here"), "w")


def raw_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def one(header: dict, data: bytes = bytes(4)) -> bytes:
    return raw_file(json.dumps(header).encode(), data)


def damaged() -> dict[str, bytes]:
    """Files wrong as files, whoever reads them."""
    twice = json.dumps({"a": entry()})[:-1] + ", " + json.dumps({"a": entry()})[1:]
    tau = save({"lora_unet_x.lora_up.weight": torch.zeros(4, 1), "lora_unet_x.lora_down.weight": torch.zeros(1, 4)})
    n = struct.unpack("<Q", tau[:8])[0]
    out = {f"cut_{cut}": tau[:cut] for cut in (0, 1, 7, 8, 9, 8 + n // 2, 8 + n - 1, 8 + n, 8 + n + 1, len(tau) - 1)}
    out |= {
        "longer": tau + b"\0",
        "huge_header": raw_file(b"{}", length=1 << 62),
        "header_past_the_end": raw_file(b"{}", length=3),
        "header_of_0": raw_file(b"", length=0),
        "no_json": raw_file(b"{nonsense}"),
        "json_list": raw_file(b"[1, 2]"),
        "not_utf8": raw_file(b'{"\xff\xfe": 1}'),
        "deep_json": raw_file(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        "key_twice": raw_file(twice.encode(), bytes(4)),
        "metadata_twice": raw_file(b'{"__metadata__": {}, "__metadata__": {}}'),
        "metadata_not_text": one({"__metadata__": {"a": 1}, "a": entry()}),
        "metadata_a_list": one({"__metadata__": ["a"], "a": entry()}),
        "no_dtype": one({"a": {"shape": [1], "data_offsets": [0, 4]}}),
        "unknown_dtype": one({"a": entry(dtype="F7")}),
        "dtype_a_list": one({"a": entry(dtype=["F32"])}),
        "no_shape": one({"a": {"dtype": "F32", "data_offsets": [0, 4]}}),
        "negative_shape": one({"a": entry(shape=(-1,))}),
        "huge_shape": one({"a": entry(shape=(1 << 40, 1 << 40))}),
        "shape_not_int": one({"a": entry(shape=(1.0,))}),
        "shape_true": one({"a": entry(shape=(True,))}),
        "shape_a_word": one({"a": {"dtype": "F32", "shape": "11", "data_offsets": [0, 4]}}),
        "one_offset": one({"a": entry(offsets=(0,))}),
        "three_offsets": one({"a": entry(offsets=(0, 4, 8))}),
        "offsets_reversed": one({"a": entry(offsets=(4, 0))}),
        "offsets_negative": one({"a": entry(offsets=(-4, 0))}),
        "offsets_past_the_end": one({"a": entry(shape=(2,), offsets=(0, 8))}),
        "offsets_too_short": one({"a": entry(shape=(2,))}),
        "offsets_overlap": one({"a": entry(), "b": entry()}),
        "offsets_leave_a_gap": one({"a": entry(offsets=(4, 8))}, bytes(8)),
        "entry_a_number": one({"a": 5}),
        "entry_null": one({"a": None}),
        "gguf": b"GGUF" + bytes(100),
        "onnx": b"\x08\x07\x12\x07pytorch" + bytes(100),
        "zip": b"PK\x03\x04" + bytes(100),
        "html": b"<!DOCTYPE html><html>404</html>",
        "git_lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n",
        "empty": b"",
    }
    for protocol in range(6):
        out[f"pickle_{protocol}"] = pickle.dumps(Evil(), protocol)
    return out


def foreign_loras() -> dict[str, dict[str, torch.Tensor]]:
    """Files whole as files, wrong as LoRA."""
    flat = "lora_unet_down_blocks_0_resnets_0_conv1"
    up, down = torch.zeros(32, 2, 1, 1), torch.zeros(2, 32, 3, 3)
    good = {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down}

    two, twin = torch.ones(2, 2), "lora_unet_input_blocks_1_0_in_layers_2"

    def plus(**more) -> dict:
        return good | {key.replace("__", "."): value for key, value in more.items()}

    return {
        "nothing": {},
        "only_up": {f"{flat}.lora_up.weight": up},
        "only_down": {f"{flat}.lora_down.weight": down},
        "only_alpha": {f"{flat}.alpha": torch.tensor(1.0)},
        "rank_0": {f"{flat}.lora_up.weight": up[:, :0], f"{flat}.lora_down.weight": down[:0]},
        "ranks_differ": plus() | {f"{flat}.lora_up.weight": torch.zeros(32, 3, 1, 1)},
        "up_flat": plus() | {f"{flat}.lora_up.weight": torch.zeros(64)},
        "down_scalar": plus() | {f"{flat}.lora_down.weight": torch.tensor(1.0)},
        "down_5d": plus() | {f"{flat}.lora_down.weight": torch.zeros(2, 32, 3, 3, 3)},
        "mid_of_another_rank": plus() | {f"{flat}.lora_mid.weight": torch.zeros(3, 3, 3, 3)},
        "nan": plus() | {f"{flat}.lora_up.weight": torch.full((32, 2, 1, 1), torch.nan)},
        "inf": plus() | {f"{flat}.lora_down.weight": torch.full((2, 32, 3, 3), torch.inf)},
        "alpha_nan": plus() | {f"{flat}.alpha": torch.tensor(torch.nan)},
        "alpha_of_two": plus() | {f"{flat}.alpha": torch.ones(2)},
        "int8": plus() | {f"{flat}.lora_up.weight": torch.zeros(32, 2, 1, 1, dtype=torch.int8)},
        "bool": plus() | {f"{flat}.lora_up.weight": torch.zeros(32, 2, 1, 1, dtype=torch.bool)},
        "unknown_module": plus(lora_unet_x__lora_up__weight=two, lora_unet_x__lora_down__weight=two + 0),
        "unknown_te": plus(lora_te_x__lora_up__weight=two, lora_te_x__lora_down__weight=two + 0),
        "odd_key": plus(hello=torch.ones(1)),
        "loha": plus(lora_unet_x__hada_w1_a=torch.ones(2, 2)),
        "lokr": plus(lora_unet_x__lokr_w1=torch.ones(2, 2)),
        "dora": plus(lora_unet_x__dora_scale=torch.ones(2, 2)),
        "dora_peft": plus(unet__x__lora_magnitude_vector=torch.ones(2)),
        "full_diff": plus(lora_unet_x__diff=torch.ones(2, 2)),
        "bias_diff": plus(lora_unet_x__diff_b=torch.ones(2)),
        "norm": plus(lora_unet_x__w_norm=torch.ones(2)),
        "ia3": plus(lora_unet_x__on_input=torch.ones(1)),
        "glora": plus(lora_unet_x__a1__weight=torch.ones(2, 2)),
        "oft": plus(lora_unet_x__oft_blocks=torch.ones(2, 2)),
        "both_spellings": good | {k.replace(flat, twin): v.clone() for k, v in good.items()},
        "checkpoint": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)},
    }  # fmt: skip


def refusal(reader, path: Path) -> str | None:
    """The one line of a ValueError, or None if the file was read. Any other exception is a bug and passes through."""
    try:
        reader(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 1000
        return str(error)
    return None


@pytest.mark.parametrize("name", damaged())
def test_damaged_files(tmp_path, name):
    """Under each suffix that people try, for checkpoint, LoRA and plain reading: refused, and no pickle was opened."""
    content = damaged()[name]
    for suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(content)
        for reader in (read_header, read_tensors, read_tau, load_model):
            assert refusal(reader, path)
    assert not (Path(tempfile.gettempdir()) / "minilcm_was_here").exists()


@pytest.mark.parametrize("name", foreign_loras())
def test_foreign_loras(tmp_path, name):
    """Whole files that are no LoRA for these networks."""
    path = tmp_path / "x.safetensors"
    save_file(foreign_loras()[name], path)
    assert refusal(read_tau, path)
    assert refusal(load_model, path)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Bytes of the header flipped, a piece of it repeated, cut or replaced; the data cut or extended."""
    n = struct.unpack("<Q", content[:8])[0]
    header, data = bytearray(content[8 : 8 + n]), content[8 + n :]
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(header) + 1) for _ in range(2))
        kind = rng.randrange(7)
        if kind == 0 and header:
            header[i % len(header)] = rng.randrange(256)
        elif kind == 1:
            header[i:i] = header[i : min(j, i + 40)]
        elif kind == 2:
            del header[i : min(j, i + 40)]
        elif kind == 3:
            tokens = (
                b"0",
                b"-1",
                b"1e999",
                b"null",
                b"true",
                b'"',
                b"{",
                b"[",
                b"}",
                b"]",
                b",",
                b"99999999999999999999",
                b"NaN",
            )
            header[i : i + 1] = rng.choice(tokens)
        elif kind == 4:
            data = data[: rng.randrange(len(data) + 1)]
        elif kind == 5:
            data += rng.randbytes(rng.randrange(64))
        else:
            header = header.replace(
                rng.choice((b"F32", b"lora_up", b"alpha", b"weight", b"lora_unet")),
                rng.choice((b"I64", b"BOOL", b"lora_down", b"lora_mid", b"lora_te2", b"")),
            )
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) + 1, 1 << 63))
    return struct.pack("<Q", length) + bytes(header) + data


def mutate_tensors(tensors: dict, rng: random.Random) -> dict:
    """A LoRA's dictionary with keys renamed, removed or added, and values of other shapes, dtypes and contents."""
    tensors = dict(tensors)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(sorted(tensors)) if tensors else "x"
        value = tensors.get(key, torch.zeros(1))
        kind = rng.randrange(6)
        if kind == 0:
            tensors.pop(key, None)
        elif kind == 1:
            cut = rng.randrange(len(key) + 1)
            tensors[
                key[:cut]
                + rng.choice(("", ".", "_", "lora_mid", "alpha", "te2", "\u00e9"))
                + key[cut + rng.randrange(3) :]
            ] = tensors.pop(key, value)
        elif kind == 2:
            tensors[key] = torch.zeros([rng.randrange(4) for _ in range(rng.randrange(6))])
        elif kind == 3:
            tensors[key] = value.to(rng.choice((torch.int8, torch.bool, torch.float64, torch.bfloat16, torch.int64)))
        elif kind == 4:
            tensors[key] = torch.full_like(value, rng.choice((torch.nan, torch.inf, 0.0, 1e30)), dtype=torch.float32)
        else:
            tensors[key.replace("lora_up", "lora_mid")] = value.clone()
    return tensors


def fuzz(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """(refused, read) of `count` mutated files; any exception but the promised one passes through."""
    path = folder / "lora.safetensors"
    write_tau(path, random_tau(tiny_unet(), 0, 2, 1.0, ATTENTION), {"w": "3"}, torch.float32)
    content, tensors = path.read_bytes(), load_file(path)
    rng, refused = random.Random(seed), 0
    for i in range(count):
        if i % 2:
            path.write_bytes(mutate(content, rng))
        else:
            save_file(mutate_tensors(tensors, rng), path)
        refused += refusal(read_tau, path) is not None
    return refused, count - refused


def test_fuzz(tmp_path):
    """400 mutations: never a traceback; most are refused, and some harmless ones are read."""
    refused, read = fuzz(tmp_path, 400, seed=0)
    assert refused > 200 and read > 5


def test_the_tiny_model_itself_is_fine(tmp_path):
    """The readers do read what is whole."""
    assert refusal(load_model, write_model(tmp_path / "model.safetensors")) is None
    write_tau(tmp_path / "lora.safetensors", random_tau(tiny_unet(), 0, 2, 1.0), {})
    assert refusal(read_tau, tmp_path / "lora.safetensors") is None


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print("refused {}, read {}".format(*fuzz(Path(name), int(sys.argv[1]), seed=1)))
