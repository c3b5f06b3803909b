"""Files are whole or absent."""

import errno
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch

from minilcm.files.safetensors_file import atomic, read_header, read_tensors, write_tensors


def test_atomic_replaces_only_on_success(tmp_path):
    """The target changes when the block ends; an exception keeps the old file, and no other."""
    path = tmp_path / "file.txt"
    with atomic(path) as part:
        part.write_text("one")
        # the same folder, so that renaming is atomic
        assert not path.exists() and part.parent == tmp_path
    assert path.read_text() == "one"
    with pytest.raises(KeyError), atomic(path) as part:
        part.write_text("half of tw")
        raise KeyError
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
    with atomic(path) as part:
        part.write_text("two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_an_error_of_writing_names_the_file(tmp_path):
    """A full disk does not: its error has no name. The old file stays."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="file.txt: cannot be written .*No space"), atomic(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 255, "寿" * 85])
def test_names_as_long_as_they_may_be(tmp_path, name):
    """255 bytes: the temporary name is no longer."""
    with atomic(tmp_path / name) as part:
        part.write_text("one")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_names_that_are_not_utf_8(tmp_path):
    """The safetensors library takes none, whole as the file is."""
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    path = Path(os.fsdecode(bytes(tmp_path) + b"/b\x94L.safetensors"))
    (tmp_path / "x.safetensors").rename(path)
    for use in (read_header, read_tensors, lambda path: write_tensors(path, {}, {})):
        with pytest.raises(ValueError, match="is not UTF-8; rename it"):
            use(path)


def test_tensors_round_trip(tmp_path):
    """Values, dtypes and metadata come back; a view that isn't contiguous, as what it shows."""
    square = torch.arange(9.0).reshape(3, 3)
    tensors = {"b": square.T, "a": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"who": "me"})
    read, metadata = read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and metadata == {"format": "pt", "who": "me"}
    assert all(
        torch.equal(read[key], tensors[key]) and read[key].dtype == tensors[key].dtype
        for key in tensors
    )


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    """The order in which a dict was filled does not show in the file, nor does chance."""
    said = {f"key {i}": 'café 🍕 "\\/\b\f\n\r\t\x01\x7f\u2028' + str(i) for i in range(9)}
    write_tensors(tmp_path / "x", {"a": torch.zeros(2), "b": torch.ones(3)}, said)
    back = dict(reversed(said.items()))
    write_tensors(tmp_path / "y", {"b": torch.ones(3), "a": torch.zeros(2)}, back)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    tensors, metadata = read_tensors(tmp_path / "y")
    assert metadata == said | {"format": "pt"} and list(metadata) == sorted(metadata)
    assert torch.equal(tensors["b"], torch.ones(3)) and not tensors["a"].any()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"12345678",
        b"\x08" + bytes(7) + b"{",
        b"\xff" * 7 + b"\x7f{",
        b"PK\x03\x04" + b"x" * 99,
    ],
)
def test_what_is_no_safetensors_file_gives_one_line(tmp_path, content):
    """Empty, too short, an endless or huge header, a zip: ValueError, one line, with the path."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("lacks", ["chmod", "fsync of folders", "opening of folders"])
def test_a_share_that_lacks_something_takes_the_file(tmp_path, monkeypatch, lacks):
    """What makes a finished file safer, or readable to others, is no reason to throw it away."""
    sync, open_fd, tried = os.fsync, os.open, []

    def refuse(what):
        tried.append(what)
        raise OSError(errno.EINVAL, "Invalid argument")

    def fsync(fd):
        return refuse("fsync of folders") if stat.S_ISDIR(os.fstat(fd).st_mode) else sync(fd)

    def open_file(path, *args, **kwargs):
        return (
            refuse("opening of folders") if Path(path).is_dir() else open_fd(path, *args, **kwargs)
        )

    if lacks == "chmod":
        monkeypatch.setattr(Path, "chmod", lambda *_, **__: refuse("chmod"))
    elif lacks == "fsync of folders":
        monkeypatch.setattr(os, "fsync", fsync)
    else:
        monkeypatch.setattr(os, "open", open_file)
    with atomic(tmp_path / "x") as part:
        part.write_text("done")
    assert tried == [lacks] and [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "done"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0\nsize 4265146304\n"
PICKLE = "pickle files (.ckpt, .pt, .bin) can run code: convert to safetensors"


@pytest.mark.parametrize(
    "content, line",
    [
        (LFS, ", but a Git LFS pointer to one; run: git lfs pull"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ", but a picture; sample.py --again FILE.png draws it"),
        (b"<!DOCTYPE html><title>Sign in</title>", ", but a web page ('<!DOCTYPE html><title>Si"),
        (b"\r\n\n<html><head></head></html>", ", but a web page ('<html>"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", ", but a web page"),
        (b'{"error":"Unauthorized"}', """, but a text ('{"error":"Unauthorized"}')"""),
        (b'{"msg": {"code": 401}}', ", but a text ('{"),
        (b"Invalid username or password.", ", but a text ('Invalid username or password.')"),
        (b"PK\x03\x04 a zip" + bytes(30), "; " + PICKLE),
        (pickle.dumps({"a b": [1, 2]}, 0), "; " + PICKLE),
        (pickle.dumps({"a b": [1, 2]}, 2), "; " + PICKLE),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, line):
    """What was downloaded in its place is called what it is."""
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_header(tmp_path / "x.safetensors")
    assert f"x.safetensors: not a safetensors file{line}" in str(caught.value)
    assert str(caught.value).isprintable()
