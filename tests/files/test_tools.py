"""python -m minilcm: the algebra on files, what stays byte for byte, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_tau, tiny_unet, write_model

from minilcm.__main__ import main, parse
from minilcm.files.checkpoint import load_model
from minilcm.files.lora_file import read_tau, write_tau
from minilcm.files.safetensors_file import read_header
from minilcm.lora import ATTENTION
from minilcm.merge import combine, delta, distance, merge_into, reduce_rank

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint and two LoRAs for it, ranks mixed, lora_alpha != rank; b on attention only."""
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "model.safetensors")
    write_tau(
        folder / "a.safetensors", random_tau(tiny_unet(), 1, 4, 3.0), {"w": "3"}, torch.float32
    )
    write_tau(
        folder / "b.safetensors", random_tau(tiny_unet(), 2, 3, 1.0, ATTENTION), {}, torch.float32
    )
    return folder


def run(*argv) -> None:
    main(parse([str(x) for x in argv]))


def far(a, b) -> float:
    """Largest relative distance of two taus' deltas."""
    assert a.keys() == b.keys()
    return max(((delta(*a[p]) - delta(*b[p])).norm() / delta(*b[p]).norm()).item() for p in b)


def test_combine_is_the_sum_of_deltas(files, tmp_path):
    """combine a:0.8 b:-0.5 in float32 is 0.8 dW_a - 0.5 dW_b; averaging up and down is not."""
    out = tmp_path / "mix.safetensors"
    run(
        "combine",
        f"{files}/a.safetensors:0.8",
        f"{files}/b.safetensors:-0.5",
        "-o",
        out,
        "--dtype",
        "float32",
    )
    a, b, mix = (read_tau(p) for p in (files / "a.safetensors", files / "b.safetensors", out))
    for path, parts in mix.items():
        expected = 0.8 * delta(*a[path]) - (0.5 * delta(*b[path]) if path in b else 0)
        torch.testing.assert_close(delta(*parts), expected, rtol=1e-5, atol=1e-6)
    path = next(iter(b))
    up = 0.8 * a[path][0] @ a[path][1] * 3 / 4
    assert (delta(*mix[path]) - up).norm() > 0.1 * up.norm()


def test_merge_then_unmerge(files, tmp_path):
    """merge changes what merge_into does, nothing else; unmerge restores to float16 rounding."""
    model = files / "model.safetensors"
    merged = tmp_path / "m.safetensors"
    back = tmp_path / "u.safetensors"
    run("merge", model, f"{files}/a.safetensors:0.7", files / "b.safetensors", "-o", merged)
    before = load_file(model)
    after = load_file(merged)
    tau_a = read_tau(files / "a.safetensors")
    tau_b = read_tau(files / "b.safetensors")
    keys = {f"{UNET}{path}.weight" for path in tau_a}
    assert {
        k for k in before if not torch.equal(before[k], after[k])
    } == keys and before.keys() == after.keys()
    unet = load_model(model)[0]
    merge_into(unet, combine([tau_a, tau_b], [0.7, 1.0]))
    assert all(
        torch.equal(after[f"{UNET}{p}.weight"], unet.get_submodule(p).weight.half()) for p in tau_a
    )
    assert read_header(merged)[1]["minilcm.merged"] == "a.safetensors:0.7 b.safetensors:1"
    run("unmerge", merged, f"{files}/a.safetensors:0.7", files / "b.safetensors", "-o", back)
    restored = load_file(back)
    for key in before:
        torch.testing.assert_close(restored[key], before[key], rtol=2e-3, atol=2e-3)


def test_blocks_of_rows_change_nothing(files, tmp_path, monkeypatch):
    """A weight merged in many blocks of rows is what merge_into makes of it whole."""
    monkeypatch.setattr("minilcm.files.tools.BLOCK", 700)
    run(
        "merge",
        files / "model.safetensors",
        f"{files}/a.safetensors:0.7",
        "-o",
        tmp_path / "m.safetensors",
    )
    after, unet = load_file(tmp_path / "m.safetensors"), load_model(files / "model.safetensors")[0]
    tau = read_tau(files / "a.safetensors")
    assert max(unet.get_submodule(path).weight.numel() for path in tau) > 10 * 700
    merge_into(unet, tau, 0.7)
    for path in tau:
        torch.testing.assert_close(
            after[f"{UNET}{path}.weight"], unet.get_submodule(path).weight.half()
        )


