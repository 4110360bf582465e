"""Stage 1's objectives over visual tokens [B, L, D].

``proxy_l2`` is the manual's proxy loss; its minimum is the zero output (users saw features near zero and a Stage 2
worse than from scratch). ``align`` moves each scan's tokens towards its own report and away from all others (InfoNCE:
van den Oord et al. 2018; image–text: Radford et al. 2021), with the variance term of VICReg (Bardes et al. 2022)
against collapse.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from models.findings_head import findings_loss, known_targets
from models.medical_vlm import VisionBridge


class ProxyL2(nn.Module):
    """Mean square of the tokens."""

    def forward(self, tokens: Tensor, row: Tensor) -> Tensor:
        return tokens.float().pow(2).mean()


class Align(nn.Module):
    """InfoNCE of mean visual tokens against the embeddings of all reports of the table.

    Training adds the reverse direction, reports against the images of the batch, and the variance term. Validation
    leaves both out: they depend on the batch size.
    """

    def __init__(self, reports: Tensor, group: Tensor, expected_std: float, *, variance_weight: float = 1.0) -> None:
        """
        Args:
            reports: (N, D) unit vectors, from :func:`models.language_model.report_embedding.embed_reports`.
            group: (N,) equal for rows whose reports are the same text: they are no negatives of each other.
            expected_std: standard deviation between tokens below which the variance term acts.
        """
        super().__init__()
        self.register_buffer("reports", reports, persistent=False)
        self.register_buffer("group", group, persistent=False)
        self.expected_std = expected_std
        self.variance_weight = variance_weight
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start

    def forward(self, tokens: Tensor, row: Tensor) -> Tensor:
        """``row``: (B,) which report each image belongs to."""
        tokens = tokens.float()
        image = F.normalize(tokens.mean(1), dim=-1)
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        loss = _soft_nce(scale * image @ self.reports.T, self.group[row][:, None] == self.group[None])
        if not self.training:
            return loss
        if len(row) > 1:
            same = self.group[row][:, None] == self.group[row][None]
            loss = (loss + _soft_nce(scale * self.reports[row] @ image.T, same)) / 2
        std = (tokens.flatten(0, 1).var(dim=0, correction=0) + 1e-8).sqrt()  # of a single token 0, not NaN
        return loss + self.variance_weight * F.relu(1 - std / self.expected_std).mean()


def _soft_nce(logits: Tensor, positive: Tensor) -> Tensor:
    """−log of the probability of any positive; its minimum is 0, however many reports are the same text."""
    positives = logits.masked_fill(~positive, -torch.inf).logsumexp(-1)
    return (logits.logsumexp(-1) - positives).mean()


class Stage1(nn.Module):
    """The vision part under one of the objectives; what ``train.py`` optimises."""

    def __init__(self, vision: VisionBridge, objective: nn.Module) -> None:
        super().__init__()
        self.vision = vision
        self.objective = objective

    def forward(self, batch: dict) -> Tensor:
        """Sums (6,) of the batch's losses: the objective's over its cases, and the findings head's. The loss is the sum
        of their means over :func:`stage1_counts`. The objective compares the cases of all processes."""
        tokens, found = self.vision.read(batch)  # without CMI: it reads the question and is trained in Stage 2
        head = tokens.new_zeros(5) if found is None else findings_loss(found, batch["targets"])
        counted = batch["row"] >= 0
        cases, rows = gather_cases(tokens[counted], batch["row"][counted])
        objective = self.objective(cases, rows) if len(rows) else cases.sum()  # 0; the mean of no case is NaN
        return torch.cat([(objective * counted.sum())[None], head])


def stage1_counts(batch: dict) -> Tensor:
    """How many cases and known targets (6,) the sums of :class:`Stage1` are of."""
    return torch.cat([(batch["row"] >= 0).sum()[None], known_targets(batch["targets"])])


def gather_cases(tokens: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """``tokens`` (B, ...) and ``row`` (B,) of all processes, process after process; B may differ between them.

    Every process gets the whole, and the gradient of the sum of all processes' losses. Each process writes its part
    into zeros, and the sum of these is the whole: that is differentiable with every backend.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tokens, row
    sizes = row.new_zeros(dist.get_world_size())
    sizes[dist.get_rank()] = len(row)
    dist.all_reduce(sizes)
    before, total = int(sizes[: dist.get_rank()].sum()), int(sizes.sum())
    after = total - before - len(row)
    rows = F.pad(row, (before, after))
    dist.all_reduce(rows)
    padded = torch.cat(
        [tokens.new_zeros(before, *tokens.shape[1:]), tokens, tokens.new_zeros(after, *tokens.shape[1:])]
    )
    return all_reduce(padded), rows
