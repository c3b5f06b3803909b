"""Folders people have are read as their makers mean them, pictures are cut as the size ids say, and
every batch is a function of (seed, step) that any number of ranks can share.
"""

import errno
import hashlib
import io
import json
import math
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import png, tiny_text
from torch import Tensor

from minilcm.data.batches import batch_order, batches, in_background
from minilcm.data.folders import Picture, read_pictures
from minilcm.data.latents import Example, cache_latents, cache_text, read_cond
from minilcm.data.pictures import buckets, crop, nearest, open_picture
from minilcm.files.safetensors_file import read_tensors, write_tensors
from minilcm.model.text import TextConfig, TextEncoder

# ---- folders


def put(folder, files: dict[str, str | bytes | None]):
    """Files of a folder: text, bytes, or None for a small picture."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            Image.new("RGB", (16, 16), "red").save(path)
        else:
            path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def read(folder) -> list[tuple[str, str, int]]:
    return [
        (p.file.relative_to(folder).as_posix(), p.caption, p.repeats) for p in read_pictures(folder)
    ]


def test_captions_in_txt_or_caption(tmp_path):
    """Sorted; .txt before .caption; lines join; a BOM, capital suffixes, stray and hidden files."""
    put(
        tmp_path,
        {
            "b.JPG": None,
            "b.txt": "\ufeffa cat,\r\n  asleep\n",
            "a.webp": None,
            "a.caption": "a dog",
        },
    )
    put(
        tmp_path,
        {
            "c.png": None,
            "c.txt": "",
            "c.caption": "no",
            "notes.md": "x",
            "._b.jpg": "x",
            "sub/d.png": None,
        },
    )
    assert read(tmp_path) == [
        ("a.webp", "a dog", 1),
        ("b.JPG", "a cat, asleep", 1),
        ("c.png", "", 1),
    ]


KINDS = {
    "jfif": "JPEG",
    "jpe": "JPEG",
    "tif": "TIFF",
    "jp2": "JPEG2000",
    "gif": "GIF",
    "TIFF": "TIFF",
}


def test_what_pillow_opens_is_read_and_the_rest_is_told(tmp_path, capsys):
    """Whatever its suffix is called; one line counts what is left out, by suffix and by folder."""
    for suffix, kind in KINDS.items():
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{suffix}.{suffix}", kind)
        put(tmp_path, {f"{suffix}.txt": f"a {suffix}"})
    assert sorted(caption for _, caption, _ in read(tmp_path)) == sorted(f"a {x}" for x in KINDS)
    assert not capsys.readouterr().out
    put(tmp_path, {"a.heic": b"x", "b.HEIC": b"x", "a.txt": "x", "cats/1.png": None})
    put(tmp_path, {".hidden.heic": b"x", "cats/1.txt": "x", "list.json": "{}", "clip.mpg": b"x"})
    assert len(read(tmp_path)) == len(KINDS)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}: left out: 2 .heic, 1 .mpg, 1 in cats/; ")


def test_links(tmp_path, capsys):
    """Followed to a picture and to a folder 10_NAME; one line counts the others."""
    put(tmp_path / "away", {"1.png": None, "1.txt": "a cat", "2.png": None})
    put(tmp_path / "data", {"3.png": None, "3.TXT": "a dog"})
    for name, target in {"1.png": "1.png", "1.txt": "1.txt", "10_cup": "", "more": ""}.items():
        (tmp_path / "data" / name).symlink_to(tmp_path / "away" / target)
    (tmp_path / "data/4.png").symlink_to(tmp_path / "none.png")
    (tmp_path / "data/self").symlink_to(tmp_path / "data")
    cats, cups = (
        [("1.png", "a cat", 1)],
        [("10_cup/1.png", "a cat", 10), ("10_cup/2.png", "cup", 10)],
    )
    assert read(tmp_path / "data") == [*cats, *cups, ("3.png", "a dog", 1)]
    told = f"{tmp_path}/data: left out: 3 broken links, or links to folders; "
    assert capsys.readouterr().out.startswith(told)


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    """A folder 10_NAME of another user's is not left out in silence, nor is a caption."""
    put(tmp_path, {"10_cup/1.png": None, "1.png": None})
    (tmp_path / "1.txt").mkdir()
    with pytest.raises(OSError, match="Is a directory: '.*/1.txt'$"):
        read(tmp_path)
    iterdir = Path.iterdir

    def refusing(path):
        if path.name == "10_cup":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refusing)
    with pytest.raises(PermissionError, match="10_cup"):
        read(tmp_path)


