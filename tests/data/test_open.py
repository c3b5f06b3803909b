"""What is behind --data is found by looking, told apart by its content, and never half ignored."""

from pathlib import Path

import pytest
from PIL import Image
from tiny import write_art, write_tar

from minilcm.data.open import find_data


def write_pictures(folder, captions: list[str]):
    folder.mkdir(parents=True)
    for i, caption in enumerate(captions):
        Image.new("RGB", (16, 16), "red").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def test_a_tar_does_not_hide_pictures(tmp_path):
    """A backup beside the pictures: which of the two is meant, only its owner knows."""
    write_pictures(tmp_path / "mixed", ["a cat", "a dog"])
    assert len(find_data(tmp_path / "mixed").pictures) == 2
    write_tar(tmp_path / "mixed/backup.tar", {})
    with pytest.raises(ValueError, match=r"mixed: has shards and pictures, backup.tar and \d.png;"):
        find_data(tmp_path / "mixed")
    assert find_data(tmp_path / "mixed/backup.tar").shards == [tmp_path / "mixed/backup.tar"]
    write_tar(tmp_path / "0.tar", {})
    (tmp_path / "._0.png").touch()  # a leftover of macOS
    assert find_data(tmp_path).shards == [tmp_path / "0.tar"]


def test_identity_is_that_of_the_content(tmp_path, monkeypatch):
    """The same for a copy elsewhere, and for a relative path; another for another caption, name or
    size of a file.
    """
    write_pictures(tmp_path / "a", ["a cat", "a dog"])
    write_pictures(tmp_path / "b/c", ["a cat", "a dog"])
    monkeypatch.chdir(tmp_path)
    here = find_data(tmp_path / "a").identity()
    assert here == find_data(tmp_path / "b/c").identity() == find_data(Path("a")).identity()
    (tmp_path / "b/c/1.txt").write_text("a pig")
    assert find_data(tmp_path / "b/c").identity() != here
    (tmp_path / "a/1.png").rename(tmp_path / "a/2.png")
    (tmp_path / "a/1.txt").rename(tmp_path / "a/2.txt")
    assert find_data(tmp_path / "a").identity() != here

    for name in ("s", "t"):
        (tmp_path / name).mkdir()
        write_art(tmp_path / name / "noto.tar")
    art = find_data(tmp_path / "s").identity()
    assert art == find_data(tmp_path / "t/noto.tar").identity()
    (tmp_path / "t/held_out.txt").write_text("pizza\tnoto\n")
    assert find_data(tmp_path / "t").identity() != art
