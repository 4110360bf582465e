"""Language models of any size with random weights: time and memory do not depend on what the weights say."""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast
from transformers.models.mamba.modeling_mamba import MambaMixer

from engine.benchmark.sizes import Size
from models.language_model.mamba_lm import MambaLM

END = "<|endoftext|>"


def lm_config(size: Size, layers: int | None = None) -> MambaConfig:
    return MambaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=layers or size.layers,
        state_size=size.state,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


@torch.no_grad()
def random_mamba(size: Size, device: torch.device, layers: int | None = None) -> MambaForCausalLM:
    """transformers' own model, built in its dtype at once: no float32 copy of it ever exists."""
    with torch.device("meta"):
        model = MambaForCausalLM(lm_config(size, layers))
    model.to(size.dtype)
    mixers = [module for module in model.modules() if isinstance(module, MambaMixer)]
    for mixer in mixers:  # as MambaLM.load leaves them
        mixer.A_log.data, mixer.D.data = mixer.A_log.data.float(), mixer.D.data.float()
    model.to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        _fill(name, parameter)
    for mixer in mixers:
        mixer.A_log.copy_(torch.arange(1.0, size.state + 1, device=device).log().expand_as(mixer.A_log))
        step = torch.empty_like(mixer.dt_proj.bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
        mixer.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
    return model.eval().requires_grad_(False)


def _fill(name: str, parameter: Tensor) -> None:
    if parameter.ndim == 1:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    else:
        deviation = 0.02 if "embeddings" in name else parameter[0].numel() ** -0.5
        parameter.uniform_(-deviation * math.sqrt(3), deviation * math.sqrt(3))


def same_weights(model: MambaForCausalLM) -> MambaForCausalLM:
    """A second model over the same memory, so that what is changed in the one's modules leaves the other alone."""
    with torch.device("meta"):
        twin = MambaForCausalLM(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    return twin.eval().requires_grad_(False)


def make_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """As many tokens as the real one has; the text means nothing."""
    vocabulary = {END: 0} | {f"w{number}": number for number in range(1, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=END)


def our_lm(model: MambaForCausalLM, size: Size) -> MambaLM:
    """Ours over a transformers model, which is changed in place."""
    return MambaLM(model, make_tokenizer(size.tokens), f"random {size.name}")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, shared ones once: what one token must read (the table, because the head is tied to it)."""
    return sum({p.data_ptr(): p.nbytes for p in [*model.parameters(), *model.buffers()]}.values())
