"""Model files: round trip, official prefixes, strict loading with one line that names file and keys; and the state of a
run.
"""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import CONFIG, random_tau, tiny_text, tiny_unet, tiny_vae, write_model
from torch import nn

from minilcm.checkpoint import TEXT, UNET, VAE_, from_json, load_model, load_state, save_model, save_state, to_json
from minilcm.lora_io import write_tau
from minilcm.safefile import read_tensors
from minilcm.unet import emoji, sd15, sdxl, ssd1b


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def contents(model):
    """(tensors, metadata) of the good file, to spoil copies of."""
    return read_tensors(model)


def error_of(path, tensors=None, metadata=None) -> str:
    """The one line with which load_model refuses these contents."""
    if tensors is not None:
        save_file(tensors, path, metadata)
    with pytest.raises(ValueError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# ---- models


def test_round_trip_rounds_to_float16_and_nothing_else(model):
    """Every tensor of UNet, VAE and text tower comes back as its float16 rounding, frozen, in float32, under the same
    key.
    """
    loaded = load_model(model)
    for module, original in zip(loaded, (tiny_unet(), tiny_vae(), tiny_text())):
        state, expected = module.state_dict(), original.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key].half().float()) for key in expected)
        assert not any(p.requires_grad or p.is_meta for p in module.parameters()) and not module.training
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_loaded_model_computes_what_the_saved_one_does(model):
    """Text, UNet and VAE of the file give the outputs of the modules that were saved, up to float16 rounding of
    weights.
    """
    unet, vae, text, _ = load_model(model)
    cond, z_t = text.encode(["cat face"]), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = [
            (cond.context, tiny_text().encode(["cat face"]).context),
            (unet(z_t, 499, cond), tiny_unet()(z_t, 499, cond)),
            (vae.decode(z_t), tiny_vae().decode(z_t)),
        ]
    for a, b in pairs:
        assert (a - b).abs().max() < 0.02 * b.abs().max()


def test_saving_what_was_loaded_gives_the_same_file(model, tmp_path):
    """float16 values pass through float32 unchanged, so load and save is the identity on tensors and config."""
    unet, vae, text, config = load_model(model)
    save_model(tmp_path / "again.safetensors", unet.state_dict(), vae, text, config)
    (tensors, metadata), (again, metadata_again) = read_tensors(model), read_tensors(tmp_path / "again.safetensors")
    assert tensors.keys() == again.keys() and metadata == metadata_again
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)


