"""Safetensors files: read with one clear error, written under a temporary name or not at all."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` if the block succeeds, else removed."""
    path = Path(path)
    part = path.with_name(f".{path.name[:50]}.{os.getpid()}.part")  # 255 bytes at most
    try:
        yield part
        with open(part, "r+b") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        with suppress(OSError):  # not on every share
            part.chmod(0o666 & ~umask)  # safetensors writes for the owner only
        os.replace(part, path)
        with suppress(OSError):  # not every system can sync a folder, or open one
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name, too
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:  # for example a full disk, which names no file
        raise OSError(f"{path}: cannot be written ({error})") from None
    finally:
        part.unlink(missing_ok=True)


def check_name(path: Path) -> None:
    """Raises ValueError for a name that the safetensors library does not take."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: its name, or a folder's, is not UTF-8; rename it") from None


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, atomically; the same tensors and metadata are the same bytes."""
    check_name(path)
    tensors = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
    with atomic(path) as part:
        save_file(tensors, part, {"format": "pt", **metadata})  # which others expect
        sort_metadata(part)


def sort_metadata(path: Path) -> None:
    """The library writes the metadata in random order: put it in that of its keys, in place."""
    with open(path, "r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        f.seek(8)
        f.write(
            json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        )


# Bytes of a value, by its name in a header. Numbers first that are read as they are:
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
BYTES = FLOATS | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "BOOL": 1}
BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "C64": 8}
# of quantised models
BYTES |= {"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F6_E2M3": 0.75, "F6_E3M2": 0.75}
BYTES |= {"F4": 0.5}


class Entry(NamedTuple):
    """What a header says about a tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # of its bytes, from the end of the header
    end: int


Header = dict[str, Entry]
MAX_HEADER = 10_000_000  # bytes, 30 times SDXL's; parsed, it takes 30 times as much memory
# What JSON of another form than expected raises where it is read
MALFORMED = ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError


def damaged(path: str | Path, what: object) -> ValueError:
    return ValueError(f"{path}: file is damaged or incomplete ({what}); download or make it again")


def read_header(path: str | Path) -> tuple[Header, dict[str, str]]:
    """({key: Entry}, metadata) of a safetensors file, all checked without reading a tensor.

    The format: 8 bytes of length, a JSON header, the data. Raises ValueError in one line: no such
    file, another kind of file, damaged, a key twice, offsets that overlap or leave the file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the single file")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    check_name(path)
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(9)
        if head[:4] == b"GGUF":
            raise ValueError(f"{path}: GGUF is not supported; give the safetensors file")
        n = int.from_bytes(head[:8], "little")
        if len(head) < 9:
            raise damaged(path, f"expected a header, found {size} bytes")
        if head[8:9] != b"{" or head[:1] == b"{" and n >> 56:
            pickled = "; pickle files (.ckpt, .pt, .bin) can run code: convert to safetensors"
            picture = ", but a picture; sample.py --again FILE.png draws it again"
            what = picture if b"PNG" in head else what_instead(head + f.read(191)) or pickled
            raise ValueError(f"{path}: not a safetensors file{what}")
        if n > size - 8:
            raise damaged(path, f"expected a header of {n:,} bytes, found {size - 8:,}")
        if n > MAX_HEADER:
            raise damaged(path, f"a header of {n:,} bytes, above {MAX_HEADER:,}")
        f.seek(8)
        header, metadata = parse_header(path, f.read(n))
    end = 0
    for begin, next_end in sorted((entry.begin, entry.end) for entry in header.values()):
        if begin != end:
            raise damaged(path, "the tensors overlap or leave a gap")
        end = next_end
    if size != 8 + n + end:
        raise damaged(path, f"expected {8 + n + end:,} bytes, found {size:,}")
    return header, metadata