@pytest.mark.parametrize("code", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["a cat", "黒 猫"])
def test_captions_in_utf_16(tmp_path, code, text):
    """Read if they say so by a byte order mark; else they would be "a\\0 \\0c...", and are refused
    by name.
    """
    put(tmp_path, {"1.png": None, "1.txt": ("\ufeff" + text + "\r\n").encode(code)})
    rows = json.dumps({"file_name": "1.png", "text": "x"}) + "\n"
    put(tmp_path, {"t/1.png": None, "t/metadata.jsonl": ("\ufeff" + rows).encode(code)})
    assert [caption for _, caption, _ in read(tmp_path)] == [text, "x"]
    put(tmp_path, {"1.txt": text.encode(code)})
    with pytest.raises(ValueError, match="1.txt: cannot be read .*; save it as UTF-8"):
        read(tmp_path)
    put(tmp_path, {"1.txt": text, "t/metadata.jsonl": rows.encode(code)})
    with pytest.raises(ValueError, match="metadata.jsonl: not UTF-8 with one picture a line"):
        read(tmp_path)


@pytest.mark.parametrize("column", ["text", "caption"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_imagefolder(tmp_path, kind, column):
    """Hugging Face's metadata file, in the folder or in subfolders; its file names are relative to
    itself; a picture listed twice has both captions, and one not listed still has its .txt.
    """
    rows = [("1.png", "one, two"), ("deep/2.png", 'say "two"'), ("1.png", "uno")]
    if kind == "jsonl":
        table = "".join(
            json.dumps({"file_name": f, column: c, "width": 16}) + "\n" for f, c in rows
        )
    else:
        table = (
            f"file_name,width,{column}\n"
            + '1.png,16,"one, two"\ndeep/2.png,16,"say ""two"""\n1.png,16,uno\n'
        )
    expected = [
        ("1.png", "one, two", 1),
        ("1.png", "uno", 1),
        ("3.png", "drei", 1),
        ("deep/2.png", 'say "two"', 1),
    ]
    files = {
        "1.png": None,
        "deep/2.png": None,
        "3.png": None,
        "3.txt": "drei",
        f"metadata.{kind}": table,
    }
    assert read(put(tmp_path / "a", files)) == expected
    put(tmp_path / "b", {f"train/{name}": data for name, data in files.items()})
    assert read(tmp_path / "b") == [(f"train/{name}", caption, n) for name, caption, n in expected]


def test_kohya(tmp_path):
    """10_NAME: ten times an epoch, NAME where no .txt is; an unnumbered folder is not read."""
    put(
        tmp_path,
        {
            "3_sks dog/1.png": None,
            "3_sks dog/2.png": None,
            "3_sks dog/2.txt": "a sks dog",
            "x.png": None,
        },
    )
    put(
        tmp_path,
        {"x.txt": "x", "10_a_b/y.jpg": None, "other/z.png": None, "2024-01-05_trip/z.png": None},
    )
    assert sorted(read(tmp_path)) == [
        ("10_a_b/y.jpg", "a_b", 10),
        ("3_sks dog/1.png", "sks dog", 3),
        ("3_sks dog/2.png", "a sks dog", 3),
        ("x.png", "x", 1),
    ]


TABLE = '{"file_name": "1.png", "text": "one"}\n'


@pytest.mark.parametrize(
    "files, at, message",
    [
        ({}, "", "no pictures"),
        ({"a/1.png": None, "b/1.png": None}, "", "give the folder that they are in, for example "),
        ({"1.png": None}, "", "1 of 1 pictures have no caption, first: 1.png; put its text into"),
        ({"1.png": None, "1.txt": b"\xff\xfe\xff"}, "1.txt", "save it as UTF-8"),
        (
            {"1.png": None, "2.png": None, "3.png": None, "metadata.jsonl": TABLE},
            "",
            "2 of 3 pictures have no caption, first: 2.png; put its text into 2.txt",
        ),
        ({"metadata.jsonl": TABLE}, "metadata.jsonl", "picture 1 is '1.png', which is not there"),
        (
            {"a/metadata.csv": "file_name,text\n1.png,x\n"},
            "a/metadata.csv",
            "'1.png', which is not there",
        ),
        (
            {"1.png": None, "metadata.jsonl": TABLE + '{"text": "x"}'},
            "metadata.jsonl",
            'picture 2 has no "file_name"',
        ),
        (
            {"1.png": None, "metadata.jsonl": "[1]\n"},
            "metadata.jsonl",
            'picture 1 has no "file_name"',
        ),
        (
            {"1.png": None, "metadata.jsonl": "{"},
            "metadata.jsonl",
            "not UTF-8 with one picture a line",
        ),
        (
            {"1.png": None, "metadata.jsonl": "[" * 200_000},
            "metadata.jsonl",
            "not UTF-8 with one picture a line",
        ),
        (
            {"1.png": None, "metadata.csv": b"\xff"},
            "metadata.csv",
            "not UTF-8 with one picture a line",
        ),
        (
            {"1.png": None, "metadata.csv": "name,text\n1.png,x\n"},
            "metadata.csv",
            'picture 1 has no "file_name"',
        ),
        (
            {"1.png": None, "metadata.csv": "file_name,label\n1.png,x\n"},
            "metadata.csv",
            "'1.png' has no caption",
        ),
        (
            {"1.png": None, "metadata.jsonl": '{"file_name": "1.png", "text": null}'},
            "metadata.jsonl",
            "has no caption",
        ),
        ({"0_cat/1.png": None}, "0_cat", "0 repeats; call it N_NAME with N from 1 to 1000"),
        ({"-2_cat/1.png": None}, "-2_cat", "-2 repeats"),
        ({"1.5_cat/1.png": None}, "1.5_cat", "1.5 repeats"),
        ({"20240105_trip/1.png": None}, "20240105_trip", "20240105 repeats"),
        ({"10_/1.png": None}, "10_", "10 repeats; call it N_NAME"),
        ({"10_\udc94L/1.png": None}, "10_\udc94L", "its name, a caption, is not UTF-8; rename it"),
        (
            {"1.png": None, "metadata.jsonl": r'{"file_name": "1.png", "text": "a \ud83d"}'},
            "metadata.jsonl",
            r"'a \ud83d' holds half a letter",
        ),
    ],
)
def test_bad_folders_give_one_line(tmp_path, files, at, message):
    """Each ends in one line with the path of what is wrong, and what to do."""
    with pytest.raises(ValueError) as caught:
        read_pictures(put(tmp_path, files))
    assert str(tmp_path / at) + ":" in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_folder(tmp_path):
    put(tmp_path, {"1.png": None})
    for name, what in (("none", "no such file or folder"), ("1.png", "is no folder, .tar or .txt")):
        with pytest.raises(ValueError, match=f"{tmp_path}/{name}: {what}; give"):
            read_pictures(tmp_path / name)


def test_empty_captions_are_counted(tmp_path, capsys):
    """They are allowed, as captions are dropped, too; but more often they are a mistake."""
    read_pictures(put(tmp_path, {"1.png": None, "1.txt": " \n", "2.png": None, "2.txt": "x"}))
    assert capsys.readouterr().out == f"{tmp_path}: 1 of 2 captions are empty\n"


# ---- pixels


def test_exif_rotation_is_respected():
    """A picture stored lying with "rotate to stand" (orientation 6) has its top at the top."""
    upright = Image.new("RGB", (20, 40), "blue")
    upright.paste("red", (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(file := io.BytesIO(), "PNG", exif=exif)
    image = open_picture(file.getvalue())
    assert (
        image.size == (20, 40)
        and image.getpixel((10, 2)) == (255, 0, 0)
        and image.getpixel((10, 38)) == (0, 0, 255)
    )


def test_alpha_is_laid_on_white():
    """Half-transparent black is grey, transparent is white, in RGBA and in a palette alike."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert [open_picture(png(image)).getpixel((x, 0)) for x in (0, 1)] == [
        (127, 127, 127),
        (255, 255, 255),
    ]
    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    assert open_picture(png(palette)).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("L", "1", "LA", "RGB"):
        assert open_picture(png(Image.new(mode, (1, 1)))).mode == "RGB"


def test_bad_pictures_are_refused(monkeypatch):
    """No picture, one cut off, one above Pillow's decompression-bomb limit: a ValueError."""
    whole = png(Image.effect_noise((64, 64), 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for data in (b"", b"no picture", whole[:1000], whole):
        with pytest.raises(ValueError, match="not a readable picture"):
            open_picture(data)


# (h, w) of SDXL's training, 2307.01952 appendix I, from 1:2 to 2:1
SDXL = """704 1408, 704 1344, 768 1344, 768 1280, 832 1216, 832 1152, 896 1152, 896 1088, 960 1088,
960 1024, 1024 1024, 1024 960, 1088 960, 1088 896, 1152 896, 1152 832, 1216 832, 1280 768, 1344 768,
1408 704"""


def test_buckets_are_sdxls():
    """All of the paper's sizes, and 1344 x 704, which the paper leaves out."""
    paper = {tuple(map(int, pair.split())) for pair in SDXL.split(",")}
    assert set(buckets(1024)) == paper | {(1344, 704)}


@pytest.mark.parametrize("size, multiple", [(512, 64), (768, 64), (1024, 64), (64, 8), (512, 8)])
def test_buckets_cover(size, multiple):
    """Multiples, close to size^2 from below, the square among them, each lying and standing; and no
    picture between 1:2 and 2:1 loses more than a quarter of its area to the cut (a square cut would
    lose half).
    """
    targets = buckets(size, multiple)
    assert len(set(targets)) == len(targets) and (size, size) in targets
    assert {(w, h) for h, w in targets} == set(targets)
    for h, w in targets:
        assert (
            h % multiple == w % multiple == 0 and 0.9 < h * w / size**2 <= 1 and 0.5 <= w / h <= 2
        )
    for i in range(-20, 21):
        aspect = 2 ** (i / 20)
        h, w = nearest(Image.new("1", (round(1000 * aspect), 1000)), targets)
        assert min(aspect / (w / h), (w / h) / aspect) > 0.75


def test_nearest_is_nearest():
    """By ratio: 3:2 of (1:1, 2:1) is nearer to 2:1 (4/3 off, not 3/2), though 1.5 is in the middle;
    a picture of a bucket's own aspect gets that bucket, and a picture on its side the bucket on its
    side.
    """
    assert nearest(Image.new("1", (300, 200)), [(64, 64), (64, 128)]) == (64, 128)
    assert nearest(Image.new("1", (200, 300)), [(64, 64), (128, 64)]) == (128, 64)
    targets = buckets(1024)
    for h, w in targets:
        assert nearest(Image.new("1", (w // 4, h // 4)), targets) == (h, w)
    rng = random.Random(0)
    for _ in range(200):
        h, w = rng.randint(100, 999), rng.randint(100, 999)
        found = nearest(Image.new("1", (w, h)), targets)
        assert nearest(Image.new("1", (h, w)), targets) == found[::-1]
        off = [max(w / h / (b / a), b / a / (w / h)) for a, b in targets]
        assert max(w / h / (found[1] / found[0]), found[1] / found[0] / (w / h)) == min(off)


def test_buckets_need_a_multiple():
    for size in (100, 0, -64):
        with pytest.raises(ValueError, match=f"size is {size}; give a multiple of 64"):
            buckets(size)


def ramp(width: int, height: int) -> Image.Image:
    """Red tells how far right, green how far down: a pixel centre's level, 0 to 255."""
    image = Image.new("RGB", (width, height))
    image.putdata(
        [
            (round(255 * (x + 0.5) / width), round(255 * (y + 0.5) / height), 0)
            for y in range(height)
            for x in range(width)
        ]
    )
    return image


@pytest.mark.parametrize(
    "size, target",
    [((200, 100), (64, 64)), ((60, 150), (64, 64)), ((30, 20), (64, 96)), ((101, 77), (48, 64))],
)
def test_size_ids_tell_the_cut(size, target):
    """Original (h, w), crop (top, left) in the scaled picture, target (h, w). The pixels are where
    the ids say: the ramp at (y, x) of the cut has the level of (top + y, left + x) in the scaled
    picture. All places occur.
    """
    image, (h, w), rng, places = ramp(*size), target, random.Random(0), set()
    zoom = max(w / size[0], h / size[1])
    wide, tall = round(zoom * size[0]), round(zoom * size[1])
    for _ in range(300):
        pixels, ids = crop(image, target, rng)
        height, width, top, left, *rest = ids
        assert (width, height) == size and tuple(rest) == target and pixels.shape == (3, h, w)
        assert 0 <= top <= tall - h and 0 <= left <= wide - w
        places.add((top, left))
    assert len(places) > 0.8 * (tall - h + 1) * (wide - w + 1)
    x = 2 * (left + torch.arange(w) + 0.5) / wide - 1
    y = 2 * (top + torch.arange(h) + 0.5) / tall - 1
    inner = slice(3, -3)  # bicubic needs neighbours
    torch.testing.assert_close(
        pixels[0][inner, inner], x.expand(h, w)[inner, inner], rtol=0, atol=0.03
    )
    torch.testing.assert_close(
        pixels[1][inner, inner], y[:, None].expand(h, w)[inner, inner], rtol=0, atol=0.03
    )


def test_size_ids_of_a_hand_made_picture():
    """200 x 100 onto 64 x 64: scaled to 128 x 64, top 0, left at most 64. Own aspect: no cut."""
    image = ramp(200, 100)
    ids = [crop(image, (64, 64), random.Random(i))[1] for i in range(500)]
    assert all(x[:3] == [100, 200, 0] and x[4:] == [64, 64] for x in ids)
    assert {x[3] for x in ids} == set(range(65))
    assert crop(image, (32, 64), random.Random(0))[1] == [100, 200, 0, 0, 32, 64]


def test_a_thread_of_a_picture_is_cut_without_scaling_it_whole():
    """1 x 5000 to cover 512 x 512 would be 2.6 million pixels long."""
    pixels, ids = crop(Image.new("RGB", (5000, 1), "white"), (512, 512), random.Random(0))
    assert (
        torch.equal(pixels, torch.ones(3, 512, 512))
        and ids[:3] == [1, 5000, 0]
        and 0 <= ids[3] <= 511 * 5000
    )


# ---- encoded once


class CountingVAE:
    """Mean: 8 x 8 averages of the pixels; std: 0.5. Counts the pictures it encodes."""

    encoded = 0

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.encoded += len(pixels)
        small = F.avg_pool2d(pixels, 8)
        mean = torch.cat([small, small.mean(dim=1, keepdim=True)], dim=1)  # (b, 4, h, w)
        return mean, torch.full_like(mean, 0.5)


def folder_of(path, sizes: list[tuple[int, int]]) -> list[Picture]:
    return read_pictures(
        put(
            path,
            {f"{i}.png": png(ramp(*s)) for i, s in enumerate(sizes)}
            | {f"{i}.txt": f"picture {i}" for i in range(len(sizes))},
        )
    )


TARGETS = [(32, 32), (32, 64), (64, 32)]


def test_cache_latents(tmp_path):
    """Each look is q(z|x) of the cut its size ids tell, in the shape of the nearest bucket; looks
    differ; a picture with repeats is there as often, encoded once.
    """
    pictures = folder_of(tmp_path / "in", [(64, 64), (130, 60), (60, 130)])
    pictures[1] = pictures[1]._replace(repeats=3)
    vae = CountingVAE()
    examples = cache_latents(vae, "vae", pictures, tmp_path / "cache", TARGETS, looks=2)
    assert vae.encoded == 6 and len(list((tmp_path / "cache").iterdir())) == 6
    assert Counter(x.caption for x in examples) == {"picture 0": 2, "picture 1": 6, "picture 2": 2}
    assert {x.caption: x.shape for x in examples} == {
        "picture 0": (4, 4),
        "picture 1": (4, 8),
        "picture 2": (8, 4),
    }
    for x in examples:
        height, width, top, left, h, w = x.size_ids
        assert (h, w) == (8 * x.shape[0], 8 * x.shape[1])
        tensors, _ = read_tensors(x.file)
        assert (
            tensors["mean"].shape == tensors["std"].shape == (4, *x.shape)
            and (tensors["std"] == 0.5).all()
        )
        zoom = max(h / height, w / width)
        red = 2 * (left + 8 * torch.arange(w // 8) + 4) / round(zoom * width) - 1
        torch.testing.assert_close(tensors["mean"][0], red.expand(x.shape), rtol=0, atol=0.03)
    looks = [
        x.size_ids[2:4]
        for x in cache_latents(vae, "vae", pictures, tmp_path / "more", [(32, 32)], looks=8)
    ]
    assert len({tuple(x) for x in looks[8:32]}) > 4


def test_only_what_changed_is_encoded_again(tmp_path, monkeypatch):
    """A second call decodes and encodes nothing; a changed picture, another VAE, other targets or
    one look more only themselves. A changed caption or a copy of a picture costs nothing.
    """
    pictures = folder_of(tmp_path / "in", [(40, 40), (41, 40), (80, 40)])
    vae = CountingVAE()
    cache = tmp_path / "cache"

    def encoded(vae_id="vae", targets=TARGETS, looks=1) -> int:
        before = vae.encoded
        cache_latents(vae, vae_id, pictures, cache, targets, looks)
        return vae.encoded - before

    first = cache_latents(vae, "vae", pictures, cache, TARGETS)
    assert encoded() == 0 and first == cache_latents(vae, "vae", pictures, cache, TARGETS)
    pictures[0].file.write_bytes(png(ramp(40, 42)))
    assert encoded() == 1 and encoded() == 0
    now = cache_latents(vae, "vae", pictures, cache, TARGETS)
    assert now[0].file != first[0].file and now[1:] == first[1:] and now[0].size_ids[:2] == [42, 40]
    assert encoded(vae_id="another") == 3 and encoded(vae_id="another") == 0
    assert encoded(targets=[(32, 32)]) == 3 and encoded(looks=2) == 3 and encoded(looks=2) == 0
    pictures[1] = pictures[1]._replace(caption="another")
    put(tmp_path / "in", {"3.png": pictures[2].file.read_bytes(), "3.txt": "copy"})
    pictures.append(Picture(tmp_path / "in/3.png", "copy"))
    assert encoded() == 0
    monkeypatch.setattr("minilcm.data.latents.open_picture", None)
    assert [x.caption for x in cache_latents(vae, "vae", pictures, cache, TARGETS)][1::2] == [
        "another",
        "copy",
    ]


def test_a_portrait_cut_square_is_told(tmp_path, capsys):
    """100 x 200 loses half of its height, 90 x 100 a tenth, which is no matter; a target of its own
    shape loses nothing.
    """
    pictures = [Picture(tmp_path / f"{w}.png", "x") for w in (90, 100, 150)]
    for picture, size in zip(pictures, [(90, 100), (100, 200), (150, 100)]):
        Image.new("RGB", size, "red").save(picture.file)
    cache_latents(CountingVAE(), "", pictures, tmp_path / "cache", [(16, 16)])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("2 of 3 cuts leave out up to 50 % of their picture")
    cache_latents(
        CountingVAE(), "", pictures, tmp_path / "cache", [(16, 16)]
    )  # also when found again
    assert capsys.readouterr().out == line + "\n"
    cache_latents(CountingVAE(), "", pictures, tmp_path / "cache", [(16, 16), (32, 16), (16, 24)])
    assert not capsys.readouterr().out


def test_bad_pictures_are_named_and_skipped(tmp_path, capsys):
    """One line for each that is no picture or gone, one with the number; the others are encoded."""
    pictures = folder_of(tmp_path / "in", [(40, 40)] * 4)
    pictures[1].file.write_bytes(b"no picture"), pictures[2].file.unlink()
    for _ in range(2):
        examples = cache_latents(CountingVAE(), "vae", pictures, tmp_path / "cache", TARGETS)
        assert [x.caption for x in examples] == ["picture 0", "picture 3"]
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 and lines[2] == "2 of 4 pictures skipped"
        assert all(line.startswith(f"{p.file}: skipped, ") for line, p in zip(lines, pictures[1:3]))
    with pytest.raises(
        ValueError, match=f"none of 2 pictures can be read, first: {pictures[1].file}"
    ):
        cache_latents(CountingVAE(), "vae", pictures[1:3], tmp_path / "cache", TARGETS)


def test_latents_that_are_not_finite_are_not_kept(tmp_path):
    """A VAE that overflows is an error that names the picture; nothing of it is cached."""
    vae = CountingVAE()
    vae.moments = lambda pixels: (torch.full((1, 4, 4, 4), math.inf), torch.ones(1, 4, 4, 4))
    with pytest.raises(ValueError, match="0.png: latent is not finite"):
        cache_latents(
            vae, "vae", folder_of(tmp_path / "in", [(40, 40)]), tmp_path / "cache", TARGETS
        )
    assert not list((tmp_path / "cache").glob("*"))


def sdxl_in_miniature() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TextConfig(32, 2, 2, big=(48, 2, 2))).requires_grad_(False).eval()


def counting(text: TextEncoder) -> list[str]:
    """The prompts that this encoder encodes from now on."""
    seen, encode = [], text.encode
    text.encode = lambda prompts, *size: seen.extend(prompts) or encode(prompts, *size)
    return seen


@pytest.mark.parametrize("make", [tiny_text, sdxl_in_miniature])
def test_cache_text(tmp_path, make):
    """What is read is what the encoder says of each caption with its own picture's sizes; each
    caption is encoded once, "" with them, and again only for another encoder.
    """
    text, captions = make(), ["a cat", "a dog", "a cat"]
    seen = counting(text)
    files = cache_text(text, "text", captions, tmp_path)
    assert sorted(seen) == sorted(["", "a cat", "a dog"]) and set(files) == set(seen)
    assert cache_text(text, "text", captions, tmp_path) == files and len(seen) == 3
    cache_text(text, "text", [*captions, "a bird"], tmp_path)
    assert seen[3:] == ["a bird"]
    cache_text(text, "another", captions, tmp_path)
    assert len(seen) == 7
    sizes = [(832, 1216), (1024, 1024), (640, 512)]  # (W, H)
    size_ids = torch.tensor([[h, w, 0, 0, h, w] for w, h in sizes])
    cond = read_cond(files, ["a dog", "", "a cat"], size_ids)
    for i, caption in enumerate(["a dog", "", "a cat"]):
        expected = make().encode([caption], sizes[i]) if caption else make().null_cond(1, sizes[i])
        torch.testing.assert_close(cond.context[i], expected.context[0], rtol=0, atol=1e-6)
        if expected.vector is None:
            assert cond.vector is None
        else:
            torch.testing.assert_close(cond.vector[i], expected.vector[0], rtol=0, atol=1e-6)


# ---- drawn in batches


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> list[Example]:
    """23 examples in buckets of 13, 9 and 1; latent i is the number i everywhere, std 0.25."""
    folder, examples = tmp_path_factory.mktemp("cache"), []
    for i in range(23):
        shape = (2, 2) if i % 2 == 0 or i == 21 else (2, 3)
        shape = (3, 2) if i == 5 else shape
        mean = torch.full((4, *shape), float(i))
        file = folder / f"{hashlib.sha256(str(i).encode()).hexdigest()}.safetensors"
        write_tensors(file, {"mean": mean, "std": torch.full_like(mean, 0.25)}, {})
        examples.append(
            Example(file, f"picture {i}", [i, 0, 0, 0, 8 * shape[0], 8 * shape[1]], shape)
        )
    return examples


def same(a, b) -> bool:
    return (
        torch.equal(a[0], b[0])
        and a[1] == b[1]
        and torch.equal(a[2], b[2])
        and torch.equal(a[3].get_state(), b[3].get_state())
    )


def test_batches_are_of_one_bucket_and_belong_together(cache):
    """z0 of one shape; number of the latent, caption and size ids are of the same example."""
    for z0, captions, size_ids, _ in islice(batches(cache, 4, 0), 40):
        h, w = z0.shape[2:]
        assert z0.shape[:2] == (4, 4) and size_ids.shape == (4, 6) and size_ids.dtype == torch.int64
        assert size_ids[:, 4:].tolist() == [[8 * h, 8 * w]] * 4
        assert captions == [f"picture {i}" for i in size_ids[:, 0].tolist()]
        assert (z0.mean(dim=(1, 2, 3)) - size_ids[:, 0]).abs().max() < 0.5


@pytest.mark.parametrize("batch", [1, 3, 4, 30])
def test_each_epoch_is_a_permutation_of_each_bucket(cache, batch):
    """A bucket's examples in the order drawn: its first m are all its m, the next m too, in another
    order; after the batches that begin in the first n epochs each bucket has shown n of its epochs,
    and less than a batch more.
    """
    shapes = [x.shape for x in cache]
    sizes = Counter(shapes)
    assert sorted(sizes.values()) == [1, 9, 13]
    epochs = 6
    steps = sum(-(-epochs * m // batch) for m in sizes.values())
    drawn = {shape: [] for shape in sizes}
    for index, _, _ in islice(batch_order(shapes, batch, 0, 0), steps):
        assert len(index) == batch and len({shapes[i] for i in index}) == 1
        drawn[shapes[index[0]]] += index
    for shape, m in sizes.items():
        assert epochs * m <= len(drawn[shape]) < epochs * m + batch
        parts = [tuple(drawn[shape][i * m : (i + 1) * m]) for i in range(epochs)]
        assert all(
            sorted(part) == [i for i, s in enumerate(shapes) if s == shape] for part in parts
        )
        assert m == 1 or len(set(parts)) == epochs


def test_buckets_of_a_size_have_orders_of_their_own():
    """Two buckets of nine: their examples don't come in one order."""
    shapes = [(4, 8, 8)] * 9 + [(4, 8, 16)] * 9
    drawn = {0: [], 1: []}
    for (i,), _, _ in islice(batch_order(shapes, 1, 0, 0), 18):
        drawn[i // 9].append(i % 9)
    assert sorted(drawn[0]) == sorted(drawn[1]) == list(range(9)) and drawn[0] != drawn[1]


def test_buckets_take_turns_at_random(cache):
    """Not one bucket after the other: in an epoch of single pictures the order of buckets is mixed,
    and another one in the next epoch and with another seed.
    """
    shapes = [x.shape for x in cache]
    turns = [
        [shapes[index[0]] for index, _, _ in islice(batch_order(shapes, 1, seed, 0), 46)]
        for seed in (0, 1)
    ]
    assert len({tuple(x) for t in turns for x in (t[:23], t[23:])}) == 4
    assert sum(a != b for a, b in zip(turns[0], turns[0][1:])) > 12


@pytest.mark.parametrize("batch", [1, 3, 4, 30])
def test_start_is_skipping(cache, batch):
    """start = n gives what is left after n batches, in any epoch or bucket; seeds differ."""
    whole = list(islice(batches(cache, batch, 4), 30))
    for n in range(0, 28, 1 if batch == 4 else 9):
        assert all(
            same(a, b) for a, b in zip(islice(batches(cache, batch, 4, start=n), 2), whole[n:])
        )
    assert not any(same(a, b) for a, b in zip(whole, islice(batches(cache, batch, 5), 30)))
    assert not any(same(a, b) for a, b in zip(whole, whole[1:]))


@pytest.mark.parametrize("batch, world", [(1, 4), (2, 2), (3, 3)])
def test_ranks_share_the_batch_of_one(cache, batch, world):
    """The ranks' rows, one after the other, are the batch of one process, noise and dropped
    captions too; after it the generators agree, so what is drawn next for the whole batch is the
    same on all.
    """
    one = batches(cache, batch * world, 7, start=3, drop=0.3)
    ranks = [batches(cache, batch, 7, 3, rank, world, 0.3) for rank in range(world)]
    for whole, *parts in islice(zip(one, *ranks), 12):
        assert all(len(part[0]) == batch for part in parts)
        assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
        assert whole[1] == [text for part in parts for text in part[1]]
        assert torch.equal(whole[2], torch.cat([part[2] for part in parts]))
        assert all(torch.equal(whole[3].get_state(), part[3].get_state()) for part in parts)


def test_latents_are_drawn_afresh(cache):
    """z0 = mean + std noise: a picture's latent is another one each epoch, with the cache's mean
    and std in the long run, and no two rows of a batch share their noise.
    """
    noise = torch.cat(
        [z0 - ids[:, :1, None, None] for z0, _, ids, _ in islice(batches(cache[:1], 8, 0), 200)]
    )
    assert len(torch.unique(noise[:, 0, 0, 0])) == 1600
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 0.25) < 0.005


def test_captions_are_dropped_as_often_as_asked(cache):
    """drop = 0.25: a quarter of the captions is empty; by default none; nothing else changes."""
    some, none = (list(islice(batches(cache, 8, 0, drop=drop), 200)) for drop in (0.25, 0.0))
    said = [text for _, captions, _, _ in some for text in captions]
    assert abs(said.count("") / len(said) - 0.25) < 0.03
    assert not any("" in captions for _, captions, _, _ in none)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[2], b[2]) for a, b in zip(some, none))


# ---- batches in the background


def test_in_background_gives_the_same_items_and_errors():
    """All items in order, then the end; an error comes where its item was asked for."""
    assert list(in_background(iter(range(20)))) == list(range(20))

    def broken():
        yield 1
        yield 2
        raise ValueError("cut off")

    items = in_background(broken())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="cut off"):
        next(items)
