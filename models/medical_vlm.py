"""Assembly: scan and question in, report out.

images [B, K, C_in, H, W] (2-D)  or  [B, C_in, z, y, x] (3-D)
  NnUNetEncoder → features [B, K, C, T, T]
  RoI crop      → [B, K, C, r, r]               (optional: the centre; for lesions the bridge adds tokens instead)
  VimBridge     → visual [B, L, D]
  FindingsHead  → findings and measured lesions, with probabilities    (beside the way of the tokens)
  CMI           → visual [B, L', D]             (optional, steered by the question)
  [visual][findings prompt][question]\\n[answer]  → frozen Mamba → loss on the answer, or generated text
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from config.errors import InputError
from config.schema import Config
from models.cmi import CMI
from models.findings_head import DESCRIPTORS, FindingsHead, Found, findings_loss, known_targets
from models.language_model.mamba_lm import IGNORED, MambaLM
from models.nnunet.encoder import NnUNetEncoder
from models.pretrained import Pretrained
from models.roi_crop import center_crop
from models.vim_bridge import Bridge, BridgeSpec, VimBridge, grid_side

Images = Tensor | list[Tensor]


def check_regions(config: Config) -> None:
    """Raises InputError where RoI, feature grid, slices and token budget do not fit each other; reads no weights."""
    lesion, side, grid = config.roi_policy == "lesion", config.roi_side, config.encoder_target_spatial
    if lesion and not side:
        raise InputError("roi_policy is lesion and roi_side is empty: set it, e.g. 7 for 49 tokens around a lesion")
    if side and side > grid:
        features = f"the {grid} x {grid} features: lower roi_side, or raise encoder_target_spatial"
        raise InputError(f"roi_side {side} is larger than {features}")
    grid_side(config.max_visual_tokens, config.slices or 1, side or grid, side**2 if lesion else 0)


class VisionBridge(nn.Module):
    """Everything that is trained, and everything a checkpoint's ``model_state_dict`` holds."""

    def __init__(self, encoder: NnUNetEncoder, bridge: Bridge, cmi: CMI | None, *, centre_crop: int | None) -> None:
        """``centre_crop``: side of the central features that the bridge reads; None: all of them."""
        super().__init__()
        self.encoder = encoder
        self.bridge = bridge
        self.cmi = cmi
        self.head: FindingsHead | None = None
        self.centre_crop = centre_crop

    @classmethod
    def build(
        cls,
        config: Config,
        encoder: NnUNetEncoder,
        llm_width: int,
        output_std: float,
        *,
        with_cmi: bool,
        findings: Sequence[str] = (),
    ) -> VisionBridge:
        """A fresh bridge (and CMI) around ``encoder``, as the configuration describes, with a head for ``findings``
        where there are any. Raises: as check_regions."""
        check_regions(config)
        around_lesions, side = config.roi_policy == "lesion", config.roi_side
        spec = BridgeSpec(
            encoder.out_channels,
            llm_width,
            output_std,
            width=config.bridge_width,
            depth=config.bridge_depth,
            grid=config.encoder_target_spatial,
            max_visual_tokens=config.max_visual_tokens,
            lesion_side=side if around_lesions else 0,
        )
        cmi = CMI(llm_width, compress_to=config.cmi_compress_to) if with_cmi else None
        vision = cls(encoder, VimBridge(spec), cmi, centre_crop=None if around_lesions else side)
        vision.add_head(findings)
        return vision

    def add_head(self, findings: Sequence[str]) -> None:
        """A fresh head for these findings; none for none."""
        self.head = FindingsHead(findings, self.bridge.spec.out_width, DESCRIPTORS) if findings else None

    def train(self, mode: bool = True) -> VisionBridge:
        """A frozen encoder stays as nnU-Net trained it, the statistics of its batch norms too."""
        super().train(mode)
        self.encoder.train(mode and any(p.requires_grad for p in self.encoder.parameters()))
        return self

    def features(self, images: Images) -> Tensor:
        """(B, K, C, T, T). A list holds cases of different size, each (K, C_in, H, W) or (C_in, z, y, x)."""
        if isinstance(images, list):
            return torch.cat([self.features(image[None]) for image in images])
        if self.encoder.dim == 3:
            return self.encoder(images)
        B, K = images.shape[:2]
        return self.encoder(images.flatten(0, 1)).unflatten(0, (B, K))

    def visual_tokens(self, features: Tensor, slice_position: Tensor, roi: Tensor | None = None) -> Tensor:
        """The bridge's tokens (B, L, D), which do not depend on the question; the findings head reads them.

        ``roi`` (B, K, 4) is for a bridge with tokens around lesions."""
        corner = (0, 0)
        if self.centre_crop is not None:
            B, K = features.shape[:2]
            cropped, corner = center_crop(features.flatten(0, 1), self.centre_crop)
            features = cropped.unflatten(0, (B, K))
        return self.bridge(features, slice_position, corner, roi)

    def read(self, batch: Mapping[str, Any], features: Tensor | None = None) -> tuple[Tensor, Found | None]:
        """:meth:`visual_tokens` at a batch's ``images`` (or their ``features``), and what the findings head says, with
        ``lesions``."""
        features = self.features(batch["images"]) if features is None else features
        seen = self.visual_tokens(features, batch["slice_position"], batch["roi"])
        return seen, self.head(seen, batch["lesions"]) if self.head is not None else None

    def steer(self, visual: Tensor, question: Tensor | None, question_mask: Tensor | None) -> Tensor:
        """CMI of tokens (B, L, D) with the question's embeddings (B, Lq, D), where the model has it."""
        if self.cmi is not None:
            if question is None or question_mask is None:
                raise ValueError("CMI is part of this model: the question's embeddings are needed")
            visual = self.cmi(visual, question, question_mask)
        return visual

    def freeze(self, *, train_encoder: bool) -> str:
        """The one place that says what is trained; returns it in words, with parameter counts."""
        self.encoder.requires_grad_(train_encoder)
        # Deeper stages get no data, and data-parallel runs expect a gradient for every trained parameter.
        self.encoder.encoder.stages[self.encoder.output_stage + 1 :].requires_grad_(False)
        parts = []
        for name in ("encoder", "bridge", "cmi", "head"):
            if (part := getattr(self, name)) is not None:
                count = sum(p.numel() for p in part.parameters())
                trained = any(p.requires_grad for p in part.parameters())
                parts.append(f"{name} {count / 1e6:.2f} M ({'trained' if trained else 'frozen'})")
        return ", ".join(parts)