def what_instead(head: bytes) -> str:
    """What a file that begins like this is, and what to do; "" if it is not known."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().decode(errors="replace")
    first = text.splitlines()[0][:60] if text else ""
    if text.startswith("version https://git-lfs"):
        return ", but a Git LFS pointer to one; run: git lfs pull"
    if text.startswith("<"):
        return f", but a web page ({first!a}); download the file itself, logged in if need be"
    if text.startswith("{") or " " in first and first.isprintable() and "\ufffd" not in first:
        return f", but a text ({first!a}); download the file itself, logged in if need be"
    return ""


def parse_header(path: Path, raw: bytes) -> tuple[Header, dict[str, str]]:
    """The JSON of a header. Raises ValueError unless each entry makes sense by itself."""

    def unique(pairs: list) -> dict:
        if len(pairs) != len({key for key, _ in pairs}):
            raise ValueError("a key is there twice")
        return dict(pairs)

    try:
        entries = json.loads(raw.decode(), object_pairs_hook=unique)
        metadata, header = entries.pop("__metadata__", {}), {}
        for key, entry in entries.items():
            (begin, end), dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
            if not key.isprintable() or len(key) > 1000:
                raise ValueError(f"key {ascii(key)[:80]} is not a name")
            numbers = [begin, end, *shape] if type(shape) is list else [None]
            if not all(type(x) is int and x >= 0 for x in numbers):
                raise ValueError(f"{key} has a shape or offset that is not a number")
            too_large = math.prod(x for x in shape if x) >= 1 << 63
            if too_large or end - begin != BYTES[dtype] * math.prod(shape):
                raise ValueError(f"{key} is {dtype} {str(shape)[:100]} in {end - begin} bytes")
            header[key] = Entry(dtype, tuple(shape), begin, end)
        if not all(type(key) is type(value) is str for key, value in metadata.items()):
            raise ValueError("metadata is not text")
    except MALFORMED as error:
        what = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
        raise damaged(path, f"header: {' '.join(what.split())[:200]}") from None
    return header, metadata


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file. Raises ValueError as `read_header`."""
    header, metadata = read_header(path)
    try:
        with safe_open(path, "pt") as f:
            return {key: f.get_tensor(key) for key in header}, metadata
    except (SafetensorError, AttributeError) as error:  # for example a dtype that this torch lacks
        raise damaged(path, error) from None


def sha256(path: str | Path) -> str:
    """The hash of a file, in hexadecimal, by which A1111 and model sites know it."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def all_finite(x: Tensor) -> bool:
    """Whether x has no NaN and no infinity: both would show in its minimum or maximum."""
    x = x.float() if x.element_size() == 1 else x  # of float8, torch knows no minimum
    return x.numel() == 0 or bool(torch.stack(x.aminmax()).isfinite().all())


Changes = dict[str, Callable[[Tensor], Tensor]]  # by key


def rewrite(source: Path, path: Path, metadata: dict[str, str], changes: Changes) -> None:
    """A copy of `source`, atomically, one tensor at a time, with `changes` made to some of them."""
    header, _ = read_header(source)
    entries = {"__metadata__": metadata}
    for key, (dtype, shape, begin, end) in header.items():
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # data aligned to 8 bytes
    in_order = sorted(header.items(), key=lambda x: x[1].begin)
    with (
        atomic(path) as part,
        open(source, "rb") as f,
        open(part, "wb") as out,
        safe_open(source, "pt") as tensors,
    ):
        start = 8 + int.from_bytes(f.read(8), "little")
        out.write(len(raw).to_bytes(8, "little") + raw)
        for key, entry in tqdm(in_order, desc="tensors", disable=None):
            if key in changes:
                value = tensors.get_tensor(key)
                changed = changes[key](value).to(value.dtype).contiguous()
                out.write(changed.flatten().view(torch.uint8).numpy())
            else:
                f.seek(start + entry.begin)
                for n in range(entry.begin, entry.end, 1 << 24):
                    out.write(f.read(min(1 << 24, entry.end - n)))
