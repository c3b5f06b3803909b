"""Train a small CLIP on the art and its captions, for its text tower, which conditions the UNet.

    python -m weights.emoji.train_clip --out runs/text --names 300 --steps 2500

Class: open_clip's CLIP, with images of 64x64. Loss: InfoNCE in both directions (2103.00020), where
*every* caption of the batch that fits a picture counts as right ("a cat" fits all cats). Held-out
(name, style) pairs are never shown. Writes text.safetensors under CLIP-L's official keys; rows of
tokens never trained are zero, which git packs to nothing.
"""

import argparse
import json
import random
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minilcm.data.emoji import COLORS, STYLES, caption, read_art, split_art
from minilcm.files.safetensors_file import read_tensors, write_tensors
from minilcm.model.precision import autocast, forward_dtype
from minilcm.model.text import EOS, VOCAB, TextConfig, TextEncoder, open_clip_to_clip_l
from minilcm.objective import learning_rate

from .train_vae import pool_of

HERE = Path(__file__).parent
SIZE, WIDTH = 64, 128  # of the pictures; of both embeddings
TEXT = TextConfig(width=128, layers=4, heads=4)


def make_clip() -> open_clip.CLIP:
    vision = dict(image_size=SIZE, patch_size=8, width=192, layers=6, head_width=32)
    text = dict(width=TEXT.width, layers=TEXT.layers, heads=TEXT.heads)
    return open_clip.CLIP(WIDTH, vision, text, quick_gelu=False)


def encode_text(clip: open_clip.CLIP, text: TextEncoder, ids: Tensor) -> Tensor:
    """Unit text vectors (b, e): the tower's output at the first EOS, projected."""
    end = (ids == EOS).int().argmax(dim=1)
    # nothing behind the last EOS is needed: attention is causal
    tokens = text(ids[:, : int(end.max()) + 1])
    return F.normalize(tokens[torch.arange(len(ids)), end] @ clip.text_projection, dim=-1)


def degrade(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, blur and noise pictures a little, as autoencoder and few steps do: (b, 3, H, W)."""
    b, draw = len(x), dict(generator=generator, device=x.device)
    u = torch.rand(b, 4, **draw)
    theta = torch.zeros(b, 2, 3, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 0.9 + 0.25 * u[:, 0]
    theta[:, :, 2] = (u[:, 1:3] - 0.5) * 0.2
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, "bilinear", "border", align_corners=False)
    small = F.interpolate(x, scale_factor=0.4, mode="bilinear", antialias=True)
    blurred = F.interpolate(small, x.shape[-2:], mode="bicubic")
    mix = u[:, 3, None, None, None]
    noise = torch.randn(x.shape, **draw) * 0.15 * torch.rand(b, 1, 1, 1, **draw)
    return x * (1 - mix) + blurred * mix + noise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for text.safetensors")
    parser.add_argument(
        "--init", type=Path, help="start from the clip.safetensors that an earlier run wrote"
    )
    parser.add_argument(
        "--names", type=int, default=300, help="how many names of names.txt (default 300)"
    )
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument(
        "--looks", type=int, default=16, help="compositions made of each drawing (default 16)"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    names = (HERE / "names.txt").read_text().splitlines()[: args.names]
    styles = list(STYLES)
    colors = list(COLORS)
    seen, held_out = split_art(read_art(HERE / "art"), HERE / "art/held_out.txt", names)

    def numbers(words: tuple[str | None, ...]) -> list[int]:
        """(name, style, colour) as numbers, -1 for what is not said."""
        lists = zip(words, (names, styles, colors))
        return [-1 if word is None else every.index(word) for word, every in lists]

    def lessons(art: list, looks: int, seed: int) -> tuple[Tensor, Tensor, list[str], list]:
        """(pixels (m, 3, S, S) uint8, (name, style, colour) (m, 3) as numbers; colours; art)."""
        pixels, on = pool_of(art, SIZE, looks, seed, args.device)
        shown = [a for a in art for _ in range(looks)]
        true = [numbers((a.name, a.style, c)) for a, c in zip(shown, on)]
        return pixels, torch.tensor(true), on, shown

    pixels, true, on, shown = lessons(seen, args.looks, args.seed)
    test, test_true, *_ = lessons(held_out, 4, -1)

    torch.manual_seed(args.seed)
    clip, text = make_clip().to(args.device), TextEncoder(TEXT).to(args.device)
    if args.init:
        clip.load_state_dict(read_tensors(args.init)[0], strict=False)
    # one set of text weights: the tower that will condition the UNet is the one trained
    for name, _ in text.tower.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(text.tower.get_submodule(module), leaf, clip.get_parameter(name))

    @torch.no_grad()
    def accuracy(pixels: Tensor, true: Tensor) -> float:
        """How often is a picture (b, 3, S, S) nearest to its own name?"""
        images = torch.cat(
            [F.normalize(clip.visual(x / 127.5 - 1), dim=-1) for x in pixels.split(64)]
        )
        picked = (images @ encode_text(clip, text, text.tokenize(names).to(args.device)).T).argmax(
            dim=1
        )
        return (picked.cpu() == true[:, 0]).float().mean().item()

    optimizer = torch.optim.AdamW(
        clip.parameters(), args.lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True
    )
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(1.0, step, args.steps)
    )
    used = torch.zeros(VOCAB, dtype=torch.bool)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    rng, start = random.Random(args.seed), time.time()
    some = random.Random(0).sample(range(len(shown)), min(512, len(shown)))
    for step in tqdm(range(args.steps), disable=None):
        index = [rng.randrange(len(shown)) for _ in range(args.batch)]
        captions, said = zip(*(caption(shown[i], on[i], rng) for i in index))
        says = torch.tensor([numbers(s) for s in said])
        # (images, captions): whether all that the caption says is true of the picture
        fits = (
            ((says[None] == true[index][:, None]) | (says[None] < 0))
            .all(dim=2)
            .float()
            .to(args.device)
        )
        x = degrade(pixels[index] / 127.5 - 1, generator)
        ids = text.tokenize(list(captions))
        used[ids.unique()] = True
        with autocast(args.device, forward_dtype(args.device)):
            images = F.normalize(clip.visual(x), dim=-1)  # (b, e)
            texts = encode_text(clip, text, ids.to(args.device))  # (b, e)
        logits = clip.logit_scale.exp().clamp(max=100) * images.float() @ texts.float().T  # (b, b)
        # InfoNCE towards the uniform distribution over all that fit
        loss = (
            F.cross_entropy(logits, fits / fits.sum(1, keepdim=True))
            + F.cross_entropy(logits.T, fits.T / fits.T.sum(1, keepdim=True))
        ) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), cosine.step()

        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            clip.eval()
            shares = accuracy(pixels[some], true[some]), accuracy(test, test_true)
            right = "right: seen {:.3f} held-out {:.3f}".format(*shares)
            clip.train()
            print(
                f"step {step + 1} loss {loss.item():.3f} {right} {time.time() - start:.0f} s",
                flush=True,
            )
            write_tensors(args.out / "clip.safetensors", clip.state_dict(), {})
            tower = {
                k: v.clone() for k, v in clip.state_dict().items() if k in text.tower.state_dict()
            }
            tower["token_embedding.weight"][~used.to(args.device)] = 0
            config = json.dumps(dict(width=TEXT.width, layers=TEXT.layers, heads=TEXT.heads))
            write_tensors(
                args.out / "text.safetensors", open_clip_to_clip_l(tower), {"config": config}
            )


if __name__ == "__main__":
    main()
