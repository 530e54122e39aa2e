"""Tiny models built from transformers' configuration classes, with biases and norms moved off their initial values."""

from __future__ import annotations

import torch

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_model(architecture: str = "llama", *, width: int = 96, blocks: int = 4, seed: int = 0, **settings):
    """A causal language model with grouped-query attention: hidden 32, 4 heads, 2 KV heads, vocabulary 128."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture == "llama_bias":
        architecture, settings = "llama", {"mlp_bias": True, "attention_bias": True, **settings}
    config = AutoConfig.for_model(
        architecture,
        **{
            "hidden_size": 32,
            "intermediate_size": width,
            "num_hidden_layers": blocks,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            **settings,
        },
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Initial values hide errors: a zero bias or a unit norm may be dropped without anybody noticing.
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            elif "proj" in name:
                parameter *= 6 * (1 + 0.5 * torch.rand(parameter.shape[0], 1))
    return model


def tokens(n: int = 8, length: int = 32, seed: int = 0, vocabulary: int = 128) -> torch.Tensor:
    """Random ids [n, length]."""
    return torch.randint(vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))