class MedicalVLM(nn.Module, Pretrained):
    """The trained vision part and the frozen language model."""

    vision_type = VisionBridge

    def __init__(self, vision: VisionBridge, lm: MambaLM) -> None:
        super().__init__()
        self.vision = vision
        self.lm = lm

    def train(self, mode: bool = True) -> MedicalVLM:
        super().train(mode)
        self.lm.eval()  # frozen: it has no training mode
        return self

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Sums (6,) of the batch's losses: of the caption over the answer tokens (nats), and the findings head's.
        The loss is the sum of their means over :func:`loss_counts`."""
        visual, found = self.read(batch)
        head = visual.new_zeros(5) if found is None else findings_loss(found, batch["targets"])
        return torch.cat([self.caption_loss(visual, batch)[0][None], head])

    def read(self, batch: Mapping[str, Any], features: Tensor | None = None) -> tuple[Tensor, Found | None]:
        """Visual tokens (B, L, D) of a batch, or of ``features`` with its question, and what the findings head says."""
        seen, found = self.vision.read(batch, features)
        question = self.lm.embed(batch["question_ids"]).float()
        return self.vision.steer(seen, question, batch["question_mask"]), found

    def caption_loss(self, visual: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The caption loss of :meth:`forward`, from the visual tokens (B, L, D)."""
        inputs, labels = answer_inputs(self.lm, visual, batch)
        return self.lm.answer_loss(inputs, labels)


def loss_counts(batch: Mapping[str, Any]) -> Tensor:
    """How many answer tokens and known targets (6,) the sums of :class:`MedicalVLM` are of; known before they are."""
    return torch.cat([batch["answer_mask"].sum()[None], known_targets(batch["targets"])])


@torch.no_grad()
def generate_reports(
    lm: MambaLM, visual: Tensor, batch: Mapping[str, Any], max_new_tokens: int, **options: object
) -> list[str]:
    """Generation from visual tokens computed before, so that the vision part can be freed first.

    Args:
        visual: (B, L, D).
        batch: as for :func:`prompt_ids`.
    """
    dtype = lm.model.get_input_embeddings().weight.dtype
    asked = [prompt_ids(batch, b) for b in range(len(visual))]
    longest = max(map(len, asked))
    prompts, masks = [], []
    for b, ids in enumerate(asked):
        prompt = torch.cat([visual[b].to(dtype), lm.embed(ids)])
        padding = longest - len(ids)
        prompts.append(nn.functional.pad(prompt, (0, 0, padding, 0)))
        masks.append(nn.functional.pad(torch.ones(len(prompt), device=prompt.device, dtype=torch.long), (padding, 0)))
    return lm.generate(torch.stack(prompts), torch.stack(masks), max_new_tokens, **options)


def prompt_ids(batch: Mapping[str, Any], b: int) -> Tensor:
    """Ids of the findings prompt, where the batch has one, and of the question of row ``b``.

    ``batch``: ``question_ids`` and ``question_mask``, both (B, Lq), padded on the right; ``key_point_ids`` alike.
    """
    names = ("key_point", "question") if "key_point_ids" in batch else ("question",)
    return torch.cat([batch[f"{name}_ids"][b, batch[f"{name}_mask"][b].bool()] for name in names])


def answer_inputs(lm: MambaLM, visual: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """``[visual][findings prompt][question]\\n[answer]`` embedded, padded on the right, and labels, of the answer
    alone.

    Args:
        visual: (B, L, D).
        batch: as for :func:`prompt_ids`, and ``answer_ids`` and ``answer_mask``, both (B, La).

    Returns:
        (B, L, D) embeddings in the LLM's dtype, and (B, L) labels.
    """
    table = lm.model.get_input_embeddings().weight
    rows, labels = [], []
    for b in range(visual.shape[0]):
        question = prompt_ids(batch, b)
        answer = batch["answer_ids"][b, batch["answer_mask"][b].bool()]
        rows.append(torch.cat([visual[b].to(table.dtype), lm.embed(torch.cat([question, answer]))]))
        before = torch.full((visual.shape[1] + len(question),), IGNORED, device=answer.device)
        labels.append(torch.cat([before, answer]))
    inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return inputs, nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
