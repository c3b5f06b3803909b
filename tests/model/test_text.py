import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from make_reference import REFERENCE, about, filled
from safetensors.torch import load_file
from tiny import TWO_TOWERS, tiny_text

from minilcm.merge import merge_into
from minilcm.model.text import (
    TextConfig,
    TextEncoder,
    clip_l_to_open_clip,
    lora_weights,
    open_clip_to_clip_l,
    sd2_text,
    sdxl_text,
    with_sizes,
)

SMALL = TextConfig(width=32, layers=3, heads=4)


@pytest.fixture(scope="module")
def reference():
    return load_file(REFERENCE / "text.safetensors")


@pytest.fixture(scope="module")
def keys():
    return about(REFERENCE / "text.safetensors")["keys"]["clip"]


@pytest.fixture(scope="module")
def text(keys):
    encoder = TextEncoder(SMALL).requires_grad_(False)
    encoder.tower.load_state_dict(clip_l_to_open_clip(filled(keys)))
    return encoder


# ---- against transformers


def test_context_equals_transformers(text, reference):
    """last_hidden_state of transformers 5.24.0's CLIPTextModel, same weights, to 1e-5."""
    context = text(reference["tokens"])
    torch.testing.assert_close(context, reference["last_hidden_state"], rtol=1e-5, atol=1e-5)


def test_encode_is_tokenize_then_forward(text, reference):
    """The reference's three prompts become its tokens and its context; there is no vector."""
    prompts = about(REFERENCE / "text.safetensors")["prompts"]
    assert torch.equal(text.tokenize(prompts), reference["tokens"])
    cond = text.encode(prompts)
    torch.testing.assert_close(cond.context, reference["last_hidden_state"], rtol=1e-5, atol=1e-5)
    assert cond.vector is None


def test_attention_is_causal(text, reference):
    """Changing a token leaves the context before it alone."""
    tokens = reference["tokens"].clone()
    tokens[1, 4] = 1125
    before, after = text(reference["tokens"]), text(tokens)
    torch.testing.assert_close(before[1, :4], after[1, :4], rtol=0, atol=1e-6)
    assert (before[1, 4:] - after[1, 4:]).abs().amax(dim=1).min() > 1e-3


# ---- SD2: OpenCLIP-H


def test_sd2_equals_transformers(reference, capsys):
    """The penultimate of three layers, through the final norm: exact GELU, padded with 0; to 1e-5.
    Without the last layer, which is not read.
    """
    config = TextConfig(width=48, layers=2, heads=4, open_clip=True)
    text = TextEncoder(config).requires_grad_(False)
    h = filled(about(REFERENCE / "text.safetensors")["keys"]["big"])
    h = clip_l_to_open_clip({key.removeprefix("big."): value for key, value in h.items()})
    text.tower.load_state_dict({k: x for k, x in h.items() if k in text.tower.state_dict()})
    prompts = about(REFERENCE / "text.safetensors")["prompts"]
    assert torch.equal(text.tokenize(prompts), reference["tokens_big"])
    context, vector = text.encode(prompts)
    norm = h["ln_final.weight"], h["ln_final.bias"]
    expected = F.layer_norm(reference["penultimate_big"], (48,), *norm)
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.null_cond(1).context, context[:1])  # of prompt ""
    assert vector is None
    text.tokenize(["a " * 100])
    assert "prompt cut after 75 tokens" in capsys.readouterr().out


def test_sd2_is_openclip_h():
    """340,387,840 parameters of OpenCLIP ViT-H-14's text tower without its last layer and
    projection, in diffusers' text_encoder of SD2.
    """
    with torch.device("meta"):
        text = TextEncoder(sd2_text())
    assert sum(x.numel() for x in text.parameters()) == 340_387_840


# ---- SDXL: two towers


@pytest.fixture(scope="module")
def both(keys):
    """CLIP-L's and bigG's shape side by side; bigG's weights come from transformers' names."""
    encoder = TextEncoder(dataclasses.replace(SMALL, big=(48, 3, 4))).requires_grad_(False)
    encoder.tower.load_state_dict(clip_l_to_open_clip(filled(keys)))
    big = filled(about(REFERENCE / "text.safetensors")["keys"]["big"])
    big = {key.removeprefix("big."): value for key, value in big.items()}
    projection = big.pop("text_projection.weight").T  # open_clip multiplies from the right
    encoder.big.load_state_dict(clip_l_to_open_clip(big) | {"text_projection": projection})
    return encoder


