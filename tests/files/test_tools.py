"""python -m minilcm: the algebra on files, what stays byte for byte, and what is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TWO_TOWERS, random_tau, tiny_unet, write_model

from minilcm.__main__ import main, parse
from minilcm.files.checkpoint import load_model, places
from minilcm.files.lora_file import lcm_scale, read_recipe, read_tau, write_tau
from minilcm.files.safetensors_file import read_header, read_tensors, sha256
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
    assert "keys only in" in out and out.count("\n") <= 3 and "the LoRAs differ by" in out
    tensors, metadata = read_tensors(files / "model.safetensors")
    key = f"{UNET}out.2.weight"
    later = f"{UNET}time_embed.0.weight"
    changed = {key: 2 * tensors[key], later: 1.5 * tensors[later]}
    save_file(tensors | changed, files / "other.safetensors", metadata)
    run("diff", files / "other.safetensors", files / "model.safetensors")
    *_, line, last, total = capsys.readouterr().out.splitlines()
    assert line.startswith("  1.000e+00 of the norm, at most") and line.endswith(key)
    assert last.startswith("  5.000e-01 of the norm, at most") and last.endswith(later)
    equal = f"{len(tensors) - 2} of {len(tensors)} common tensors are equal; furthest apart: "
    assert total == f"{equal}1.000e+00 of the norm, {key}"
    changed[key] = math.nan * tensors[key]
    save_file(tensors | changed, files / "other.safetensors", metadata)
    run("diff", files / "other.safetensors", files / "model.safetensors")
    assert capsys.readouterr().out.endswith(f"{equal}inf of the norm, {key}\n")


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


def test_extract_writes_what_can_be_read(tmp_path, capsys):
    """Every tensor of UNet, VAE and both text towers changed, norms and embeddings too: what a LoRA
    can change is extracted, all of it, read back and right; the rest is counted.
    """
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    tensors, metadata = load_file(write_model(base, config=TWO_TOWERS)), read_header(base)[1]
    g = torch.Generator().manual_seed(0)
    changed = {k: v + torch.randn(v.shape, generator=g).half() / 16 for k, v in tensors.items()}
    save_file(changed, tuned, metadata)
    run(
        "extract", base, tuned, "--rank", 64, "-o", tmp_path / "e.safetensors", "--dtype", "float32"
    )
    modules = places(read_header(base)[0])
    # which the emoji model, whose names these are, has not
    modules = {p: place for p, place in modules.items() if not p.startswith("label_emb")}
    tau = read_tau(tmp_path / "e.safetensors")
    assert tau.keys() == modules.keys()
    for path, place in modules.items():
        before, after = (place.view(x[place.key].float()) for x in (tensors, changed))
        if min(after.flatten(1).shape) <= 64:  # the rank is enough for all of it
            torch.testing.assert_close(
                delta(*tau[path]).flatten(), (after - before).flatten(), rtol=1e-3, atol=1e-3
            )
    rest = len(tensors.keys() - {place.key for place in modules.values()})
    assert f"{rest} tensors differ that a LoRA cannot change; left out" in capsys.readouterr().out


HEADS = (
    {"modelspec.license": "mit", "modelspec.trigger_phrase": "in style a", "ss_sd_model_name": "x"},
    {
        "modelspec.license": "cc-by",
        "ss_tag_frequency": '{"b": {"cat": 1}}',
        "ss_sd_model_name": "x",
    },
)


def test_metadata_is_kept(files, tmp_path, capsys):
    """Licence, trigger words and what training recorded stay where they are still true; ranks and
    hashes are new; what two LoRAs do not share is counted.
    """
    stale = {"sshs_model_hash": "0", "ss_network_dim": "9", "modelspec.hash_sha256": "0"}
    for name, head in zip("ab", HEADS):
        tensors, own = load_file(files / f"{name}.safetensors"), {"ss_epoch": name}
        save_file(tensors, tmp_path / f"{name}.safetensors", head | stale | own)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    run("resize", a, "--rank", 2, "-o", tmp_path / "small.safetensors")
    kept = read_header(tmp_path / "small.safetensors")[1]
    assert kept.items() > (HEADS[0] | {"ss_epoch": "a", "ss_network_dim": "2"}).items()
    assert not {"sshs_model_hash", "modelspec.hash_sha256"} & kept.keys()
    capsys.readouterr()
    run("combine", a, b, "-o", tmp_path / "mix.safetensors")
    kept = read_header(tmp_path / "mix.safetensors")[1]
    assert kept["modelspec.license"] == "mit; cc-by" and kept["ss_sd_model_name"] == "x"
    assert kept["modelspec.trigger_phrase"] == "in style a"
    assert kept["ss_tag_frequency"] == HEADS[1]["ss_tag_frequency"] and "ss_epoch" not in kept
    line = "1 entries of metadata differ and are left out, first: 'ss_epoch'\n"
    assert capsys.readouterr().out.startswith(line)
    run("merge", files / "model.safetensors", a, "-o", tmp_path / "merged.safetensors")
    kept = read_header(tmp_path / "merged.safetensors")[1]
    assert kept["modelspec.license"] == "mit" and "minilcm.config" in kept


def test_merge_leaves_its_recipe(files, tmp_path):
    """Which files, by how much and their hashes, over several merges; what is taken away again is
    gone from it.
    """
    lcm, style = tmp_path / "lcm.safetensors", files / "b.safetensors"
    tau = read_tau(files / "a.safetensors")
    write_tau(lcm, tau, {"objective": "lcm", "w": "7.5", "seed": "0"})
    one, two, back = (tmp_path / f"{x}.safetensors" for x in ("one", "two", "back"))
    run("merge", files / "model.safetensors", lcm, "-o", one)
    run("merge", one, f"{style}:0.5", "-o", two)
    recipe = json.loads(read_header(two)[1]["minilcm.loras"])
    known = {"scale": 1.0, "objective": "lcm", "w": "7.5"}
    assert recipe == [
        {"file": "lcm.safetensors", "sha256": sha256(lcm)[:10]} | known,
        {"file": "b.safetensors", "sha256": sha256(style)[:10], "scale": 0.5},
    ]
    assert read_header(two)[1]["minilcm.merged"] == "lcm.safetensors:1 b.safetensors:0.5"
    run("unmerge", two, lcm, f"{style}:0.5", "-o", back)
    assert read_header(back)[1] == read_header(files / "model.safetensors")[1]
    for text in ("{", "[1]", '[{"sha256": "0", "scale": 1}]', "[" * 50_000):
        metadata = read_header(files / "model.safetensors")[1] | {"minilcm.loras": text}
        save_file(load_file(files / "model.safetensors"), one, metadata)
        run("merge", one, lcm, "-o", two, "--force")
        assert read_header(two)[1]["minilcm.merged"] == "lcm.safetensors:1"


def test_the_parts_of_a_combination_stay_told(files, tmp_path):
    """In a combination of combinations, and merged: each part with all its lambdas multiplied."""
    lcm, style = tmp_path / "lcm.safetensors", files / "b.safetensors"
    write_tau(lcm, read_tau(files / "a.safetensors"), {"objective": "lcm"})
    mix, more, model = (tmp_path / f"{x}.safetensors" for x in ("mix", "more", "model"))
    run("combine", f"{lcm}:0.1", style, "-o", mix)
    run("combine", f"{mix}:0.5", f"{style}:2", "-o", more)
    assert read_recipe(more)["combined"] == "lcm.safetensors:0.05 b.safetensors:2.5"
    run("merge", files / "model.safetensors", f"{more}:2", "-o", model)
    assert read_header(model)[1]["minilcm.merged"] == "lcm.safetensors:0.1 b.safetensors:5"
    assert [round(lcm_scale(read_recipe(x)), 9) for x in (mix, more, model)] == [0.1, 0.05, 0.1]


def test_a_sum_beyond_float16(files, tmp_path):
    """W + lambda dW above 65504: one line with the key, and no file; in float32 it is written."""
    huge = f"{files}/a.safetensors:1e6"
    with pytest.raises(ValueError, match=r"model\.diffusion_model\..*weight: .* float16's largest"):
        run("merge", files / "model.safetensors", huge, "-o", tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="too large for float16; give --dtype float32"):
        run("combine", huge, "-o", tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="has values not finite; lower LAMBDA"):
        beyond = f"{files}/a.safetensors:1e39"
        run("combine", beyond, "-o", tmp_path / "c.safetensors", "--dtype", "float32")
    assert list(tmp_path.iterdir()) == []
    run("combine", huge, "-o", tmp_path / "c.safetensors", "--dtype", "float32")
    assert read_tau(tmp_path / "c.safetensors").keys() == read_tau(files / "a.safetensors").keys()


def test_names_of_outputs(files, tmp_path):
    """A folder that is missing is made, one that is there is no file, other endings are refused."""
    a = files / "a.safetensors"
    run("combine", a, "-o", tmp_path / "new/and/c.safetensors")
    assert read_tau(tmp_path / "new/and/c.safetensors").keys() == read_tau(a).keys()
    ending = "its name does not end in .safetensors; give -o one that does"
    lines = {"new": "is a folder; give a file, for example", "c.ckpt": ending, "0.8": ending}
    for name, line in lines.items():
        for force in ([], ["--force"]):
            with pytest.raises(ValueError, match=line):
                run("combine", a, "-o", tmp_path / name, *force)


@pytest.mark.parametrize(
    "kind, key", [("LoHa", "hada_w1_a"), ("LoKr", "lokr_w1"), ("OFT", "oft_blocks")]
)
def test_info_of_other_adapters(tmp_path, kind, key):
    """What it is and how to use it; no word of --lora, which refuses it."""
    save_file({f"lora_unet_x.{key}": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"{kind} is not LoRA .*then python -m minilcm extract"):
        run("info", tmp_path / "x.safetensors")


def test_info_goes_on(files, tmp_path, capsys):
    """Files that are no model get a line each, the others their lines."""
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"(?s)x\.safetensors: not an LDM.*none: no such file"):
        run("info", tmp_path / "x.safetensors", files / "a.safetensors", tmp_path / "none")
    assert "LoRA for the emoji model" in capsys.readouterr().out


def test_diff_of_a_matrix_and_a_kernel(files, tmp_path, capsys):
    """A 1x1 convolution as a matrix is the same weight, in checkpoints and in LoRAs."""
    for name in ("model", "a"):
        tensors, metadata = read_tensors(files / f"{name}.safetensors")
        flat = {k: v.flatten(1) if "proj_in" in k and v.ndim > 1 else v for k, v in tensors.items()}
        save_file({k: v.contiguous() for k, v in flat.items()}, tmp_path / "flat", metadata)
        assert any(v.shape != tensors[k].shape for k, v in flat.items())
        run("diff", tmp_path / "flat", files / f"{name}.safetensors")
        out = capsys.readouterr().out
        equal = f"{len(tensors)} of {len(tensors)} common tensors are equal\n"
        deltas = "the LoRAs differ by ||dW - dW'|| / ||dW'|| = 0.000e+00\n"
        assert out == (equal if name == "model" else deltas)


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
        ("combine {f}/a.safetensors:x -o {t}/o.safetensors", "'x' is not a number"),
        ("merge {f}/a.safetensors {f}/a.safetensors -o {t}/o.safetensors", "this is a LoRA file"),
        (
            "combine {f}/a.safetensors 0.8 -o {t}/o.safetensors",
            "to scale a LoRA, write FILE:0.8",
        ),
        (
            "merge {f}/model.safetensors {f}/model.safetensors -o {t}/o.safetensors",
            "this is a checkpoint",
        ),
        (
            "merge {f}/no.safetensors {f}/a.safetensors -o {t}/o.safetensors",
            "no.safetensors: no such file",
        ),
        (
            "resize {f}/a.safetensors --rank 2 -o {t}/o.safetensors"
            " --against {f}/model.safetensors",
            "this is a checkpoint, not a LoRA file",
        ),
        ("resize {f}/a.safetensors --rank 0 -o {t}/o.safetensors", "--rank is 0; give 1 or more"),
        ("resize {f}/a.safetensors --energy 1.5 -o {t}/o.safetensors", "--energy is 1.5"),
        (
            "resize {f}/a.safetensors -o {t}/o.safetensors",
            "one of the arguments --rank --energy is required",
        ),
        (
            "extract {f}/model.safetensors {f}/model.safetensors --rank 2 -o {t}/o.safetensors",
            "and other values",
        ),
        (
            "extract {f}/model.safetensors {f}/a.safetensors --rank 2 -o {t}/o.safetensors",
            "and its fine-tune",
        ),
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
