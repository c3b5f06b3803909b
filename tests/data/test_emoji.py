"""The emoji art: captions are true of their pictures; all chance comes from (seed, step)."""

import io
import json
import random
import re
import tarfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CONFIG, ROOT, drawing, png, tiny_vae, write_art, write_tar

from minilcm.data.emoji import (
    COLORS,
    STYLES,
    Art,
    Cache,
    art_batches,
    cache_art,
    caption,
    compose,
    place,
    read_art,
    split_art,
)

ART = ROOT / "weights/emoji/art"
PIZZA = Art("pizza", ("Pizza", "slice", "cheese"), "noto", drawing(1))


# ---- captions


def test_brackets_are_left_out_40_percent_and_a_tenth_is_empty():
    """Frequencies over 6000 draws: style and colour each left out of 40 +- 3 % of captions that say
    anything, 10 +- 2 % empty, and the two brackets independently of each other (both said: 36 %).
    """
    rng = random.Random(0)
    said = [caption(PIZZA, "blue", rng)[1] for _ in range(6000)]
    something = [x for x in said if x[0]]
    assert abs(1 - len(something) / len(said) - 0.10) < 0.02
    assert abs(sum(style is None for _, style, _ in something) / len(something) - 0.40) < 0.03
    assert abs(sum(color is None for _, _, color in something) / len(something) - 0.40) < 0.03
    assert abs(sum(None not in x for x in something) / len(something) - 0.36) < 0.03


def test_captions_say_what_is_true():
    """Over all styles and colours: the words of a caption, read by a pattern here, agree with the
    picture and with what the second return value claims was said; a bracket that is left out is
    named nowhere.
    """
    rng = random.Random(1)
    pattern = re.compile(
        r"(?P<name>[^,]+?)(, (?P<style>\w+) style)?(, on (a|an) (?P<color>\w+) background)?"
    )
    for style in STYLES:
        for color in COLORS:
            for _ in range(40):
                text, said = caption(PIZZA._replace(style=style), color, rng)
                if text == "":
                    assert said == (None, None, None)
                    continue
                words = pattern.fullmatch(text)
                assert "pizza" in words["name"]
                assert (words["style"], words["color"]) == said[1:] and said[0] == "pizza"
                assert said[1] in (None, style) and said[2] in (None, color)


def test_articles_agree():
    """'an orange background', 'a blue background', 'an octopus'."""
    rng = random.Random(2)
    texts = {
        caption(Art("octopus", ("octopus",), "noto", drawing(0)), c, rng)[0]
        for c in COLORS
        for _ in range(100)
    }
    assert any("an orange background" in text for text in texts) and any(
        text.startswith("an octopus") for text in texts
    )
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", text) for text in texts)


def test_naming_uses_name_label_article_and_keywords():
    """The bare name is most frequent; label, article, keyword forms occur; all say what it is."""
    rng = random.Random(3)
    art = Art("red apple", ("Apple", "fruit"), "noto", drawing(0))
    names = Counter(
        text.split(",")[0] for text, _ in (caption(art, "white", rng) for _ in range(3000)) if text
    )
    assert names.most_common(1)[0][0] == "red apple"
    assert {
        "apple",
        "a red apple",
        "an apple",
        "fruit red apple",
        "red apple fruit",
        "a fruit of red apple",
    } <= set(names)
    assert all("apple" in name for name in names)


def test_captions_of_own_pictures_are_left_alone():
    """A picture with its own text (style None) has it as caption, or none in a tenth of draws."""
    rng = random.Random(4)
    texts = Counter(
        caption(Art("my cat Tom, asleep", (), None, drawing(0)), "white", rng)[0]
        for _ in range(2000)
    )
    assert set(texts) == {"my cat Tom, asleep", ""} and abs(texts[""] / 2000 - 0.1) < 0.02


# ---- pictures


def level(color: str) -> torch.Tensor:
    return torch.tensor(COLORS[color]).float() / 127.5 - 1


def test_compose_stands_on_the_colour_it_tells():
    """(3, S, S) in [-1, 1]; the corners, free of a disc, have the returned colour; all occur."""
    pictures, colors = compose([PIZZA] * 100, 64, random.Random(0))
    assert pictures.shape == (100, 3, 64, 64) and pictures.dtype == torch.float32
    assert pictures.min() >= -1 and pictures.max() <= 1
    for pixels, color in zip(pictures, colors):
        for corner in (pixels[:, 0, 0], pixels[:, 0, -1], pixels[:, -1, 0], pixels[:, -1, -1]):
            torch.testing.assert_close(corner, level(color), rtol=0, atol=1e-6)
    assert set(colors) == set(COLORS)


