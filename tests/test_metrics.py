"""Scores: cosines by a judge, the share of pictures that pick their own name, and distance from self-consistency."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_text

from minilcm.files.safetensors_file import write_tensors
from minilcm.lcm import train_grid
from minilcm.metrics import Judge, clip_score, load_judge, prompt_accuracy, self_consistency

SIZES = dict(image_size=32, patch_size=8, width=32, layers=1, heads=2, embed_dim=16, text_width=32)


def small_judge() -> Judge:
    torch.manual_seed(0)
    judge = Judge(**SIZES).eval()
    torch.nn.init.normal_(judge.text_projection)
    return judge


def some_pixels(b: int, side: int = 32) -> torch.Tensor:
    return torch.rand(b, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_clip_score_is_the_cosine_of_picture_and_own_prompt():
    """In [-1, 1], one a picture, equal to the cosine of the two towers' outputs worked out here one by one."""
    judge, text, prompts = small_judge(), tiny_text(), ["cat face", "pizza", ""]
    pixels = some_pixels(3)
    score = clip_score(judge, text, pixels, prompts)
    assert score.shape == (3,) and score.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            picture = judge.visual(pixels[i : i + 1])[0]
            end = 1 + len(text.tokenizer.encode(prompt))  # BOS, the prompt's tokens, then the first EOS
            words = text.encode([prompt]).context[0, end] @ judge.text_projection
            assert score[i].item() == pytest.approx(F.cosine_similarity(picture, words, dim=0).item(), abs=1e-5)


def test_features_are_unit_vectors_and_pictures_are_resized():
    """Both features have length 1; pictures of another size, or above 1, are brought to what the tower takes."""
    judge, text = small_judge(), tiny_text()
    with torch.no_grad():
        for features in (judge.image_features(3 * some_pixels(2, side=64)), judge.text_features(text, ["a", "b c"])):
            torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))
        same = judge.image_features(3 * some_pixels(2)), judge.image_features((3 * some_pixels(2)).clamp(-1, 1))
        assert torch.equal(*same)


class HandMadeJudge:
    """Sees which of three colours a picture has; knows names by their first letter."""

    def image_features(self, pixels):
        return F.one_hot(pixels.mean(dim=(2, 3)).argmax(dim=1), 3).float()

    def text_features(self, text, prompts):
        return F.one_hot(torch.tensor(["rgb".index(prompt[0]) for prompt in prompts]), 3).float()


def test_prompt_accuracy_counts_pictures_that_pick_their_own_name():
    """Red, green, blue, blue pictures asked for as red, blue, blue, green: right, wrong, right, wrong; in any order of
    choices.
    """
    pixels = torch.zeros(4, 3, 2, 2)
    for i, channel in enumerate((0, 1, 2, 2)):
        pixels[i, channel] = 1
    names = ["red", "blue", "blue", "green"]
    for choices in (["red", "green", "blue"], ["blue", "red", "green"]):
        right = prompt_accuracy(HandMadeJudge(), None, pixels, names, choices)
        assert right.tolist() == [True, False, True, False]


def test_judge_file_round_trip(tmp_path):
    """A judge written with its sizes in the header loads strictly and scores the same; a file without a tensor does not
    load.
    """
    judge = small_judge()
    state = {key: value.clone() for key, value in judge.state_dict().items()}
    write_tensors(tmp_path / "judge.safetensors", state, {"config": json.dumps(SIZES)})
    loaded = load_judge(tmp_path / "judge.safetensors")
    args = (tiny_text(), some_pixels(2), ["cat face", "pizza"])
    assert torch.equal(clip_score(loaded, *args), clip_score(judge, *args))
    del state["text_projection"]
    write_tensors(tmp_path / "half.safetensors", state, {"config": json.dumps(SIZES)})
    with pytest.raises(RuntimeError, match="text_projection"):
        load_judge(tmp_path / "half.safetensors")


def test_self_consistency_is_zero_for_a_consistency_function(gaussian):
    """Gaussian data: on the exact trajectory of the ODE the exact f gives 0 to rounding, image by image;
    the denoiser, which is what a network that was not distilled gives, does not (7.3: that gap is what distillation
    learns).
    """
    t_start = train_grid()[[9, 24, 49]]
    t_end = t_start - 20
    z_start = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z_end = gaussian.ode(z_start, t_start, t_end)
    exact = self_consistency(gaussian.f, z_start, z_end, t_start, t_end)
    denoiser = self_consistency(gaussian.x0, z_start, z_end, t_start, t_end)
    assert exact.shape == (3,) and exact.max() < 1e-12
    assert denoiser.min() > 1e-4


def test_self_consistency_is_a_root_mean_square_per_image():
    """f(z, t) = z and z_end = z_start + d gives |d|, each image its own."""
    d = torch.tensor([0.0, 0.5, -2.0])[:, None, None, None]
    z = torch.zeros(3, 4, 2, 2)
    torch.testing.assert_close(self_consistency(lambda z, t: z, z, z + d, 0, 0), torch.tensor([0.0, 0.5, 2.0]))