def test_untouched_bytes(files, tmp_path):
    """A merged file keeps other tensors' bytes, dtypes, shapes, order; odd dtypes pass through."""
    tensors = load_file(files / "model.safetensors") | {
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)
    }
    save_file(tensors, tmp_path / "odd.safetensors", read_header(files / "model.safetensors")[1])
    run(
        "merge",
        tmp_path / "odd.safetensors",
        files / "b.safetensors",
        "-o",
        tmp_path / "out.safetensors",
    )
    a, _ = read_header(tmp_path / "odd.safetensors")
    b, _ = read_header(tmp_path / "out.safetensors")
    assert a == b
    one, two = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("odd", "out"))
    for key, entry in a.items():
        x, y = (
            data[len(data) - max(e.end for e in a.values()) :][entry.begin : entry.end]
            for data in (one, two)
        )
        assert (x == y) == (
            key.removeprefix(UNET).removesuffix(".weight") not in read_tau(files / "b.safetensors")
        )


def test_text_encoder_weights_are_merged_too(files, tmp_path):
    """te1. modules land on CLIP-L's own keys in the file."""
    tau = {"te1.encoder.layers.0.self_attn.v_proj": (torch.ones(32, 1), torch.ones(1, 32), 0.5)}
    write_tau(tmp_path / "te.safetensors", tau, {})
    run(
        "merge",
        files / "model.safetensors",
        tmp_path / "te.safetensors",
        "-o",
        tmp_path / "m.safetensors",
    )
    before, after = load_file(files / "model.safetensors"), load_file(tmp_path / "m.safetensors")
    (key,) = (k for k in before if not torch.equal(before[k], after[k]))
    assert key == "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.v_proj.weight"
    torch.testing.assert_close(after[key], (before[key].float() + 0.5).half())


def test_extract_recovers_the_delta(files, tmp_path):
    """extract(base, merge(base, a)) at a's rank is a's delta, in float32 files, same modules."""
    base, merged, out = (tmp_path / f"{name}.safetensors" for name in ("base", "merged", "out"))
    model = files / "model.safetensors"
    tensors, metadata = load_file(model), read_header(model)[1]
    save_file({k: v.float() for k, v in tensors.items()}, base, metadata)
    run("merge", base, files / "a.safetensors", "-o", merged)
    run("extract", base, merged, "--rank", "4", "-o", out, "--dtype", "float32")
    assert far(read_tau(out), read_tau(files / "a.safetensors")) < 1e-4


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_reduce_rank_is_the_best(files, rank):
    """The residual is Eckart-Young's sqrt(sum_{i>r} s_i^2), and the distance measured directly."""
    tau = read_tau(files / "a.safetensors")
    small, residual = reduce_rank(tau, rank)
    for path, parts in tau.items():
        whole = delta(*parts).flatten(1).double()
        s = torch.linalg.svdvals(whole)
        expected = (s[rank:].square().sum() / s.square().sum()).sqrt().item()
        direct = ((delta(*small[path]).flatten(1).double() - whole).norm() / whole.norm()).item()
        assert residual[path] == pytest.approx(expected, abs=1e-5) and direct == pytest.approx(
            expected, abs=1e-5
        )
        assert small[path][1].shape[0] == rank and small[path][0].shape[1] == rank


def test_energy_keeps_just_enough(files):
    """energy 0.9: each module keeps at least 0.9 of sum s_i^2, and one rank less would not."""
    tau = read_tau(files / "a.safetensors")
    small, residual = reduce_rank(tau, energy=0.9)
    for path, parts in tau.items():
        s = torch.linalg.svdvals(delta(*parts).flatten(1).double()).square()
        r = small[path][1].shape[0]
        assert s[:r].sum() >= 0.9 * s.sum() * (1 - 1e-5)
        assert r == 1 or s[: r - 1].sum() < 0.9 * s.sum()
        assert residual[path] <= 0.1**0.5 + 1e-4


