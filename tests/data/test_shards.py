"""Tar shards as a stream: each sample once an epoch, a resumed stream goes on, damage is named."""

import gzip
import json
import random
from collections import Counter
from itertools import islice

import pytest
import torch
from PIL import Image
from tiny import png, write_tar

import minilcm.data.shards
from minilcm.data.shards import shuffled, stream, stream_batches

TARGETS = [(8, 8)]


def picture(i: int) -> bytes:
    """A picture that tells its number: grey level i."""
    return png(Image.new("L", (8 + i % 3, 8), i))


def write_shards(folder, shards: int = 5, samples: int = 7) -> list:
    """Shard s holds the samples 7 s to 7 s + 6, every other caption in a .json."""
    paths = []
    for s in range(shards):
        files = {}
        for i in range(s * samples, (s + 1) * samples):
            caption = (
                {"txt": f"number {i}\n".encode()}
                if i % 2
                else {"json": json.dumps({"caption": f"number {i}"}).encode()}
            )
            files |= {f"set/{i:05}.png": picture(i)} | {
                f"set/{i:05}.{k}": v for k, v in caption.items()
            }
        paths.append(write_tar(folder / f"{s}.tar", files))
    return paths


def numbers(samples) -> list[int]:
    """The numbers of the pictures, after checking that captions and ids are theirs."""
    out = []
    for x in samples:
        i = round((x.pixels.mean().item() + 1) * 127.5)
        assert (
            x.caption == f"number {i}"
            and x.size_ids.tolist()[:2] == [8, 8 + i % 3]
            and x.pixels.shape == (3, 8, 8)
        )
        out.append(i)
    return out


