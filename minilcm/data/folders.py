"""Folders of pictures with captions, in the three layouts that people have; files of prompts.

read_pictures --> Picture --latents.cache_latents--> Example --batches.batches--> a training step
"""

import codecs
import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .pictures import picture_suffixes

BESIDE = (".txt", ".caption", ".json", ".jsonl", ".csv")  # of pictures


class Picture(NamedTuple):
    """A picture file and its caption; the pixels are read when they are needed."""

    file: Path
    caption: str
    repeats: int = 1  # how often an epoch shows it


def read_pictures(path: str | Path) -> list[Picture]:
    """The pictures of a folder, sorted. Three layouts, which may be mixed:

    cat.png beside cat.txt or cat.caption; metadata.jsonl or metadata.csv, there or in a subfolder,
    with file_name and text or caption (Hugging Face's imagefolder); subfolders 10_NAME, whose
    pictures come 10 times an epoch and have NAME as caption where a .txt is missing (kohya's).
    Prints what is left out. Raises ValueError if a caption or every picture is missing.
    """
    path = Path(path)
    if not path.is_dir():
        how = "give a folder of pictures with .txt captions, a .tar, or a .txt of prompts"
        what = "is no folder, .tar or .txt" if path.exists() else "no such file or folder"
        raise ValueError(f"{path}: {what}; {how}")
    listed: dict[Path, list[str]] = {}
    tables = sorted(p for p in path.rglob("metadata.*") if p.suffix in (".jsonl", ".csv"))
    for table in tables:
        for file, caption in read_table(table):
            listed.setdefault(file, []).append(caption)
    inner = [folder for folder in path.iterdir() if folder.is_dir()]
    kohya = {folder: named for folder in inner if (named := read_repeats(folder))}
    folders, suffixes = {path, *kohya, *(table.parent for table in tables)}, picture_suffixes()
    files, left = set(listed), Counter()
    # rglob does not go into folders behind links, and passes over those that it may not read
    for file in {*path.rglob("*"), *(file for folder in folders for file in folder.iterdir())}:
        inside, suffix = file.relative_to(path), file.suffix.lower()
        if any(part.startswith(".") for part in inside.parts) or file in folders:
            continue
        if file.is_symlink() and not file.is_file():
            left["broken links, or links to folders"] += 1
        elif not file.is_file():
            continue
        elif file.parent in folders and suffix in suffixes:
            files.add(file)
        elif file not in listed and file.parent in folders and suffix not in BESIDE:
            left[suffix or "without a suffix"] += 1
        elif file not in listed and suffix in suffixes:
            left[f"in {inside.parent}/"] += 1
    if left:
        kinds = ", ".join(f"{n} {what}" for what, n in sorted(left.items()))
        read = "only pictures here, in folders N_NAME and in metadata tables are read"
        print(f"{path}: left out: {kinds}; {read}")
    pictures, bare = [], []
    for file in sorted(files):
        repeats, name = kohya.get(file.parent, (1, None))
        captions = listed.get(file) or [read_caption(file, name)]
        bare += [file] if captions == [None] else []
        pictures += [Picture(file, caption, repeats) for caption in captions]
    if bare:
        count = f"{len(bare)} of {len(files)} pictures have no caption, first: {bare[0].name}"
        how = f"put its text into {bare[0].stem}.txt beside it, or move all into a folder 1_CAPTION"
        raise ValueError(f"{path}: {count}; {how}")
    if empty := sum(not picture.caption for picture in pictures):
        print(f"{path}: {empty} of {len(pictures)} captions are empty")
    if not pictures:
        inside = [kind.removeprefix("in ") for kind in sorted(left) if kind.startswith("in ")]
        how = "add some with .txt captions, a metadata.jsonl, or in 10_NAME/"
        how = f"give the folder that they are in, for example {path / inside[0]}" if inside else how
        raise ValueError(f"{path}: no pictures; {how}")
    return pictures


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, without those that are empty. Raises ValueError if none is left."""
    prompts = [one_line(line) for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompts; write one a line")
    return prompts


def read_table(table: Path) -> Iterator[tuple[Path, str]]:
    """(picture, caption) of each row of a metadata.jsonl or metadata.csv."""
    try:
        text = decoded(table.read_bytes())
        if table.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{table}: not UTF-8 with one picture a line ({error})") from None
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f'{table}: picture {n} has no "file_name"; write one')
        name = row["file_name"]
        if not (table.parent / name).is_file():
            what = f"picture {n} is {name!r}, which is not there"
            raise ValueError(f"{table}: {what}; add it or drop the line")
        captions = [row[key] for key in ("text", "caption") if isinstance(row.get(key), str)]
        if not captions:
            raise ValueError(f'{table}: {name!r} has no caption; write "text" or "caption"')
        try:
            yield table.parent / name, one_line(captions[0])
        except UnicodeEncodeError:
            raise ValueError(f"{table}: {captions[0]!a} holds half a letter; mend it") from None


def decoded(data: bytes) -> str:
    """UTF-8, or UTF-16 with a byte order mark, with any line ends. Raises ValueError if no text."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = io.TextIOWrapper(io.BytesIO(data), "utf-16" if wide else "utf-8-sig").read()
    if text.startswith("version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer; run: git lfs pull")
    # without the mark, most UTF-16 would be read as letters with zero bytes between them
    if odd := [x for x in text if unicodedata.category(x) == "Cc" and not x.isspace()]:
        raise ValueError(f"it holds the control character {odd[0]!a}")
    return text


def read_text(path: Path) -> str:
    """`decoded` for a file whose owner should hear what is wrong with it."""
    try:
        return decoded(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error}); save it as UTF-8") from None


def one_line(text: str) -> str:
    """Blanks and breaks as one space. Raises UnicodeEncodeError for half a letter (cut JSON)."""
    return " ".join(text.encode().decode().split())


def read_repeats(folder: Path) -> tuple[int, str] | None:
    """kohya's folder name 10_sks dog -> (10, "sks dog"); None for any other name."""
    if not (match := re.fullmatch(r"([-+]?[0-9.]*[0-9])_(.*)", folder.name)):
        return None
    try:
        one_line(folder.name)
    except UnicodeEncodeError:
        raise ValueError(f"{folder}: its name, a caption, is not UTF-8; rename it") from None
    if not match[1].isdigit() or not 1 <= int(match[1]) <= 1000 or not match[2]:
        how = "call it N_NAME with N from 1 to 1000, or just NAME"
        raise ValueError(f"{folder}: {match[1]} repeats; {how}")
    return int(match[1]), match[2]


def read_caption(file: Path, name: str | None) -> str | None:
    """The text beside a picture, in one line, or else `name`."""
    for beside in map(file.with_suffix, (".txt", ".caption", ".TXT")):
        if beside.exists():
            return one_line(read_text(beside))
    return name
