"""Small masked autoencoders with random weights, and their outputs by other libraries.

    python tests/mae_fixtures.py        with transformers 5.24 or later and timm 1.0.31 or later in addition to torch

writes to `tests/fixtures/mae` the folder of a model as transformers saves it, and a checkpoint with the names of the
authors' code, whose blocks are timm's, each with the outputs in `expected.safetensors`.
"""

import argparse
import itertools
import math
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import Block, PatchEmbed
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

FOLDER = Path(__file__).parent / "fixtures" / "mae"
# of ImageNet
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def sine_table(width: int) -> Tensor:
    """Positions of the class token, which are 0, and of 4 x 4 patches: (1, 17, width)."""
    rows = [[0.0] * width]
    for i, j in itertools.product(range(4), repeat=2):
        rows.append([])
        for place in (j, i):  # the authors' files have the column first
            angles = [place / 10_000 ** (4 * k / width) for k in range(width // 4)]
            rows[-1] += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return torch.tensor(rows)[None]


class AuthorsMAE(nn.Module):
    """Blocks of timm with the names of the authors' code: two of width 12 and one of width 8, each with one head."""

    def __init__(self, positions: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        block = partial(Block, num_heads=1, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        self.patch_embed = PatchEmbed(8, 2, 3, 12)
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(1, 1, n)) for n in (12, 8))
        self.pos_embed, self.decoder_pos_embed = (nn.Parameter(table, requires_grad=False) for table in positions)
        self.blocks, self.decoder_blocks = nn.ModuleList([block(12), block(12)]), nn.ModuleList([block(8)])
        self.norm, self.decoder_norm = nn.LayerNorm(12, eps=1e-6), nn.LayerNorm(8, eps=1e-6)
        self.decoder_embed, self.decoder_pred = nn.Linear(12, 8), nn.Linear(8, 12)

    def encode(self, x: Tensor, order: Tensor) -> Tensor:
        """The class token and the tokens of the patches in the order: (B, 3, 8, 8), (B, V) -> (B, 1 + V, 12)."""
        tokens = self.patch_embed(x) + self.pos_embed[:, 1:]
        tokens = tokens[torch.arange(len(x))[:, None], order]
        tokens = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), tokens], 1)
        for layer in self.blocks:
            tokens = layer(tokens)
        return self.norm(tokens)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """The predicted patches, with values ordered by position: (B, 3, 8, 8), (B, 16) -> (B, 16, 12)."""
        order = noise.argsort(1)
        tokens = self.decoder_embed(self.encode(x, order[:, :4]))
        places = self.mask_token.expand(len(x), 16, -1).clone()
        places[torch.arange(len(x))[:, None], order[:, :4]] = tokens[:, 1:]
        tokens = torch.cat([tokens[:, :1], places], 1) + self.decoder_pos_embed
        for layer in self.decoder_blocks:
            tokens = layer(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]


def shake(model: nn.Module) -> None:
    """Add random offsets to all trained weights: a normalisation with weight 1 would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


def write(name: str, found: dict[str, Tensor]) -> None:
    """Write the outputs of a library."""
    save_file({key: value.contiguous() for key, value in found.items()}, FOLDER / name / "expected.safetensors")


def main() -> None:
    """Write the files."""
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=8, patch_size=2, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
        attn_implementation="eager",
    )  # fmt: skip
    model = ViTMAEForPreTraining(config).eval()
    tables = sine_table(12), sine_table(8)
    model.vit.embeddings.position_embeddings.data.copy_(tables[0])
    model.decoder.decoder_pos_embed.data.copy_(tables[1])
    shake(model)
    with torch.no_grad():
        x, noise = torch.rand(2, 3, 8, 8), torch.rand(2, 16)
        normalised = (x - MEAN) / STD
        found = {"x": x, "noise": noise}
        for norm_pix in (False, True):
            config.norm_pix_loss = norm_pix
            out = model(normalised, noise=noise)
            found[f"loss_{norm_pix}"] = out.loss
        found["patches"] = out.logits
        config.norm_pix_loss = False
        model.save_pretrained(FOLDER / "transformers")
        config.mask_ratio = 0.0
        order = torch.arange(16).expand(2, -1)
        found["tokens"] = model.vit(normalised, noise=order.float()).last_hidden_state
        write("transformers", found)

        authors = AuthorsMAE(tables)
        shake(authors)
        (FOLDER / "authors").mkdir(exist_ok=True)
        given = argparse.Namespace(norm_pix_loss=False, mask_ratio=0.75, output_dir="out")
        torch.save({"model": authors.state_dict(), "epoch": 3, "args": given}, FOLDER / "authors" / "checkpoint.pth")
        patches = authors(normalised, noise)
        target = normalised.unflatten(2, (4, 2)).unflatten(4, (4, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        hidden = noise.argsort(1).argsort(1) >= 4
        found = {"x": x, "noise": noise, "patches": patches, "tokens": authors.encode(normalised, order)}
        found["loss_False"] = ((patches - target) ** 2).mean(2)[hidden].mean()
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6) ** 0.5
        found["loss_True"] = ((patches - target) ** 2).mean(2)[hidden].mean()
        write("authors", found)


if __name__ == "__main__":
    main()