def test_resize_file(files, tmp_path, capsys):
    """The printed residual is the written file's distance; --against measures another LoRA."""
    out = tmp_path / "small.safetensors"
    a, b = files / "a.safetensors", files / "b.safetensors"
    run("resize", a, "--rank", 2, "-o", out, "--dtype", "float32", "--against", b)
    printed = capsys.readouterr().out
    direct = distance(read_tau(out), read_tau(a))
    assert f"total ||dW - dW'|| / ||dW|| = {direct:.4f}" in printed and "rank 4 -> 2" in printed
    assert f"{distance(read_tau(b), read_tau(a)):.4f}" in printed


def test_info_and_diff(files, capsys):
    """What the files are, and how far apart."""
    run("info", files / "a.safetensors", files / "model.safetensors")
    out = capsys.readouterr().out
    assert "rank       4 (" in out and "lora_alpha 3 (" in out and "w: 3" in out and "||dW||" in out
    assert (
        "LoRA for the emoji model: UNet" in out
        and "checkpoint: a model by minilcm, native 32x32" in out
    )
    assert "VAE " in out and "CLIP-L " in out and "bigG" not in out
    run("diff", files / "a.safetensors", files / "b.safetensors")
    out = capsys.readouterr().out
    assert "keys only in" in out and "shape" in out


def test_diff_of_loras_is_that_of_their_deltas(files, capsys):
    """B and A in another basis, by SVD, add the same; a LoRA and twice it differ by half."""
    a = files / "a.safetensors"
    same = files / "same.safetensors"
    twice = files / "twice.safetensors"
    rank = max(down.shape[0] for _, down, _ in read_tau(a).values())
    run("resize", a, "--rank", rank, "-o", same, "--dtype", "float32")
    run("combine", f"{a}:2", "-o", twice, "--dtype", "float32")
    far = {}
    for b in (same, twice):
        capsys.readouterr()
        run("diff", a, b)
        far[b] = float(capsys.readouterr().out.split()[-1])
    assert far[same] < 1e-5 and far[twice] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            "merge {f}/model.safetensors {f}/a.safetensors -o {f}/model.safetensors",
            "is one of the inputs",
        ),
        (
            "merge {f}/model.safetensors {f}/a.safetensors -o {f}/a.safetensors --force",
            "is one of the inputs",
        ),
        (
            "combine {f}/a.safetensors -o {f}/b.safetensors",
            "b.safetensors: exists; give another -o, or --force",
        ),
        ("combine {f}/a.safetensors:x -o {t}/o", "'x' is not a number"),
        ("merge {f}/a.safetensors {f}/a.safetensors -o {t}/o", "this is a LoRA file"),
        ("merge {f}/model.safetensors {f}/model.safetensors -o {t}/o", "this is a checkpoint"),
        ("merge {f}/no.safetensors {f}/a.safetensors -o {t}/o", "no.safetensors: no such file"),
        ("resize {f}/a.safetensors --rank 0 -o {t}/o", "--rank is 0; give 1 or more"),
        ("resize {f}/a.safetensors --energy 1.5 -o {t}/o", "--energy is 1.5"),
        ("resize {f}/a.safetensors -o {t}/o", "one of the arguments --rank --energy is required"),
        ("extract {f}/model.safetensors {f}/model.safetensors --rank 2 -o {t}/o", "do not differ"),
        ("unknown", "invalid choice: 'unknown'"),
    ],
)
def test_mistakes_give_one_line_and_no_file(files, tmp_path, argv, message):
    """R3, R19 and wrong flags: one line, nothing written."""
    before = {p: p.read_bytes() for p in files.iterdir()}
    with pytest.raises((SystemExit, ValueError)) as caught:
        run(*(x.format(f=files, t=tmp_path) for x in argv.split()))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [] and before == {p: p.read_bytes() for p in files.iterdir()}