def test_compose_scales_and_moves_within_the_frame():
    """A full square of art covers 75 to 95 % of the side, moves half-way to each edge, is whole."""
    square = PIZZA._replace(image=Image.new("RGBA", (128, 128), (0, 0, 255, 255)))
    sides, moved = [], []
    for pixels, color in zip(*compose([square] * 300, 64, random.Random(0))):
        covered = (level(color)[0] - pixels[0]) / (level(color)[0] + 1)  # (S, S): blue has no red
        sides.append(covered.sum().sqrt().item() / 64)
        middle = covered.sum(dim=0) @ (torch.arange(64) + 0.5) / covered.sum() / 64
        moved.append((middle.item() - 0.5) / (1 - sides[-1]))  # of the free room on both sides
    assert 0.74 < min(sides) < 0.76 and 0.94 < max(sides) < 0.96
    assert -0.27 < min(moved) < -0.22 and 0.22 < max(moved) < 0.27


def test_place_blends_transparency():
    """Half-transparent black on white is grey: alpha is composited, not dropped."""
    black = torch.tensor([0.0, 0.0, 0.0, 128 / 255])[None, :, None, None].expand(1, 4, 8, 8)
    pixels = place(black, torch.ones(1, 3), 8, torch.ones(1), torch.zeros(1, 2))
    expected = torch.full((1, 3, 6, 6), 2 * (1 - 128 / 255) - 1)
    torch.testing.assert_close(pixels[:, :, 1:-1, 1:-1], expected, rtol=0, atol=1e-6)


def test_place_puts_a_point_where_shift_says():
    """A drawing's red centre, 8 of 128 pixels, lands at half the canvas plus shift at any scale."""
    drawing = torch.zeros(1, 4, 128, 128)
    drawing[:, :, 60:68, 60:68] = torch.tensor([1.0, 0.0, 0.0, 1.0])[None, :, None, None]
    for scale, (dx, dy) in ((1.0, (0.0, 0.0)), (0.75, (0.125, -0.0625)), (0.95, (-0.1, 0.2))):
        pixels = place(
            drawing, torch.ones(1, 3), 64, torch.tensor([scale]), torch.tensor([[dx, dy]])
        )
        red = (1 - pixels[0, 1]) / 2  # (S, S), how much of a pixel is covered
        at = torch.arange(64) + 0.5
        assert red.sum() == pytest.approx((8 * scale * 64 / 128) ** 2, rel=0.02)
        assert (red.sum(dim=0) @ at / red.sum()).item() == pytest.approx(64 * (0.5 + dx), abs=0.05)
        assert (red.sum(dim=1) @ at / red.sum()).item() == pytest.approx(64 * (0.5 + dy), abs=0.05)


def test_a_picture_without_style_is_cropped_not_framed():
    """Style None: the centre square fills the canvas, transparent parts are white."""
    image = Image.new("RGBA", (60, 20), (255, 0, 0, 255))
    image.paste((0, 0, 255, 255), (20, 0, 40, 20))
    arts = [Art("x", (), None, image), PIZZA, Art("x", (), None, Image.new("RGBA", (20, 20)))]
    pixels, colors = compose(arts, 16, random.Random(0))
    assert torch.equal(pixels[0], torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, 16, 16))
    assert torch.equal(pixels[2], torch.ones(3, 16, 16)) and colors[::2] == ["white", "white"]


# ---- reading


def test_read_tar_and_folder_of_tars(tmp_path):
    """A shard's drawings with name, words and style; a folder of shards is their sum."""
    write_art(tmp_path / "a.tar", "noto"), write_art(tmp_path / "b.tar", "fluent")
    one, both = read_art(tmp_path / "a.tar"), read_art(tmp_path)
    assert [a.name for a in one] == list(CONFIG.names) and {a.style for a in one} == {"noto"}
    assert one[0].words == ("pizza", "thing") and one[0].image.mode == "RGBA"
    assert np.array_equal(np.array(one[1].image), np.array(drawing(1)))
    assert Counter(a.style for a in both) == {"noto": 3, "fluent": 3}


