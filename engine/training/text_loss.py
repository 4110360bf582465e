"""What the language model reaches on the reports alone, and what a caption loss far above it means."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator

from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset, encode_answer, encode_prompt, pad_tokens
from data.report_language.key_points import write_key_points
from models.medical_vlm import MedicalVLM

REPORTS = 32  # of the validation table, on which the loss is measured
# Nats a token. A model that writes reports from their key points has well below 1, one that writes words of the reports
# in no order about 3, and one that never read such text 4 and more.
GARBLED = 2.5
FAR = 1.0  # above the loss from text alone, the image does harm


@torch.no_grad()
def text_loss(
    accelerator: Accelerator, model: MedicalVLM, data: MedicalVLMDataset, collator: CaptionCollator
) -> float | None:
    """Loss (nats a token) of validation reports after their true key points and question, without an image; it is
    printed. None where the labeller does not know the language of the reports."""
    if data.language is None:
        return None
    lm, total, counted = model.lm, 0.0, 0
    rows = [row for row, stated in enumerate(data.stated) if stated is not None][:REPORTS]
    for row in rows:
        line = write_key_points(data.stated[row], data.language)
        prompt = encode_prompt(lm.tokenizer, data.questions[row], collator.max_question_tokens, line)
        answer, _ = encode_answer(lm.tokenizer, data.rows[row].answer, collator.max_answer_tokens)
        batch = {}
        for name, ids in (("question", prompt), ("answer", answer)):
            batch[f"{name}_ids"], batch[f"{name}_mask"] = (part.to(lm.model.device) for part in pad_tokens([ids]))
        with accelerator.autocast():
            loss, count = model.caption_loss(torch.zeros(1, 0, lm.width, device=lm.model.device), batch)
        total, counted = total + loss.item(), counted + int(count)
    value = total / counted
    what = f"{len(rows)} validation reports, from their true key points without an image"
    accelerator.print(f"language model on {what}: {value:.3f} nats a token", flush=True)
    return value


def far_above(caption_loss: float, text: float | None, args: argparse.Namespace) -> str:
    """The cause of a validation loss that says the reports will be garbled, and the next command; empty for none.

    Args:
        caption_loss: the lowest of the training, nats a token. text: of :func:`text_loss`.
    """
    if caption_loss > GARBLED and (text is None or text > GARBLED - FAR):
        known = "" if text is None else f" ({text:.2f} even from their true key points)"
        stage0 = "python scripts/adapt_language_model.py" + (f" --config {args.config}" if args.config else "")
        cause = f"the language model has not learnt to write such reports{known}"
        remedy = f"run Stage 0,  {stage0}  , and set language_model_adapters"
        remedy += "" if args.lora_rank else ", or train with --lora_rank 16"
    elif text is not None and caption_loss > text + FAR:
        cause = (
            f"from their true key points the language model reaches {text:.2f}, from these visual tokens it does not"
        )
        remedy = "train longer, or start from a Stage-1 checkpoint (--vision_checkpoint)"
    else:
        return ""
    return f"warning: caption loss {caption_loss:.2f} nats a token, expected below 1: {cause}; {remedy}"
