"""The text encoder: prompts -> Cond, on open_clip's tower class and tokenizer, from CLIP-L's key names.

Official SD1.x files keep the tower under Hugging Face's names with separate q, k, v projections; open_clip fuses the
three into one matrix. That renaming is `clip_l_to_open_clip`, with its inverse: one of the two maps of this project.
"""

import re
from dataclasses import dataclass

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

from .unet import Cond

BOS, EOS, N_TOKENS, VOCAB = 49406, 49407, 77, 49408

RENAMED = {  # CLIP-L's name -> open_clip's, one level each
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}


def clip_l_to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP-L keys (below `text_model.`) -> open_clip's TextTransformer keys; q, k, v become rows of in_proj in that
    order.

    `embeddings.position_ids` is no weight and is left out. Raises KeyError if a layer lacks one of q, k, v.
    """
    out = {}
    for key, value in state.items():
        if qkv := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", key):
            rows = [state[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            out[f"transformer.resblocks.{qkv[1]}.attn.in_proj_{qkv[2]}"] = torch.cat(rows)
        elif not re.search(r"\.(k_proj|v_proj)\.|position_ids$", key):
            for theirs, ours in RENAMED.items():
                key = key.replace(theirs, ours)
            out[key] = value
    return out


def open_clip_to_clip_l(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `clip_l_to_open_clip`."""
    out = {}
    for key, value in state.items():
        if fused := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key):
            for x, rows in zip("qkv", value.chunk(3)):
                out[f"encoder.layers.{fused[1]}.self_attn.{x}_proj.{fused[2]}"] = rows
        else:
            for theirs, ours in RENAMED.items():
                key = key.replace(ours, theirs)
            out[key] = value
    return out


@dataclass(frozen=True)
class TextConfig:
    width: int = 768
    layers: int = 12
    heads: int = 12


class TextEncoder(nn.Module):
    """CLIP-L's text tower. Context = the last layer after the final norm, as SD1.x uses it; null is the prompt ""."""

    def __init__(self, cfg: TextConfig = TextConfig()):
        super().__init__()
        self.cfg = cfg
        self.tokenizer = SimpleTokenizer(context_length=N_TOKENS)
        self.tower = TextTransformer(
            N_TOKENS, VOCAB, cfg.width, cfg.heads, cfg.layers, output_dim=None, proj_type="none", act_layer=QuickGELU
        )

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(b, 77) int64: BOS, the prompt's tokens, EOS, and EOS again as padding. Longer prompts are cut, with one
        line.
        """
        ids = torch.full((len(prompts), N_TOKENS), EOS)
        for row, prompt in zip(ids, prompts):
            tokens = self.tokenizer.encode(prompt)
            if len(tokens) > N_TOKENS - 2:
                print(f"prompt cut after 75 tokens; ignored: {self.tokenizer.decode(tokens[N_TOKENS - 2 :])!r}")
            tokens = [BOS, *tokens[: N_TOKENS - 2]]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b, n) -> context (b, n, width)."""
        n = ids.shape[1]
        x = self.tower.token_embedding(ids) + self.tower.positional_embedding[:n]  # (b, n, d)
        mask = self.tower.attn_mask[:n, :n].to(x.dtype)  # causal: -inf above the diagonal
        return self.tower.ln_final(self.tower.transformer(x, attn_mask=mask))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """Prompts -> Cond(context (b, 77, width), None)."""
        ids = self.tokenize(prompts).to(self.tower.positional_embedding.device)
        return Cond(self(ids))

    def null_cond(self, b: int) -> Cond:
        """The empty condition of classifier-free guidance, b rows of it."""
        return Cond(self.encode([""]).context.expand(b, -1, -1))
