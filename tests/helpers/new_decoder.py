"""A decoder that no version of transformers has, as one might appear tomorrow: names and structure are usual ones."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class TomorrowConfig(PretrainedConfig):
    model_type = "tomorrow"

    def __init__(self, width=88, heads=6, head_dim=8, hidden_size=48, num_hidden_layers=3, vocab_size=96, **kwargs):
        self.width, self.heads, self.head_dim = width, heads, head_dim
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size
        self.num_attention_heads, self.max_position_embeddings = heads, 64
        super().__init__(**kwargs)


class TomorrowAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        inner = config.heads * config.head_dim
        self.head_dim, self.layer_idx = config.head_dim, layer_idx
        self.query_key_value = nn.Linear(config.hidden_size, 3 * inner)
        self.dense = nn.Linear(inner, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:2], -1, 3 * self.head_dim)
        q, k, v = self.query_key_value(hidden_states).view(shape).transpose(1, 2).chunk(3, -1)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2])
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        return self.dense((weights @ v).transpose(1, 2).flatten(2)), weights


class TomorrowFeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.width, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.width, bias=False)
        self.w2 = nn.Linear(config.width, config.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class TomorrowLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.attention, self.feed_forward = TomorrowAttention(config, layer_idx), TomorrowFeedForward(config)

    def forward(self, hidden_states, **kwargs):
        x = self.norm(hidden_states)
        return hidden_states + self.attention(x, **kwargs)[0] + self.feed_forward(x)


class TomorrowPreTrainedModel(PreTrainedModel):
    config_class = TomorrowConfig
    base_model_prefix = "transformer"


class TomorrowModel(TomorrowPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList([TomorrowLayer(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, inputs_embeds=None, past_key_values=None, use_cache=None, **kwargs):
        from transformers import DynamicCache

        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = create_causal_mask(self.config, hidden, None, past_key_values)
        for layer in self.stack:
            hidden = layer(hidden, attention_mask=mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)


class TomorrowForCausalLM(TomorrowPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = TomorrowModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        kwargs.pop("logits_to_keep", None)
        output = self.transformer(input_ids, **{k: v for k, v in kwargs.items() if k != "attention_mask"})
        logits = self.lm_head(output.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)
