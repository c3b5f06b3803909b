"""Files that are either whole or absent: reading safetensors with one clear error, writing through a temporary name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` when the block succeeds and removed when it does not."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # safetensors writes for the owner only
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, sorted by key, contiguous, atomic; others expect {"format": "pt"} in the metadata."""
    tensors = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
    with atomic(path) as part:
        save_file(tensors, part, {"format": "pt", **metadata})


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file. Raises ValueError with one line: missing, not safetensors, damaged."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as f:
        head = f.read(9)
    if len(head) < 9 or head[8:9] != b"{":
        raise ValueError(
            f"{path}: not a safetensors file; pickle files (.ckpt, .pt, .bin) can run code: convert to safetensors"
        )
    try:
        with safe_open(path, "pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: file is damaged or incomplete ({size:,} bytes, {error}); copy or download it again"
        ) from None