def read_error(path) -> str:
    with pytest.raises(ValueError) as caught:
        read_art(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_read_art_errors(tmp_path):
    """One line that names the file: nothing there, an empty folder, a file that is no tar, half a
    pair missing, a shard cut off, a picture that is none.
    """
    assert "no such folder or .tar file" in read_error(tmp_path / "none")
    assert "no such folder or .tar file" in read_error(tmp_path / "none.tar")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no drawings" in read_error(empty)
    (empty / "cat.png").write_bytes(png(drawing(0)))
    assert "no such folder or .tar file" in read_error(empty / "cat.png")

    assert "needs both a .png and a .json" in read_error(
        write_tar(tmp_path / "half.tar", {"1.png": png(drawing(0))})
    )
    assert "no drawings" in read_error(write_tar(tmp_path / "nothing.tar", {}))
    whole = write_art(tmp_path / "whole.tar").read_bytes()
    for n in (0, 100, 700, 1500, len(whole) // 2):
        (tmp_path / "cut.tar").write_bytes(whole[:n])
        assert "cut.tar" in read_error(tmp_path / "cut.tar")
    good = json.dumps({"name": "x", "label": "x", "keywords": []}).encode()
    for files in ({"1.png": b"no", "1.json": good}, {"1.png": png(drawing(0)), "1.json": b"{"}):
        assert "bad.tar" in read_error(write_tar(tmp_path / "bad.tar", files))
    for odd in (
        {"keywords": None},
        {"keywords": [""]},
        {"keywords": 5},
        {"label": 7},
        {"name": ""},
    ):
        meta = json.dumps({"name": "x", "label": "x", "keywords": []} | odd).encode()
        files = {"1.png": png(drawing(0)), "1.json": meta}
        assert "1 has a broken picture" in read_error(write_tar(tmp_path / "bad.tar", files))
    assert "bad.tar" in read_error(
        write_tar(tmp_path / "bad.tar", {"1.png": png(drawing(0)), "1.json": b"{}"})
    )


def test_folders_and_names_without_a_dot_in_a_tar_are_skipped(tmp_path):
    """`tar cf art.tar art/` also stores the folder and whatever lies in it."""
    path = tmp_path / "art.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("./art")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        meta = json.dumps({"name": "x", "label": "x", "keywords": []}).encode()
        for name, data in {
            "./art/1.png": png(drawing(0)),
            "./art/1.json": meta,
            "./art/README": b"hello",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [(a.name, a.style) for a in read_art(path)] == [("x", None)]


# ---- the committed art


@pytest.fixture(scope="module")
def committed():
    art = read_art(ART)
    return art, *split_art(art, ART / "held_out.txt")


def test_held_out_pairs(committed):
    """weights/emoji/art: no held-out (name, style) is in the seen part, every name is seen in at
    least two styles, a tenth is held out, each listed pair exists, and nothing is lost.
    """
    art, seen, held_out = committed
    pairs = {tuple(line.split("\t")) for line in (ART / "held_out.txt").read_text().splitlines()}
    assert {(a.name, a.style) for a in held_out} == pairs
    assert not pairs & {(a.name, a.style) for a in seen}
    assert len(seen) + len(held_out) == len(art)
    assert abs(len(held_out) / len(art) - 0.10) < 0.01
    assert (
        set(Counter(a.style for a in seen))
        == set(STYLES)
        == set(Counter(a.style for a in held_out))
    )
    styles = Counter(a.name for a in seen)
    assert set(styles) == {a.name for a in art} and min(styles.values()) >= 2


def test_committed_art_is_whole(committed):
    """No (name, style) twice; each drawing 128 pixels long and not empty; every name drawn."""
    art, _, _ = committed
    assert len({(a.name, a.style) for a in art}) == len(art)
    assert {max(a.image.size) for a in art} == {128}
    assert all(a.image.getextrema()[3][1] > 0 for a in art)
    assert {a.name for a in art} >= set((ROOT / "weights/emoji/names.txt").read_text().splitlines())


def test_split_can_be_restricted_to_names(committed):
    """`names` keeps the drawings of these names on both sides, and no other."""
    art, seen, held_out = committed
    names = ["pizza", "red apple", "penguin"]
    seen_of, held_out_of = split_art(art, ART / "held_out.txt", names)
    assert [(a.name, a.style) for a in seen_of] == [
        (a.name, a.style) for a in seen if a.name in names
    ]
    assert [(a.name, a.style) for a in held_out_of] == [
        (a.name, a.style) for a in held_out if a.name in names
    ]
    assert {a.name for a in seen_of} == set(names)


# ---- latents and batches


def numbered_cache(m: int = 7, std: float = 0.1) -> Cache:
    """Latent i is the number i everywhere, plus noise."""
    mean = torch.arange(m).float()[:, None, None, None].expand(m, 4, 2, 2)
    art = [Art(f"name{i}", (f"name{i}",), "noto", drawing(0)) for i in range(m)]
    return Cache(mean, torch.full_like(mean, std), art, ["blue"] * m, 16)


def same(a, b) -> bool:
    return (
        torch.equal(a[0], b[0]) and a[1] == b[1] and torch.equal(a[3].get_state(), b[3].get_state())
    )


def test_cache_art():
    """`looks` compositions of each drawing by the seed, each encoded to its own q(z|x)."""
    art = [PIZZA, Art("rocket", ("rocket",), "fluent", drawing(2))]
    cache = cache_art(tiny_vae(), art, 32, 3, seed=5)
    assert [a.name for a in cache.art] == ["pizza"] * 3 + ["rocket"] * 3 and len(cache.color) == 6
    pixels, colors = compose(cache.art, 32, random.Random(5))
    mean, std = tiny_vae().moments(pixels)
    assert colors == cache.color
    torch.testing.assert_close(cache.mean, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(cache.std, std, rtol=0, atol=1e-5)
    assert len({x.sum().item() for x in cache.mean}) == 6
    again, other = (cache_art(tiny_vae(), art, 32, 3, seed=seed) for seed in (5, 6))
    assert torch.equal(cache.mean, again.mean) and not torch.equal(cache.mean, other.mean)


def test_batches_are_a_function_of_seed_and_step():
    """Two iterators agree on latents, captions and generator; another seed gives other batches."""
    one, two, other = (
        list(islice(art_batches(numbered_cache(), 3, seed), 6)) for seed in (0, 0, 1)
    )
    assert all(same(a, b) for a, b in zip(one, two))
    assert not any(same(a, b) for a, b in zip(one, other))
    assert not any(same(a, b) for a, b in zip(one, one[1:]))


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_start_is_skipping(batch):
    """start = k gives what is left after k batches, in mid-epoch and for a batch above the data."""
    whole = list(islice(art_batches(numbered_cache(), batch, 4), 8))
    for k in (1, 2, 5):
        assert all(
            same(a, b)
            for a, b in zip(islice(art_batches(numbered_cache(), batch, 4, start=k), 3), whole[k:])
        )


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_each_epoch_is_a_permutation(batch):
    """Of m = 7 latents, each run of seven is all of them in a new order, captions with them."""
    shown = []
    for z0, captions, size_ids, _ in islice(
        art_batches(numbered_cache(), batch, 0), -(-28 // batch)
    ):
        assert z0.shape == (batch, 4, 2, 2) and len(captions) == batch
        assert size_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * batch
        index = [round(x) for x in z0.mean(dim=(1, 2, 3)).tolist()]
        assert all(f"name{i}" in text or text == "" for i, text in zip(index, captions))
        shown += index
    epochs = [tuple(shown[i : i + 7]) for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) == 4


def test_latents_are_drawn_afresh():
    """z0 = mean + std noise: new each epoch, with the cache's mean and std in the long run."""
    cache = numbered_cache(m=2, std=0.25)
    drawn = torch.cat([z0 for z0, *_ in islice(art_batches(cache, 2, 0), 400)])
    zero = drawn[drawn.mean(dim=(1, 2, 3)) < 0.5]
    assert len(zero) == 400 and len(torch.unique(zero[:, 0, 0, 0])) == 400
    assert abs(zero.mean()) < 0.02 and abs(zero.std() - 0.25) < 0.01


@pytest.mark.parametrize("batch", [1, 2, 5, 20])
def test_batches_by_hand(batch):
    """Bit for bit what the first release drew, so its runs can be repeated: example i is entry i
    mod m of the permutation with seed 1000003 seed + i // m; Random("SEED STEP") seeds the noise's
    generator, then makes captions.
    """
    cache, m, seed = numbered_cache(), 7, 3
    for step, (z0, captions, _, generator) in enumerate(islice(art_batches(cache, batch, seed), 9)):
        rng = random.Random(f"{seed} {step}")
        expected = torch.Generator().manual_seed(rng.getrandbits(62))
        index = []
        for i in range(step * batch, (step + 1) * batch):
            order = torch.randperm(
                m, generator=torch.Generator().manual_seed(seed * 1_000_003 + i // m)
            )
            index.append(int(order[i % m]))
        noise = torch.randn(batch, 4, 2, 2, generator=expected)
        assert torch.equal(z0, cache.mean[index] + cache.std[index] * noise)
        assert captions == [caption(cache.art[i], "blue", rng)[0] for i in index]
        assert torch.equal(generator.get_state(), expected.get_state())


def test_ranks_share_the_batch_of_one():
    """Three ranks of batch 2 have, in turn, the rows of one of batch 6: latents, captions."""
    for start in (0, 4):
        ranks = zip(*(art_batches(numbered_cache(), 2, 0, start, rank, 3) for rank in range(3)))
        for whole, parts in islice(zip(art_batches(numbered_cache(), 6, 0, start), ranks), 5):
            assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
            assert whole[1] == [text for part in parts for text in part[1]]
            assert all(torch.equal(whole[3].get_state(), part[3].get_state()) for part in parts)