def test_sdxl_equals_transformers(both, reference):
    """Penultimate states side by side, and bigG's projected pooled state; pads EOS, 0; to 1e-5."""
    prompts = about(REFERENCE / "text.safetensors")["prompts"]
    assert torch.equal(both.tokenize(prompts, pad=0), reference["tokens_big"])
    context, vector = both.encode(prompts)
    assert context.shape == (3, 77, 80) and vector.shape == (3, 48 + 6 * 256)
    torch.testing.assert_close(context[..., :32], reference["penultimate"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        context[..., 32:], reference["penultimate_big"], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(vector[:, :48], reference["pooled"], rtol=1e-5, atol=1e-5)


def test_size_ids(both):
    """After the pooled text: (h, w), crop, (h, w): 128 cosines, 128 sines of x 10000^(-i/128)."""
    _, vector = both.encode([""], size=(832, 1216))
    ids = torch.tensor([1216.0, 832.0, 0.0, 0.0, 1216.0, 832.0], dtype=torch.float64)
    args = ids[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat([args.cos(), args.sin()], dim=1).flatten()
    torch.testing.assert_close(vector[0, 48:].double(), expected, rtol=0, atol=2e-4)


def test_sdxl_null_is_zeros_of_the_same_size(both):
    """Context and pooled text are zero, size ids the prompt's (force_zeros_for_empty_prompt)."""
    null_cond, cond = both.null_cond(2, (832, 1216)), both.encode(["a cat"], (832, 1216))
    assert null_cond.context.shape == (2, 77, 80) and not null_cond.context.any()
    assert not null_cond.vector[:, :48].any() and torch.equal(
        null_cond.vector[1, 48:], cond.vector[0, 48:]
    )


def test_lora_lands_on_the_rows_it_names(both):
    """A delta on bigG's v_proj changes the last third of in_proj; text_projection is transposed."""
    text = copy.deepcopy(both)
    up, down = torch.randn(48, 2), torch.randn(2, 48)
    paths = (
        "te2.encoder.layers.1.self_attn.v_proj",
        "te2.text_projection",
        "te2.encoder.layers.2.self_attn.q_proj",
    )
    merge_into(lora_weights(text), {path: (up, down, 2.0) for path in paths})
    before, after = both.big.state_dict(), text.big.state_dict()
    changed = {k: after[k] - before[k] for k in after if not torch.equal(after[k], before[k])}
    v, q = (changed.pop(f"transformer.resblocks.{i}.attn.in_proj_weight") for i in (1, 2))
    assert not v[:96].any() and not q[48:].any() and list(changed) == ["text_projection"]
    for got in (v[96:], q[:48], changed["text_projection"].T):
        torch.testing.assert_close(got, up @ down, rtol=1e-4, atol=1e-5)
    assert len(lora_weights(both)) == 2 * 3 * 6 + 1


def test_big_g_fits_the_tower(official_keys):
    """Official keys and shapes of embedder 1, 694,659,841 parameters: the tower's."""
    with torch.device("meta"):
        text = TextEncoder(sdxl_text())
    official = official_keys["big_g"]
    assert {k: list(x.shape) for k, x in text.big.state_dict().items()} | {
        "logit_scale": []
    } == official
    assert sum(x.numel() for x in text.big.parameters()) + 1 == 694_659_841


# ---- key names


def test_maps_are_inverse_over_clip_l(official_keys):
    """All 196 weights of CLIP-L: there and back is the identity, key by key, row by row."""
    shapes = official_keys["clip_l"]
    state = {}
    for i, (key, shape) in enumerate(shapes.items()):
        state[key] = torch.full((), float(i)).expand(shape)
    there = clip_l_to_open_clip(state)
    weights = {key: x for key, x in state.items() if key != "embeddings.position_ids"}
    back = open_clip_to_clip_l(there)
    # q, k, v become one, weight and bias, 12 layers
    assert len(shapes) == 197 and len(there) == 196 - 2 * 2 * 12
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], x) for key, x in weights.items())
    again = clip_l_to_open_clip(back)
    assert again.keys() == there.keys() and all(
        torch.equal(again[key], x) for key, x in there.items()
    )


