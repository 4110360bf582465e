"""What the repository ships for the quick start: whole, small, in half precision, refused with a patient's scan."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from config.toy_models import is_toy
from engine.chain import SHIPPED_LANGUAGE_MODEL, SHIPPED_NNUNET
from models.language_model.embedding_table import load_embedding_table
from models.language_model.mamba_lm import MambaLM
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.unet import SegmentationUNet

ASSETS = Path(__file__).resolve().parents[1] / "assets"
MODELS_MB = 6.0


def test_digests_are_those_of_the_files() -> None:
    lines = [line.split(maxsplit=1) for line in (ASSETS / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]
    shipped = {str(path.relative_to(ASSETS).as_posix()) for path in ASSETS.rglob("*") if path.is_file()}
    assert {name for _, name in lines} == shipped - {"README.md", "SHA256SUMS"}
    for digest, name in lines:
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name


def test_shipped_models_are_small_stamped_and_load_in_float32() -> None:
    files = [path for name in ("nnunet", "mamba_general") for path in (ASSETS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MODELS_MB * 1e6
    assert is_toy(SHIPPED_LANGUAGE_MODEL) and is_toy(SHIPPED_NNUNET)
    source = load_nnunet_checkpoint(SHIPPED_NNUNET)
    stored = [value for value in source.network_state.values() if value.is_floating_point()]
    assert {value.dtype for value in stored} == {torch.float16}
    lm = MambaLM.load(str(SHIPPED_LANGUAGE_MODEL))
    parameters = [*SegmentationUNet.from_checkpoint(source).parameters(), *lm.parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert torch.equal(load_embedding_table(str(SHIPPED_LANGUAGE_MODEL)), lm.model.get_input_embeddings().weight)
