import torch
from make_reference import REFERENCE, about, filled
from safetensors.torch import load_file

from minilcm.files.checkpoint import tiny_keys
from minilcm.model.tiny_vae import TinyDecoder


def test_equals_diffusers():
    """Pixels of scaled latents as diffusers 0.42.1's AutoencoderTiny has them, to 1e-5, from the
    same weights under its names.
    """
    reference = load_file(REFERENCE / "vae.safetensors")
    theirs = filled(about(REFERENCE / "vae.safetensors")["keys"]["tiny"])
    decoder = TinyDecoder().requires_grad_(False)
    decoder.load_state_dict({name: theirs[key] for name, key in tiny_keys(theirs).items()})
    decoded = decoder.decode(reference["f8/z"])
    torch.testing.assert_close(decoded, reference["tiny/decoded"], rtol=1e-5, atol=1e-5)
    assert sum(x.numel() for x in decoder.parameters()) == 1_222_531


def test_latents_far_out_are_bounded():
    """3 tanh(z / 3): what comes in at 100 decodes as what comes in at infinity."""
    decoder = TinyDecoder().requires_grad_(False)
    far, farther = (decoder.decode(torch.full((1, 4, 2, 2), x)) for x in (100.0, torch.inf))
    assert torch.equal(far, farther) and far.shape == (1, 3, 16, 16)
