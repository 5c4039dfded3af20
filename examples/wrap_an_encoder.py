"""Put a guard behind a vision encoder of your own: any callable that returns tokens.

python examples/wrap_an_encoder.py
"""

from __future__ import annotations

import torch
from torch import nn

from vqguard import guard_encoder, straight_through


class PatchEncoder(nn.Module):
    """A class token and one token for each 16 x 16 patch, mixed by two attention layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=16, stride=16)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, dropout=0.0)
        self.mixer = nn.TransformerEncoder(layer, 2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        mixed: torch.Tensor = self.mixer(
            torch.cat([self.cls.expand(len(pixels), -1, -1), tokens], dim=1)
        )
        return mixed


def main() -> None:
    torch.manual_seed(0)
    pixels = torch.rand(32, 3, 96, 96)
    # Widths are found by running the encoder; which token stands for the image it cannot say.
    guarded = guard_encoder(
        PatchEncoder(), global_token="cls", example=pixels[:2], patch_codes=256, semantic_codes=16
    )
    guarded.start_codebooks(pixels)

    output = guarded(pixels)
    print("visual tokens", tuple(output.tokens.shape), "codes", tuple(output.codes.shape))
    print(
        "every token is a codeword:",
        bool(torch.equal(output.tokens, guarded.guard.patch.codebook.weight[output.codes])),
    )

    # No gradient crosses the quantiser, unless it is asked for by name.
    pixels.requires_grad_(True)
    print("gradient without a context:", guarded(pixels).tokens.requires_grad)
    with straight_through(guarded):
        guarded(pixels).tokens.sum().backward()
    print(
        "gradient inside straight_through:",
        pixels.grad is not None and bool(pixels.grad.abs().sum() > 0),
    )


if __name__ == "__main__":
    main()
