"""The encoder of a fresh run, and the plan that its input follows, out of the user's nnU-Net checkpoint."""

from __future__ import annotations

from config.nnunet_plans import PreprocessPlan
from config.schema import Config
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder


def load_encoder(config: Config) -> tuple[NnUNetEncoder, PreprocessPlan]:
    """Raises: InputError when the checkpoint is missing, unsafe, or not nnU-Net's."""
    source = load_nnunet_checkpoint(config.resolved("nnunet_encoder_checkpoint"))
    encoder = NnUNetEncoder.from_checkpoint(
        source,
        output_stage=config.encoder_output_stage,
        target_spatial=config.encoder_target_spatial,
        planes=config.slices,
    )
    return encoder, PreprocessPlan.from_nnunet(source.plans, source.configuration, config.image_axis_order)


def load_plan(config: Config) -> PreprocessPlan:
    """The plan alone, for what prepares data. Raises InputError as :func:`load_encoder` does."""
    source = load_nnunet_checkpoint(config.resolved("nnunet_encoder_checkpoint"))
    return PreprocessPlan.from_nnunet(source.plans, source.configuration, config.image_axis_order)