def test_dtype_of_the_weights(model):
    """`dtype` is that of every weight of the three networks."""
    unet, vae, text, _ = load_model(model, torch.bfloat16)
    assert {p.dtype for module in (unet, vae, text) for p in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", [emoji, sd15, sdxl, ssd1b])
def test_config_round_trip(model, family):
    """A config comes back equal, tuples as tuples and None as None, from JSON and from a file."""
    config = dataclasses.replace(CONFIG, unet=family())
    assert from_json(to_json(config)) == config
    assert load_model(model)[3] == CONFIG


def test_keys_have_the_official_prefixes(contents):
    """The keys of a file by CompVis: model.diffusion_model., first_stage_model.,
    cond_stage_model.transformer.text_model.
    """
    tensors, metadata = contents
    official = (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.up.2.upsample.conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    )
    assert all(key in tensors for key in official)
    assert all(key.startswith((UNET, VAE_, TEXT)) for key in tensors)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert json.loads(metadata["minilcm.config"])["names"] == list(CONFIG.names)


@pytest.mark.parametrize("prefix, what", [(UNET, "UNet"), (VAE_, "VAE")])
def test_missing_extra_and_misshapen_keys(tmp_path, contents, prefix, what):
    """Each problem is counted and its first keys are named, all in one line; nothing is loaded leniently."""
    tensors, metadata = dict(contents[0]), contents[1]
    keys = sorted(key for key in tensors if key.startswith(prefix))
    first, second, third = (key.removeprefix(prefix) for key in keys[:3])
    del tensors[keys[0]], tensors[keys[1]]
    tensors[prefix + "extra.weight"] = torch.zeros(1)
    tensors[keys[2]] = torch.zeros(3, 1)
    message = error_of(tmp_path / "bad.safetensors", tensors, metadata)
    assert (
        f"bad.safetensors: {what}: 2 missing keys, first: {first}, {second}; 1 unknown keys, first: extra.weight; "
        in message
    )
    assert f"{third} is (3, 1), not {tuple(contents[0][keys[2]].shape)}" in message


@pytest.mark.parametrize("proj", ["q", "k", "v"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_text_tower_without_one_of_q_k_v(tmp_path, contents, proj, part):
    """q, k and v are fused on load; a file without one of them, or with one of another width, gives one line too."""
    tensors, metadata = dict(contents[0]), contents[1]
    key = f"{TEXT}encoder.layers.0.self_attn.{proj}_proj.{part}"
    value = tensors.pop(key)
    assert "text tower" in error_of(tmp_path / "bad.safetensors", tensors, metadata)
    tensors[key] = value.repeat(*[2] * value.ndim)
    assert "text tower" in error_of(tmp_path / "bad.safetensors", tensors, metadata)


def test_keys_outside_the_three_parts(tmp_path, contents):
    """A tensor under none of the three prefixes is named, not dropped in silence: it could be a mistyped weight."""
    tensors = contents[0] | {"model_diffusion.out.2.weight": torch.zeros(1)}
    assert "model_diffusion.out.2.weight" in error_of(tmp_path / "bad.safetensors", tensors, contents[1])


def test_no_config_and_a_config_of_another_version(tmp_path, contents):
    """A checkpoint by someone else has no minilcm.config; a damaged or newer one is refused in one line as well."""
    tensors, path = contents[0], tmp_path / "bad.safetensors"
    assert "no minilcm.config in the header" in error_of(path, tensors, {"format": "pt"})
    config = json.loads(contents[1]["minilcm.config"])
    newer = config | {"unet": config["unet"] | {"flash": True}}
    for text in ("{", "[]", "{}", json.dumps(newer)):
        assert "minilcm.config" in error_of(path, tensors, {"minilcm.config": text})


def test_a_lora_given_as_checkpoint(tmp_path):
    """The message says what the file is and which flag takes it."""
    write_tau(tmp_path / "lora.safetensors", random_tau(tiny_unet(), 0, 2, 3.0), {})
    assert "this is a LoRA file; pass it with --lora" in error_of(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("fraction", [0, 1e-6, 1e-3, 0.01, 0.5, 0.9999])
def test_truncated_file(tmp_path, model, fraction):
    """Cut anywhere (in the length, the header, the data), the file is refused in one line."""
    path, whole = tmp_path / "cut.safetensors", model.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    message = error_of(path)
    assert "damaged or incomplete" in message or "not a safetensors file" in message


def test_missing_file(tmp_path):
    assert error_of(tmp_path / "none.safetensors").endswith("no such file")


def test_failed_save_keeps_the_old_model(tmp_path, model, monkeypatch):
    """An error while writing leaves the file of the last save as it was, and no temporary file."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(model.read_bytes())

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("minilcm.safefile.save_file", full)
    with pytest.raises(OSError):
        write_model(path, seed=1)
    assert path.read_bytes() == model.read_bytes() and list(tmp_path.iterdir()) == [path]


# ---- the state of a run


def small_run(steps: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network trained for some steps, so that the optimizer has moments."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    for i in range(steps):
        train_step(net, optimizer, i)
    return net, optimizer


def train_step(net, optimizer, i: int) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(i))
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_state_round_trip_is_bitwise(tmp_path):
    """Weights, both Adam moments, its step count and the run's JSON come back bit for bit; the next step is the same
    too.
    """
    net, optimizer = small_run(3)
    run = {"step": 3, "flags": {"lr": "0.01"}}
    save_state(tmp_path / "state.safetensors", dict(net.named_parameters()), optimizer, run)
    with safe_open(tmp_path / "state.safetensors", "pt") as f:
        assert {f"optimizer.0.{key}" for key in ("step", "exp_avg", "exp_avg_sq")} <= set(f.keys())

    other, other_optimizer = small_run(0, seed=1)
    assert load_state(tmp_path / "state.safetensors", dict(other.named_parameters()), other_optimizer) == run
    for i in range(2):
        for a, b in zip(net.parameters(), other.parameters()):
            assert torch.equal(a, b)
        state, other_state = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
        assert state.keys() == other_state.keys() == set(range(4))
        for moments, other_moments in zip(state.values(), other_state.values()):
            assert moments.keys() == other_moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(
                torch.equal(moments[key], other_moments[key]) and moments[key].dtype == torch.float32 for key in moments
            )
        assert state[0]["step"] == 3 + i
        train_step(net, optimizer, 3), train_step(other, other_optimizer, 3)


def test_state_is_loaded_into_the_parameters_that_the_optimizer_holds(tmp_path):
    """load_state fills tensors in place: optimizer, average and a compiled network go on holding the right ones."""
    net, optimizer = small_run(2)
    save_state(tmp_path / "state.safetensors", dict(net.named_parameters()), optimizer, {})
    other, other_optimizer = small_run(0, seed=1)
    pointers = [p.data_ptr() for p in other.parameters()]
    load_state(tmp_path / "state.safetensors", dict(other.named_parameters()), other_optimizer)
    assert [p.data_ptr() for p in other.parameters()] == pointers
    assert all(a is b for a, b in zip(other.parameters(), other_optimizer.param_groups[0]["params"]))


def test_state_of_another_run_is_refused(tmp_path):
    """Other keys or shapes: ValueError with the file, and no tensor has changed."""
    net, optimizer = small_run(2)
    save_state(tmp_path / "state.safetensors", dict(net.named_parameters()), optimizer, {})
    wider = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    deeper = nn.Sequential(*net, nn.Linear(2, 2))
    for other in (wider, deeper):
        before = [p.detach().clone() for p in other.parameters()]
        with pytest.raises(ValueError, match="state.safetensors: state of another model or objective"):
            load_state(
                tmp_path / "state.safetensors", dict(other.named_parameters()), torch.optim.AdamW(other.parameters())
            )
        assert all(torch.equal(p, b) for p, b in zip(other.parameters(), before))
    with pytest.raises(ValueError, match="none.safetensors: no such file"):
        load_state(tmp_path / "none.safetensors", dict(net.named_parameters()), optimizer)


def test_failed_save_keeps_the_old_state(tmp_path, monkeypatch):
    """An interrupted save_state leaves the last good state."""
    net, optimizer = small_run(1)
    path = tmp_path / "state.safetensors"
    save_state(path, dict(net.named_parameters()), optimizer, {"step": 1})
    old = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minilcm.safefile.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, dict(net.named_parameters()), optimizer, {"step": 2})
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