@pytest.mark.parametrize("buffer", [0, 4, 1000])
def test_an_epoch_is_a_permutation(tmp_path, buffer):
    """35 samples once an epoch each, in an order that epoch and seed change and repeat."""
    shards = write_shards(tmp_path)
    drawn = [
        numbers(islice(stream(shards, TARGETS, seed=s, buffer=buffer), 105)) for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    epochs = [tuple(drawn[0][i : i + 35]) for i in (0, 35, 70)]
    assert all(sorted(epoch) == list(range(35)) for epoch in epochs) and len(set(epochs)) == 3


def test_captions_of_all_kinds(tmp_path, capsys):
    """.txt, .json with caption or text, .txt first; names up to the first dot; strays ignored."""
    files = {
        "a.jpg": picture(0),
        "a.txt": b"one\n two",
        "b.json": b'{"text": "b"}',
        "b.png": picture(1),
    }
    files |= {
        "x/c.txt": b"c",
        "x/c.PNG": picture(2),
        "x/c.json": b'{"caption": "no"}',
        "x/c.seg.png": b"?",
        "d.jfif": picture(3),
        "d.txt": "\ufeffin UTF-16".encode("utf-16-le"),
        "d.cls": b"7",
    }
    shard = write_tar(tmp_path / "a.tar", files)
    captions = sorted(x.caption for x in islice(stream([shard], TARGETS), 4))
    assert captions == ["b", "c", "in UTF-16", "one two"]
    assert not capsys.readouterr().out


def test_two_ranks_with_two_workers_see_each_sample_once(tmp_path):
    """Four readers of five shards: together one epoch of each is every sample exactly once."""
    shards = write_shards(tmp_path)
    sizes = [14, 7, 7, 7]
    seen = [
        numbers(islice(stream(shards, TARGETS, rank, 2, worker, 2), sizes[2 * rank + worker]))
        for rank in range(2)
        for worker in range(2)
    ]
    assert Counter(i for part in seen for i in part) == Counter(range(35))
    assert [sorted(set(x // 7 for x in part)) for part in seen] == [[0, 4], [1], [2], [3]]


class Means(torch.nn.Module):
    """In place of a VAE: a picture's latent is its mean colour, four times, with std 1 / 8."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def moments(self, pixels):
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True).expand(-1, 4, 1, 1)
        return mean, torch.full_like(mean, 1 / 8)


def test_batches_of_ranks_and_workers(tmp_path):
    """Two ranks with two reading processes each: each sample once in the epoch that all share, the
    workers in turns; a run goes on from any step with the positions of then, noise and all; the
    ranks draw one batch of noise together.
    """
    shards, seen, noise = write_shards(tmp_path, 4, 6), [], []
    for rank in range(2):

        def take(n, start, positions):
            made = stream_batches(Means(), shards, 8, 3, 5, start, rank, 2, positions)
            return [(*next(made), list(positions)) for _ in range(n)]

        got = take(6, 0, [0, 0])
        z0, captions, size_ids, _, _ = got[0]
        assert z0.shape == (3, 4, 1, 1) and len(captions) == 3 and size_ids.shape == (3, 6)
        for worker in range(2):
            alone = list(islice(stream(shards, [(8, 8)], rank, 2, worker, 2, seed=5), 9))
            assert [c for batch in got[worker::2] for c in batch[1]] == [x.caption for x in alone]
        means = torch.stack(
            [x.pixels.mean() for x in islice(stream(shards, [(8, 8)], rank, 2, 0, 2, seed=5), 3)]
        )
        noise.append((z0 - means[:, None, None, None]) * 8)
        seen += [c for batch in got[:4] for c in batch[1]]
        for start in (1, 2, 5):
            again = take(6 - start, start, list(got[start - 1][4]))
            for (z0, captions, size_ids, generator, at), (z, c, ids, g, now) in zip(
                got[start:], again, strict=True
            ):
                assert (
                    captions == c
                    and torch.equal(z0, z)
                    and torch.equal(size_ids, ids)
                    and at == now
                )
                assert torch.equal(generator.get_state(), g.get_state())
    assert Counter(seen) == Counter(f"number {i}" for i in range(24))
    assert noise[0].std() > 0.5 and not torch.allclose(noise[0], noise[1])


@pytest.mark.parametrize("buffer", [0, 4, 1000])
def test_skip_is_the_position(tmp_path, buffer, monkeypatch):
    """Going on after any sample gives the samples that came after it, cuts and all, also epochs
    later; what is skipped is not decoded, and whole epochs of it are not even read.
    """
    shards = write_shards(tmp_path, 2, 5)
    whole = list(islice(stream(shards, TARGETS, seed=1, buffer=buffer), 60))
    assert [x.position for x in whole] == list(range(1, 61))
    for n in (1, 4, 9, 10, 11, 25, 50):
        for a, b in zip(
            islice(stream(shards, TARGETS, seed=1, skip=n, buffer=buffer), 10), whole[n:]
        ):
            assert (
                torch.equal(a.pixels, b.pixels)
                and a[1] == b[1]
                and torch.equal(a[2], b[2])
                and a[3] == b[3]
            )
    decoded, read = [], []
    decode = minilcm.data.shards.open_picture
    members = minilcm.data.shards.members
    monkeypatch.setattr(
        minilcm.data.shards, "open_picture", lambda data: decoded.append(1) or decode(data)
    )
    monkeypatch.setattr(
        minilcm.data.shards, "members", lambda shard: read.append(1) or members(shard)
    )
    assert (
        next(stream(shards, TARGETS, seed=1, skip=1_000_003, buffer=buffer)).position == 1_000_004
    )
    assert len(decoded) == 1 and len(read) <= 4


def test_shuffle_buffer():
    """Each once; with a buffer of n the k-th to come out is one of the first k + n."""
    out = list(shuffled(iter(range(1000)), 20, random.Random(0)))
    assert sorted(out) == list(range(1000)) and all(x <= k + 20 for k, x in enumerate(out))
    assert len({x - k for k, x in enumerate(out)}) > 50  # any of those held, not always the same
    assert list(shuffled(iter(range(5)), 0, random.Random(0))) == list(range(5))


def test_damaged_samples_are_named_and_skipped(tmp_path, capsys):
    """No caption, no picture, broken JSON, JSON without a caption, a caption not in UTF-8, a broken
    picture: one line each with shard and name; the good one comes, and a resumed stream finds its
    place all the same.
    """
    files = {
        "0.png": picture(0),
        "1.txt": b"x",
        "2.png": picture(2),
        "2.json": b"{",
        "3.png": picture(3),
    }
    files |= {
        "3.json": b'{"label": "x"}',
        "4.png": picture(4),
        "4.txt": b"\xff",
        "5.png": b"no",
        "5.txt": b"x",
    }
    files |= {
        "6.png": picture(6),
        "6.txt": b"number 6",
        "7.png": picture(7),
        "7.json": b"[]",
        "8.png": picture(8),
    }
    files |= {"a.png": picture(10), "a.json": rb'{"caption": "half a letter: \ud83d"}'}
    files |= {"8.json": b'{"caption": 8}', "9.png": picture(9), "9.txt": "x".encode("utf-16-le")}
    shard = write_tar(tmp_path / "bad.tar", files)
    samples = list(islice(stream([shard], TARGETS), 3))
    assert numbers(samples) == [6, 6, 6]
    lines = capsys.readouterr().out.splitlines()
    for name in "012345789a":
        assert any(line.startswith(f"{shard}: {name} skipped, ") for line in lines)
    assert not any(f": {6} skipped" in line for line in lines)
    again = next(stream([shard], TARGETS, skip=samples[1].position))
    assert again.position == samples[2].position


@pytest.mark.parametrize(
    "kind", ["cut in data", "cut in header", "garbage", "empty", "header overwritten", "gzip"]
)
def test_damaged_shards_are_named_and_skipped(tmp_path, capsys, kind):
    """The samples before the damage and those of other shards come; one line names the shard."""
    good, bad = write_shards(tmp_path, 2, 4)
    data, third = bad.read_bytes(), 2 * 2048  # a sample is two headers and two blocks of 512 bytes
    data = {
        "cut in data": data[: third + 520],
        "cut in header": data[: third + 100],
        "garbage": b"x" * 5000,
        "empty": b"",
        "header overwritten": data[:third] + b"\1" * 512 + data[third + 512 :],
        "gzip": gzip.compress(data),
    }[kind]
    bad.write_bytes(data)
    whole = 4 if kind in ("garbage", "empty", "gzip") else 6
    got = numbers(islice(stream([good, bad], TARGETS, buffer=0), 20))
    assert sorted(got[:whole]) == list(range(whole))
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(
        line.startswith(f"{bad}: damaged, the rest is skipped (") for line in lines
    )


def test_errors(tmp_path):
    """A missing shard, fewer shards than readers, and nothing good in any: one line; the last one
    ends the stream instead of reading for ever.
    """
    shards = write_shards(tmp_path, 2, 2)
    nothing = write_tar(tmp_path / "nothing.tar", {"1.png": b"no", "1.txt": b"x"})
    empty = write_tar(tmp_path / "empty.tar", {})
    for message, arguments in {
        f"{tmp_path / 'no.tar'}: no such file": ([tmp_path / "no.tar"], TARGETS),
        "2 shards for 4 readers; give each reader one": (shards, TARGETS, 0, 2, 0, 2),
        f"{nothing} and 0 more: no sample can be read": ([nothing], TARGETS),
        f"{empty} and 0 more: no sample can be read": ([empty], TARGETS, 0, 1, 0, 1, 0, 5),
    }.items():
        with pytest.raises(ValueError) as caught:
            next(stream(*arguments))
        assert message in str(caught.value) and "\n" not in str(caught.value)
    for message, world, workers, files in (
        ("2 shards for 4 readers", 2, 2, shards),
        (f"{tmp_path / 'no.tar'}: no such file", 1, 1, [tmp_path / "no.tar"]),
        (f"{nothing} and 0 more: no sample can be read", 1, 1, [nothing]),
    ):
        with pytest.raises(ValueError) as caught:  # from a reading process, too
            next(stream_batches(Means(), files, 8, 1, 0, 0, 0, world, [0] * workers))
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_captions_are_dropped(tmp_path):
    """A share of them is "", drawn by seed and step: the same again, and none without it."""
    shards = write_shards(tmp_path, 1, 6)

    def captions(drop, rank=0, world=1):
        made = stream_batches(Means(), shards * world, 8, 2, 5, 0, rank, world, [0], drop)
        return [c for _, (_, batch, _, _) in zip(range(30), made) for c in batch]

    kept, some = captions(0.0), captions(0.3)
    assert "" not in kept and some == captions(0.3)
    assert 8 <= some.count("") <= 30 and all(a == b for a, b in zip(some, kept) if a)
