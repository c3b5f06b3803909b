"""Pixels to pictures: rounding, the recipe in the PNG, contact sheets; and back, to start from."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from minilcm.data.pictures import (
    contact_sheet,
    open_picture,
    read_image,
    save_new_png,
    save_numbered,
    save_png,
    to_images,
)


def test_to_images_rounds_to_the_nearest_level():
    """Level = round(127.5 (x + 1)), clamped to 0..255: every one of the 256 levels comes back from
    its own value, and from 0.49 of a level above or below it.
    """
    levels = torch.arange(256.0)
    for shift in (-0.49, 0.0, 0.49):
        pixels = ((levels + shift) / 127.5 - 1).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
        image = to_images(pixels)[0]
        assert image.mode == "RGB" and np.array_equal(
            np.array(image)[..., 0].flatten(), np.arange(256)
        )


def test_to_images_keeps_order_and_clamps():
    """One image a row, channels R, G, B, values outside [-1, 1] at the ends; half precision too."""
    pixels = torch.tensor([[5.0, -1.0, -5.0], [-1.0, 1.0, 0.0]])[:, :, None, None].expand(
        2, 3, 4, 6
    )
    for dtype in (torch.float32, torch.bfloat16):
        images = to_images(pixels.to(dtype))
        assert [i.size for i in images] == [(6, 4)] * 2
        assert images[0].getpixel((0, 0)) == (255, 0, 0) and images[1].getpixel((5, 3)) == (
            0,
            255,
            128,
        )


@pytest.mark.parametrize(
    "prompt", ["a slice of pizza", 'say "cheese", 100 %', "日本の寿司 🍣, café"]
)
def test_png_has_the_recipe_inside(tmp_path, prompt):
    """The text chunk `parameters` comes back whole, beyond Latin-1 too; the picture is lossless."""
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = to_images(pixels)[0]
    save_png(tmp_path / "x.png", image, f"{prompt}\nSteps: 4, Sampler: lcm")
    read = Image.open(tmp_path / "x.png")
    assert read.text["parameters"].split("\n") == [prompt, "Steps: 4, Sampler: lcm"]
    assert read.format == "PNG" and np.array_equal(np.array(read), np.array(image))


def test_failed_png_leaves_the_old_one(tmp_path, monkeypatch):
    """An error while writing keeps the old file and leaves no temporary one."""
    save_png(tmp_path / "x.png", Image.new("RGB", (4, 4), "red"), "old")

    def fail(self, file, *_, **__):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError):
        save_png(tmp_path / "x.png", Image.new("RGB", (4, 4), "blue"), "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.png"]
    assert Image.open(tmp_path / "x.png").text["parameters"] == "old"


@pytest.mark.parametrize(
    "count, columns, grid", [(1, 1, (1, 1)), (5, 3, (3, 2)), (6, 3, (3, 2)), (4, 6, (6, 1))]
)
def test_contact_sheet_size_and_places(count, columns, grid):
    """`columns` cells a row; cell i holds image i unchanged, 8 pixels between cells."""
    images = [Image.new("RGB", (128, 64), (10 * i, 0, 200)) for i in range(count)]
    sheet = contact_sheet(images, ["label"] * count, columns)
    tall = 13 + 6
    assert sheet.size == (grid[0] * (128 + 8), grid[1] * (64 + tall + 8))
    for i, image in enumerate(images):
        x, y = (i % columns) * 136 + 4, i // columns * (64 + tall + 8) + 4
        assert np.array_equal(np.array(sheet.crop((x, y, x + 128, y + 64))), np.array(image))


def test_contact_sheet_labels():
    """A label is drawn below its image; a long one is wrapped, so that it makes the sheet taller,
    not its cell wider; empty labels, line breaks and letters beyond Latin-1 are drawn without an
    error.
    """
    image = Image.new("RGB", (128, 128), "white")
    short, long = (contact_sheet([image], [label], 1) for label in ("cat", "cat " * 40))
    assert (
        np.array(short)[132:].min() < 128 and np.array(contact_sheet([image], [""], 1)).min() == 255
    )
    assert long.width == short.width and long.height > short.height + 50
    contact_sheet([image] * 3, ["", "a\nb", "寿司 🍣 é"], 2)


def test_labels_stay_in_their_cells():
    """Also of wide letters, of words without a space and of letters that are all alike in width."""
    image = Image.new("RGB", (128, 128), "white")
    for label in ("W" * 60, "WWW MMM " * 9, "i" * 300, "寿司" * 40):
        beside = np.array(contact_sheet([image, image], [label, ""], 2))
        assert beside[132:, :136].min() < 128 and beside[:, 136:].min() == 255


def test_numbers_in_names_are_numbers(tmp_path):
    """After 9999 comes 10000 and then 10001, whatever else is in the folder."""
    image = Image.new("RGB", (4, 4))
    for name in (
        "9999_old_seed0.png",
        "123456_notes.txt",
        "12a_x.png",
        "20000.png",
        "x_30000_.png",
    ):
        (tmp_path / name).write_text("mine")
    names = [save_numbered(tmp_path, name, image, "").name for name in ("rocket", "rocket", "cat")]
    assert names == ["10000_rocket.png", "10001_rocket.png", "10002_cat.png"]
    assert (tmp_path / "9999_old_seed0.png").read_text() == "mine"


def test_no_picture_of_another_run_is_overwritten(tmp_path):
    """Eight writers, one folder, one name: each of 80 pictures is there, and none is empty."""

    def write(writer):
        for i in range(10):
            save_numbered(tmp_path, "rocket", Image.new("RGB", (4, 4)), f"{writer} {i}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    texts = [Image.open(path).text["parameters"] for path in tmp_path.iterdir()]
    assert sorted(texts) == sorted(f"{writer} {i}" for writer in range(8) for i in range(10))


def test_a_new_png_leaves_what_is_there(tmp_path, monkeypatch):
    """A name that is taken is refused; one whose picture could not be written is free again."""
    path, image = tmp_path / "x.png", Image.new("RGB", (4, 4))
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        save_new_png(path, image, "")
    assert path.read_text() == "mine"

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_new_png(tmp_path / "y.png", image, "")
    assert list(tmp_path.iterdir()) == [path]


# ---- reading


def gradient(width: int, height: int) -> Image.Image:
    """Red tells x, green tells y."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (16, 48)])
