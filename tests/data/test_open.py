"""What is behind --data is found by looking, told apart by its content, and never half ignored."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import CONFIG, TWO_TOWERS, tiny_text, tiny_unet, tiny_vae, write_art, write_tar

from minilcm.data import latents
from minilcm.data.emoji import is_art
from minilcm.data.open import Reading, find_data, open_data
from minilcm.data.pictures import open_picture
from minilcm.files.checkpoint import Model
from minilcm.generate import generate
from minilcm.schedule import make_schedule
from minilcm.solver import guided_eps, sample_ddim, trailing_grid


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


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_with_the_line_ends_of_any_system(tmp_path, end):
    (tmp_path / "P.TXT").write_bytes(f"a cat{end}{end}a dog{end}".encode())
    assert find_data(tmp_path / "P.TXT").prompts == ["a cat", "a dog"]


def test_what_stands_in_for_a_file_is_named(tmp_path):
    """A clone without Git LFS has pointers in place of its files; a pointer is no prompt."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 42\n"
    write_pictures(tmp_path / "captions", ["a cat"])
    readers = {"a.txt": find_data, "a.tar": is_art, "captions/0.txt": lambda x: find_data(x.parent)}
    for name, read in readers.items():
        (tmp_path / name).write_text(pointer)
        with pytest.raises(ValueError, match=rf"{name}: .*Git LFS pointer.*; run: git lfs pull"):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="not a readable picture, but a Git LFS pointer to one; "):
        open_picture(pointer.encode())


def test_identity_is_that_of_the_content(tmp_path, monkeypatch):
    """The same for a copy elsewhere, and for a relative path; another for another caption, name or
    size of a file, or another beginning of a shard.
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
    changed = bytearray((tmp_path / "t/noto.tar").read_bytes())
    changed[0] ^= 1  # of the first member's name
    (tmp_path / "t/noto.tar").write_bytes(changed)
    assert find_data(tmp_path / "t/noto.tar").identity() != art
    changed[0] ^= 1
    (tmp_path / "t/noto.tar").write_bytes(changed)
    (tmp_path / "t/held_out.txt").write_text("pizza\tnoto\n")
    assert find_data(tmp_path / "t").identity() != art


@pytest.mark.parametrize("config", [CONFIG, TWO_TOWERS])
def test_prompts_are_drawn_by_the_model(tmp_path, monkeypatch, config):
    """z0 is the end of the model's own 25 guided DDIM steps, from a seed of its own for each prompt
    and look. What is drawn is kept: a run that stopped goes on, and a new prompt costs only itself.
    """
    model = Model(tiny_unet(cfg=config.unet), tiny_vae(), tiny_text(cfg=config.text), config)
    drawn, stop = [], 3

    def draw(eps_fn, seeds, *rest, **how):
        if len(drawn) == stop:
            raise KeyboardInterrupt
        drawn.extend(seeds)
        return generate(eps_fn, seeds, *rest, **how)

    def batch(*prompts):
        (tmp_path / "prompts.txt").write_text("\n\r\n".join(prompts))
        how = Reading(config.size, 2 * len(prompts), 2, 1, 0, 0.0, "cpu")
        source = find_data(tmp_path / "prompts.txt")
        return next(open_data(source, model, "hash", tmp_path / "cache", how).batches(0))

    monkeypatch.setattr(latents, "generate", draw)
    monkeypatch.setattr(latents, "forward_dtype", lambda device: torch.float32)
    with pytest.raises(KeyboardInterrupt):
        batch(" a  cat", "a dog")
    stop = 4
    z0, captions, size_ids, _ = batch(" a  cat", "a dog")
    assert sorted(captions) == ["a cat", "a cat", "a dog", "a dog"] and len(set(drawn)) == 4
    side, size = config.size // model.vae.factor, (config.size, config.size)
    assert size_ids.tolist() == [[*size, 0, 0, *size]] * 4
    cond, null_cond = model.text.encode(["a dog"], size), model.text.null_cond(1, size)
    eps_fn = guided_eps(model.unet, cond, null_cond, config.guidance - 1)
    z_T = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(drawn[2]))
    expected = sample_ddim(eps_fn, z_T, make_schedule(), trailing_grid(25))[0]
    same = [caption for x, caption in zip(z0, captions) if torch.equal(x, expected)]
    assert same == ["a dog"] and expected.isfinite().all()
    stop = 6
    batch("a dog", "a cow", "a cat")
    assert len(set(drawn)) == 6