def test_clip_l_fits_the_tower(official_keys):
    """Mapped keys and shapes of CLIP-L are the default tower's, 123,060,480 parameters."""
    with torch.device("meta"):
        tower = TextEncoder().tower
    state = {
        key: torch.empty(shape, device="meta") for key, shape in official_keys["clip_l"].items()
    }
    mapped = clip_l_to_open_clip(state)
    assert {k: x.shape for k, x in mapped.items()} == {
        k: x.shape for k, x in tower.state_dict().items()
    }
    assert sum(x.numel() for x in tower.parameters()) == 123_060_480


def test_qkv_order(keys):
    """open_clip's in_proj holds q, k, v as rows in this order (torch.nn.MultiheadAttention)."""
    state = filled(keys)
    fused = clip_l_to_open_clip(state)["transformer.resblocks.1.attn.in_proj_weight"]
    for x, rows in zip("qkv", fused.chunk(3)):
        assert torch.equal(rows, state[f"encoder.layers.1.self_attn.{x}_proj.weight"])


def test_missing_projection_is_an_error(keys):
    """A layer with only two of q, k, v is a broken file, not a smaller one."""
    state = filled(keys)
    del state["encoder.layers.2.self_attn.v_proj.bias"]
    with pytest.raises(KeyError, match="encoder.layers.2.self_attn.v_proj.bias"):
        clip_l_to_open_clip(state)


# ---- tokens


def test_padding(text):
    """49406, the prompt, 49407, and 49407 up to 77, as SD1.x pads (open_clip pads with 0)."""
    ids = text.tokenize(["", "a cat"])
    assert ids.shape == (2, 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == [49406] + [49407] * 76
    assert ids[1].tolist() == [49406, 320, 2368] + [49407] * 74


def test_long_prompts_are_cut_aloud(text, capsys):
    """75 tokens fit; more are cut with one line that quotes what was ignored."""
    ids = text.tokenize(["cat " * 75])
    assert capsys.readouterr().out == ""
    assert ids[0].tolist() == [49406] + [2368] * 75 + [49407]
    ids = text.tokenize(["cat " * 75 + "red hat"])
    assert capsys.readouterr().out == "prompt cut after 75 tokens; ignored: 'red hat '\n"
    assert ids[0].tolist() == [49406] + [2368] * 75 + [49407]


def test_null_cond_is_the_empty_prompt(text):
    """SD1.x's null condition is the encoding of "", once for each image of the batch."""
    null_cond = text.null_cond(3)
    assert null_cond.context.shape == (3, 77, 32) and null_cond.vector is None
    for row in null_cond.context:
        assert torch.equal(row, text.encode([""]).context[0])


# ---- devices and formats


def test_text_on_cuda_in_float16(fake_cuda):
    """A dry run with float16 weights on cuda: context is float16 on cuda."""
    text = fake_cuda(lambda: TextEncoder(SMALL), torch.float16)
    for cond in (text.encode(["a cat", "a red hat"]), text.null_cond(2)):
        assert (cond.context.device.type, cond.context.dtype, cond.context.shape) == (
            "cuda",
            torch.float16,
            (2, 77, 32),
        )


def test_with_sizes_replaces_the_size_ids(both, text):
    """Row i of the vector is its own picture's, as `encode` has it; SD1.x has none to replace."""
    sizes, prompts = [(832, 1216), (640, 512)], ["a cat", "a dog"]
    cond = with_sizes(both.encode(prompts), torch.tensor([[h, w, 0, 0, h, w] for w, h in sizes]))
    for i, size in enumerate(sizes):
        torch.testing.assert_close(
            cond.vector[i], both.encode(prompts, size).vector[i], rtol=0, atol=1e-6
        )
    cond = text.encode(prompts)
    assert with_sizes(cond, torch.zeros(2, 6)) is cond


def test_an_empty_caption_is_the_null_condition():
    """As training drops captions: "" is sampling's null, zeros for two towers; else `encode`'s."""
    one, two = tiny_text(), tiny_text(0, TWO_TOWERS.text)
    for text in (one, two):
        cond, cats = text.encode_captions(["cat", "", "a cat"]), text.encode(["cat", "a cat"])
        null = text.null_cond(1)
        for got, expected, nothing in zip(cond, cats, null):
            if got is not None:
                torch.testing.assert_close(got[[0, 2]], expected)
                torch.testing.assert_close(got[1], nothing[0])
    assert not two.encode_captions([""]).context.any() and one.encode_captions([""]).context.any()


def test_one_string_is_not_a_list_of_prompts():
    """encode("cat face") would be eight prompts of a letter each."""
    with pytest.raises(ValueError, match=r"give \['cat face'\]"):
        tiny_text().encode("cat face")