@pytest.mark.parametrize("source", [(64, 64), (200, 100), (37, 91)])
def test_read_image_scales_and_crops_the_centre(tmp_path, size, source):
    """(1, 3, H, W) in [-1, 1]; the picture covers the frame with its proportions, and what is too
    much is cut off equally on both sides: the centre stays the centre, and the side that fits is
    whole.
    """
    gradient(*source).save(tmp_path / "x.png")
    x = read_image(tmp_path / "x.png", size)
    assert x.shape == (1, 3, size[1], size[0]) and x.min() >= -1 and x.max() <= 1
    zoom = max(size[0] / source[0], size[1] / source[1])
    for values, target, length in (
        (x[0, 0].mean(dim=0), size[0], source[0]),
        (x[0, 1].mean(dim=1), size[1], source[1]),
    ):
        assert abs(values.mean()) < 0.05
        covered = target / (zoom * length)  # the part of the gradient that is in the frame
        assert values[-1] - values[0] == pytest.approx(2 * covered * (1 - 1 / target), abs=0.12)


@pytest.mark.parametrize("source, told", [((64, 96), True), ((64, 64), False), ((65, 64), False)])
def test_read_image_says_what_is_cut_off(tmp_path, capsys, source, told):
    gradient(*source).save(tmp_path / "portrait.png")
    read_image(tmp_path / "portrait.png", (32, 32))
    assert ("portrait.png: 64x96, of which the middle" in capsys.readouterr().out) == told


def test_read_image_of_the_right_size_is_exact(tmp_path):
    """A picture that fits already is not resampled: to_images gives it back."""
    gradient(32, 16).save(tmp_path / "x.png")
    image = to_images(read_image(tmp_path / "x.png", (32, 16)))[0]
    assert np.array_equal(np.array(image), np.array(gradient(32, 16)))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_read_image_takes_any_mode(tmp_path, mode):
    """Grey, palette, alpha, CMYK: all become three channels."""
    name = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (20, 20)).save(name)
    assert read_image(name, (16, 16)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "PPM"])
def test_grey_of_16_bits_keeps_its_levels(tmp_path, kind):
    """Level 257 k of 65,535 is level k of 255, from black to white; halves between round up."""
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    path = tmp_path / "grey"
    if kind == "PPM":  # which Pillow opens in mode I
        path.write_bytes(b"P5 16 16 65535 " + levels.astype(">u2").tobytes())
    elif kind == "big-endian TIFF":  # mode I;16B
        Image.fromarray(levels.astype(">u2")).save(path, "TIFF")
    else:
        Image.fromarray(levels).save(path, kind)
    assert Image.open(path).mode.startswith("I")
    image = open_picture(path.read_bytes())
    assert np.array_equal(np.asarray(image)[..., 0], levels // 257) and image.mode == "RGB"
    x = read_image(path, (16, 16))
    assert x.min() == -1 and x.max() == 1


@pytest.mark.parametrize("kind, what", [(np.int32, "32-bit integers"), (np.float32, "floats")])
def test_numbers_of_no_known_white_are_refused(tmp_path, kind, what):
    """Is 1.0 white, or 255, or 65,535? In one line that names the file and what to do."""
    Image.fromarray(np.ones((8, 8), kind)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=f"x.tiff: TIFF of {what}.*; save it as .png$"):
        read_image(tmp_path / "x.tiff", (8, 8))


def test_read_image_of_a_thread(tmp_path):
    """A picture of 5000 x 1 to cover 512 x 512 is cut before it is scaled: the middle third."""
    image = Image.new("RGB", (5000, 1), "red")
    image.paste("white", (2400, 0, 2600, 1))
    image.save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", (512, 512)).min() == 1


def test_read_image_shows_transparency_as_white(tmp_path):
    """Fully transparent black is white: not what the pixel says, but what a viewer shows."""
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", (16, 16)).min() > 0.999


def test_read_image_errors(tmp_path):
    """Missing, a folder, text, and a PNG cut off anywhere: one line with the path."""
    gradient(64, 64).save(tmp_path / "whole.png")
    whole, bad = (tmp_path / "whole.png").read_bytes(), tmp_path / "bad.png"
    cuts = [whole[:n] for n in (0, 10, 30, 60, len(whole) // 2, len(whole) - 30)]
    for content in (*cuts, b"hello", whole[:40] + b"\xff" * 60 + whole[100:]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.png: not a readable picture"):
            read_image(bad, (16, 16))
    bad.write_bytes(cuts[-2])
    with pytest.raises(ValueError, match=r"picture \(.*truncated"):
        read_image(bad, (16, 16))
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ValueError) as caught:
            read_image(path, (16, 16))
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
