"""Damaged, foreign, malicious files: each ends in its one line, runs nothing, takes little room.

With PYTHONPATH=.:tests:tests/files, `python tests/hostile/test_hostile.py list FOLDER` writes the
files and prints each file's line; `fuzz N` mutates N headers and LoRA dictionaries; 20,000 take
some minutes.
"""

import ctypes
import gc
import json
import re
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hostile_files import (
    ABSENT,
    CANARY,
    DOWN,
    FAMILIES,
    MID,
    REFUSALS,
    UP,
    Case,
    entry,
    family_lora,
    good_lora,
    hostile_set,
    meta_unet,
    peft_lora,
    raw_file,
    spoilt,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file
from test_checkpoint import header_file, unet_keys
from tiny import ROOT, random_tau, tiny_unet, write_model

from minilcm.__main__ import main, parse
from minilcm.files.checkpoint import load_model
from minilcm.files.lora_file import read_tau, write_tau
from minilcm.files.safetensors_file import read_header, read_tensors
from minilcm.lora import ATTENTION
from minilcm.merge import check_fit

# ---- reading within bounds

HEADER = 10_000_000  # bytes of the longest header that is parsed


def allowed(path: Path) -> int:
    """How far reading may raise the resident set: twice the file; its own pages, for it is mapped;
    the header as Python objects, at most 30 times its JSON; and 16 MB, which are the modules of a
    network and noise.
    """
    size = path.stat().st_size
    with open(path, "rb") as f:
        header = min(int.from_bytes(f.read(8), "little"), size, HEADER)
    return 3 * size + 30 * header + 16_000_000


def status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    return 1024 * int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


@contextmanager
def fence(room: int):
    """The process gets at most `room` bytes more; what asks for more fails, not the machine."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + room, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def refusal(reader, path: Path) -> str | None:
    """A ValueError's one line, or None if the file was read. Any other exception passes through."""
    try:
        with fence(4 * path.stat().st_size + (1 << 30)):
            reader(path)
    except ValueError as error:
        line = str(error)
        assert line.startswith(f"{path.parent}/") and line.isprintable() and len(line) < 1200, line
        return line
    return None


def measured(reader, path: Path) -> tuple[str | None, float]:
    """(refusal, the highest rise of the resident set while reading, as a share of `allowed`)."""
    # what an earlier test left must not be freed meanwhile: it would hide as much; and so would
    # what was freed but is still resident: malloc gives it out again
    gc.collect(0)
    gc.disable()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        # the high-water mark starts at what is resident now
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        line = refusal(reader, path)
        return line, (status("VmHWM") - before) / allowed(path)
    finally:
        gc.enable()


# ---- the hostile set


def run(*argv) -> None:
    main(parse([str(x) for x in argv]))


def beside(path: Path, name: str) -> Path:
    """A good file for a reader that takes two."""
    other = path.parent / f"{name}.safetensors"
    if not other.exists() and name == "lora":
        save_file(good_lora(), other)
    elif not other.exists() and name == "model":
        write_model(other)
    elif not other.exists():
        header_file(other, unet_keys(FAMILIES[name]()))
    return ROOT / "weights/emoji/model.safetensors" if name == "emoji" else other


READERS = {
    "any": (read_header, read_tensors, read_tau, load_model),
    "lora": (read_tau,),
    "model": (load_model,),
    "vae": (lambda path: load_model(beside(path, "model"), vae_path=path),),
    "merge a LoRA into": (
        lambda path: run(
            "merge", path, beside(path, "lora"), "-o", path.with_name("out.safetensors")
        ),
    ),
    "onto the model": (
        lambda path: run("merge", path, beside(path, "lora"), "-o", path, "--force"),
    ),
    "onto itself": (lambda path: run("combine", path, "-o", path, "--force"),),
    "onto another": (lambda path: run("combine", path, "-o", beside(path, "lora")),),
}
for family in FAMILIES:
    READERS[f"merge into {family}"] = (
        lambda path, family=family: run(
            "merge", beside(path, family), path, "-o", path.with_name("out.safetensors")
        ),
    )


def write(path: Path, case: Case) -> None:
    content = case.content if isinstance(case.content, bytes) else case.content()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        header_file(path, content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("name", hostile_set())
def test_hostile_set(folder, name):
    """Each reader refuses the file in its one line, writes nothing, opens no pickle."""
    case = hostile_set()[name]
    for suffix in (
        (".safetensors", ".ckpt", ".pt", ".bin") if case.reader == "any" else (".safetensors",)
    ):
        path = folder / f"x{suffix}"
        write(path, case)
        before = path.stat().st_mtime_ns
        for reader in READERS[case.reader]:
            assert re.search(case.line, refusal(reader, path) or "read"), refusal(reader, path)
        assert path.stat().st_mtime_ns == before
        path.unlink()
    assert not CANARY.exists() and not (folder / "out").exists()


def test_every_refusal_has_its_files():
    """R1 to R19 of the table, all pairs of families, and more than 60 files."""
    numbers = Counter(name.split()[0] for name in hostile_set())
    assert set(numbers) == set(REFUSALS) and numbers.total() > 200
    assert set(ABSENT) | {("ssd1b", "sdxl")} == {
        (a, b) for a in FAMILIES for b in FAMILIES if a != b
    }


def test_ssd1b_lora_fits_sdxl(tmp_path):
    """The one pair accepted: names and shapes are those of an SDXL LoRA with fewer modules."""
    (tmp_path / "lora.safetensors").write_bytes(family_lora("ssd1b"))
    check_fit(meta_unet("sdxl"), read_tau(tmp_path / "lora.safetensors"))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"lora_alpha": null}', '{"lora_alpha": NaN}', "[" * 50_000]
)
def test_hostile_adapter_config(tmp_path, text):
    """PEFT's settings beside a LoRA are as little to be trusted as the file."""
    save_file(peft_lora(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(read_tau, tmp_path / "adapter_model.safetensors")


def test_a_folder_is_refused(tmp_path):
    """R10: diffusers' models are folders."""
    for reader in (read_tau, load_model):
        with pytest.raises(ValueError, match=r"is a folder; give the single file"):
            reader(tmp_path)


def test_whole_files_are_read(tmp_path):
    """The same readers read what is whole."""
    for name, reader in (("lora", read_tau), ("model", load_model)):
        assert refusal(reader, beside(tmp_path / "x", name)) is None


# ---- memory

LISTS = b'{"a":[%b0]}'  # JSON that is short for the many Python objects in it


def axes(n: int, size: int) -> bytes:
    return raw_file(json.dumps({"a": entry([size] * n)}).encode(), bytes(4))


def bytes_alone(n: int) -> bytes:
    """A file of n tensors of one byte each."""
    header = {f"lora_unet_{i}.alpha": entry((), (i, i + 1), "U8") for i in range(n)}
    return raw_file(json.dumps(header).encode(), bytes(n))


def tucker(size: int) -> bytes:
    """A LoRA whose core makes a kernel of size x size for each of 100,000 channels."""
    return spoilt(
        {},
        {
            UP: torch.ones(1, 1, 1, 1),
            DOWN: torch.ones(1, 100_000, 1, 1),
            MID: torch.ones(1, 1, size, size),
        },
    )


BIG = {
    "a header that claims 4 EB": lambda: raw_file(b"{}", length=1 << 62),
    "40 MB of braces": lambda: raw_file(b"{" * 40_000_000),
    "40 MB of empty lists": lambda: raw_file(LISTS % (b"[]," * 13_000_000)),
    "9 MB of empty lists": lambda: raw_file(LISTS % (b"[]," * 3_000_000)),
    "9 MB of small objects": lambda: raw_file(LISTS % (b'{"":1},' * 1_300_000)),
    "lists 100,000 deep": lambda: raw_file(b'{"a":' + b"[" * 100_000),
    "a shape of 2^80": lambda: axes(2, 1 << 40),
    "a shape of 30,000 axes": lambda: axes(30_000, 1 << 62),
    "60,000 tensors of a byte": lambda: bytes_alone(60_000),
    "a LoRA that multiplies out to 400 GB": lambda: tucker(1000),
}


@pytest.mark.parametrize("name", BIG)
def test_memory_of_big_claims(tmp_path, name):
    """What a file claims is not allocated, and JSON does not swell memory or time."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(BIG[name]())
    for reader in (read_tau, load_model):
        line, share = measured(reader, path)
        assert line and share < 1, (line, share)


def test_memory_of_whole_files(tmp_path):
    """A whole float16 LoRA of 27 MB and a model keep the bound too."""
    write_tau(tmp_path / "lora.safetensors", random_tau(tiny_unet(), 0, 400, 1.0), {})
    for name, reader in (("lora", read_tau), ("model", load_model)):
        reader(beside(tmp_path / "x", name))
        line, share = measured(reader, beside(tmp_path / "x", name))
        assert line is None and 0.1 < share < 1, share


def test_the_bound_catches_a_reader_that_trusts_the_header(tmp_path):
    """Mutation: to allocate what the header claims is seen, and at 4 TB stopped by the fence."""
    path = tmp_path / "x.safetensors"

    def trusting(path: Path) -> None:
        n = int.from_bytes(path.read_bytes()[:8], "little")
        torch.ones(json.loads(path.read_bytes()[8 : 8 + n])["a"]["shape"])

    path.write_bytes(axes(1, 1 << 24))  # 64 MB
    assert measured(trusting, path)[1] > 3

    # The same after 180 MB were freed below memory in use: each block is smaller than malloc's
    # threshold for a mapping of its own (32 MB, once one of that size was freed), so they are one
    # resident hole that would hold the 64 MB.
    torch.ones(31 << 18)
    hole = [torch.ones(30 << 18) for _ in range(6)]
    above = [torch.ones(1 << 18) for _ in range(40)]
    del hole
    assert measured(trusting, path)[1] > 3
    del above

    path.write_bytes(axes(1, 1 << 40))
    with pytest.raises(RuntimeError, match="allocate"):
        refusal(trusting, path)


# ---- fuzz

TOKENS = rb'0 -1 1e999 null true " { [ } ] , 99999999999999999999 NaN 1e3 \n \ud800'.split()
PARTS = ("", ".", "_", "lora_mid", "alpha", "te2", "\u00e9", "lora_A", "\n")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 1 << 65)
    | st.floats()
    | st.from_regex(r"[^{]{0,5}", fullmatch=True),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=4,
)


def split(whole: bytes) -> tuple[bytes, bytes]:
    """(header, data)."""
    n = 8 + struct.unpack("<Q", whole[:8])[0]
    return whole[8:n], whole[n:]


class Mutant(NamedTuple):
    """A file in pieces: hypothesis keeps all examples, and would keep the data of each."""

    header: bytes
    data: bytes  # not changed
    end: int | None = None  # where the data is cut
    more: bytes = b""
    length: int | None = None  # of the header, as the file says it

    def content(self) -> bytes:
        return raw_file(self.header, self.data[: self.end] + self.more, self.length)


@st.composite
def spoilt_bytes(draw, whole: bytes) -> Mutant:
    """Header pieces cut, repeated or replaced; data cut or extended; the length wrong."""
    header, data = split(whole)
    header = bytearray(header)
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(header)))
        piece = header[i : i + draw(st.integers(0, 40))]
        new = st.just(b"") | st.just(2 * piece) | st.binary(max_size=2) | st.sampled_from(TOKENS)
        header[i : i + len(piece)] = draw(new)
    end = draw(st.one_of([st.none()] * 9 + [st.integers(0, len(data))]))
    more = draw(st.one_of([st.just(b"")] * 9 + [st.binary(max_size=64)]))
    length = draw(st.sampled_from((None,) * 9 + (0, 1, len(header) + 1, 1 << 63)))
    return Mutant(bytes(header), data, end, more, length)


def other_json(draw, value):
    """The value with some part, at any depth and in JSON within text, replaced by any JSON."""
    if isinstance(value, str) and value[:2] == '{"':  # JSON of ours
        return json.dumps(other_json(draw, json.loads(value)))
    if not isinstance(value, dict | list) or not value or not draw(st.integers(0, 7)):
        return draw(JSON)
    value = value.copy()
    some = "__metadata__" if "__metadata__" in value and draw(st.booleans()) else None
    key = some or draw(
        st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value)))
    )
    value[key] = other_json(draw, value[key])
    return value


def field(entry, name: str):
    return entry.get(name) if isinstance(entry, dict) else None


@st.composite
def spoilt_json(draw, whole: bytes) -> Mutant:
    """Entries renamed or dropped, axes shuffled, dtypes swapped, or any part any JSON."""
    header, data = split(whole)
    header = json.loads(header)
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(header, dict) or not header:
            break
        key = draw(st.sampled_from(sorted(header)))
        kind = draw(st.sampled_from(("name", "drop", "shape", "dtype", "any", "any", "any")))
        if kind == "name":
            header[key[: draw(st.integers(0, len(key)))] + draw(st.sampled_from(PARTS))] = (
                header.pop(key)
            )
        elif kind == "drop" and len(header) > 1:
            del header[key]
        elif kind == "shape" and isinstance(shape := field(header[key], "shape"), list):
            header[key]["shape"] = draw(st.permutations(shape)) + draw(
                st.sampled_from(([], [1], [1, 1]))
            )
        elif kind == "dtype" and isinstance(dtype := field(header[key], "dtype"), str):
            header[key]["dtype"] = draw(st.sampled_from("IU")) + dtype.lstrip("BFIU")
        elif isinstance(header[key], dict):
            header = other_json(draw, header)
    return Mutant(json.dumps(header).encode(), data)


@st.composite
def spoilt_tensors(draw, whole: bytes) -> Mutant:
    """The dictionary with keys renamed, dropped, doubled, and other shapes, dtypes, contents."""
    tensors = load(whole)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(tensors)))
        value = tensors[key]
        kind = draw(st.sampled_from(("name", "drop", "shape", "dtype", "value", "mid")))
        if kind == "name":
            i = draw(st.integers(0, len(key)))
            name = key[:i] + draw(st.sampled_from(PARTS)) + key[i + draw(st.integers(0, 2)) :]
            tensors[name] = tensors.pop(key)
        elif kind == "drop" and len(tensors) > 1:
            del tensors[key]
        elif kind == "shape":
            tensors[key] = torch.zeros(draw(st.lists(st.integers(0, 3), max_size=5)))
        elif kind == "dtype":
            dtypes = (
                torch.int8,
                torch.bool,
                torch.float64,
                torch.bfloat16,
                torch.int64,
                torch.float8_e4m3fn,
            )
            tensors[key] = value.to(draw(st.sampled_from(dtypes)))
        elif kind == "value":
            tensors[key] = torch.full(
                value.shape, draw(st.sampled_from((torch.nan, torch.inf, 0.0, 1e30)))
            )
        else:
            tensors[key.replace("lora_up", "lora_mid")] = value.clone()
    return Mutant(*split(save(tensors)))


def fuzz(folder: Path, count: int) -> tuple[Counter, float]:
    """({reader, refused or read: count}, largest share of the memory allowed) of `count` mutants.

    The same mutants each time; any exception but the promised one passes through, shrunk to a small
    example.
    """
    tau = random_tau(tiny_unet(), 0, 2, 1.0, ATTENTION)
    write_tau(folder / "kohya.safetensors", tau, {"w": "3"}, torch.float32)
    write_tau(folder / "peft.safetensors", tau, {}, style="peft")
    kohya, peft, model = (
        (beside(folder / "x", name)).read_bytes() for name in ("kohya", "peft", "model")
    )
    for name, reader in (("kohya", read_tau), ("peft", read_tau), ("model", load_model)):
        reader(beside(folder / "x", name))  # fills the tables of names
    loras = [spoilt_tensors(kohya)] + [
        spoil(file) for file in (kohya, peft) for spoil in (spoilt_bytes, spoilt_json)
    ]
    mutants = [st.tuples(st.just("lora"), st.one_of(loras))] * 2
    mutants += [st.tuples(st.just("model"), spoilt_bytes(model) | spoilt_json(model))]
    path, tally, shares = folder / "mutant.safetensors", Counter(), [0.0]

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=HealthCheck,
    )
    @given(st.one_of(mutants))
    def check(mutant):
        reader, file = mutant
        path.write_bytes(file.content())
        line, share = measured(READERS[reader][0], path)
        assert share < 1
        tally[reader, "refused" if line else "read"] += 1
        shares.append(share)

    check()
    return tally, max(shares)


def test_fuzz(tmp_path):
    """400 mutants: never a traceback; most are refused, and some harmless ones are read."""
    tally, _ = fuzz(tmp_path, 400)
    assert tally.total() >= 400 and all(
        tally[x, "refused"] > 50 and tally[x, "read"] > 2 for x in ("lora", "model")
    )


# ---- by command


def list_all(folder: Path) -> None:
    """Write the hostile set and print each file's line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in hostile_set().items():
        path = folder / (re.sub(r"\W+", "_", name) + ".safetensors")
        write(path, case)
        for line in dict.fromkeys(refusal(reader, path) for reader in READERS[case.reader]):
            print(f"{name}\n    {line}")


if __name__ == "__main__":
    command, argument = (*sys.argv[1:], "")[:2]
    with tempfile.TemporaryDirectory() as scratch:
        if command == "list":
            list_all(Path(argument or scratch))
        elif command == "fuzz":
            start = time.time()
            tally, share = fuzz(Path(scratch), int(argument))
            for (reader, how), count in sorted(tally.items()):
                print(f"{reader}: {count} {how}")
            memory = f"at most {share:.2f} of the memory allowed"
            print(f"{tally.total()} in {time.time() - start:.0f} s, {memory}")
        else:
            sys.exit("test_hostile.py: give list FOLDER, or fuzz N")
