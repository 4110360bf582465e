"""Cross-Mamba Interaction by gating: image and question pass one mixer, and the question's gate meets the image's.

    visual   [B, L, D]  → norm → in_proj → x, z_v [B, E, L]
    question [B, Lq, D] → norm → in_proj →    z_q → masked mean [B, E]
    y = scan(conv(x)) · SiLU(z_v ⊙ mean z_q) → out_proj → [B, L, D] + visual

Source: CMI-MTL (arXiv 2511.01357): two streams under shared weights, g = SiLU(z_v ⊙ pool(z_q)),
out = x_v + W_out(y ⊙ g). There the question has a scan of its own, whose result goes to the next interaction; here
one interaction stands before the language model, so of the question its gate is all that is used.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from models.cmi import compress, masked_mean
from models.vim_mixer import VimMixer


class GatedCMI(nn.Module):
    """Scan of the visual tokens, opened and closed channel by channel by the question; residual."""

    def __init__(self, width: int, *, compress_to: int | None = None, d_state: int = 16) -> None:
        """
        Args:
            width: D of both streams; the inner width E equals it.
            compress_to: L' of the output when the input is longer; ``None`` keeps L.
        """
        super().__init__()
        self.compress_to = compress_to
        self.visual_norm = nn.RMSNorm(width, eps=1e-5)
        self.text_norm = nn.RMSNorm(width, eps=1e-5)
        self.mixer = VimMixer(width, d_state=d_state, expand=1, one_way=True)
        # A small start leaves the visual tokens near what Stage 1 made of them, yet passes gradient.
        nn.init.normal_(self.mixer.out_proj.weight, std=0.02 / math.sqrt(width))

    def forward(self, visual: Tensor, question: Tensor, question_mask: Tensor) -> Tensor:
        """Arguments and result as of :meth:`models.cmi.CMI.forward`."""
        x, z = self.mixer.in_proj(self.visual_norm(visual)).transpose(1, 2).chunk(2, dim=1)  # (B, E, L) each
        _, z_q = self.mixer.in_proj(self.text_norm(question)).chunk(2, dim=-1)  # (B, Lq, E)
        y = self.mixer.scan(x, z * masked_mean(z_q, question_mask)[..., None])
        return compress(visual + self.mixer.out_proj(y.transpose(1, 2)).to(visual.dtype), self.compress_to)
