"""Tiny causal language models of many architectures, built from transformers' configuration classes.

Each entry of :data:`ARCHITECTURES` says what the model's structure is, in words that a test can hold a view against:
where the matrices are, how fused ones are laid out, what can be removed.
``tests/unit/helpers/test_tiny_architectures.py`` checks each description on the model itself, so that it does not
repeat the code under test.

Hidden 48, 6 heads in 3 KV groups where the family has groups, 88 neurons or experts of 40, vocabulary 96. Where the
configuration has a head size of its own it is 12, so that hidden // heads (8) is wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

FFNKind = Literal["gated", "fused_gated", "plain", "experts"]
AttentionKind = Literal[
    "separate", "fused_concatenated", "fused_interleaved", "fused_grouped", "fused_partitioned", "mla"
]

BLOCKS = 4
VOCABULARY = 96
HIDDEN = 48
WIDTH = 88
EXPERT_WIDTH = 40
#: Shorter than the tests' texts, so that a window is seen to matter.
WINDOW = 8
#: CodeGen's qkv is laid out for this many accelerators, a number written into its forward.
PARTITIONS = 4


@dataclass(frozen=True)
class Architecture:
    """A tiny model and what its structure is.

    Attributes:
        settings: of the configuration class of ``model_type``.
        blocks: attribute path of the list of blocks, from the causal language model.
        ffn_path: of the FFN in a block; "" where the block itself holds the matrices.
        ffn_names: (gate, up, down), (gate_up, down) or (up, down) of the dense FFN.
        attention_names: (q, k, v, o), (qkv, o), or those of latent attention.
        transposed: weights are [in, out] (transformers' Conv1D).
        width: neurons of a dense FFN; 0 where every block is a mixture of experts.
        parallel: attention and FFN read the same hidden state; their outputs are added to it together.
        no_heads: why whole KV groups cannot be removed from this attention; None where they can.
        experts: what a mixture of experts is, None for a dense model.
    """

    name: str
    model_type: str
    settings: Mapping[str, Any]
    ffn: FFNKind = "gated"
    ffn_path: str = "mlp"
    ffn_names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    attention: AttentionKind = "separate"
    attention_path: str = "self_attn"
    attention_names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    blocks: str = "model.layers"
    hidden: int = HIDDEN
    width: int = WIDTH
    n_heads: int = 6
    n_kv_heads: int = 3
    head_dim: int = 8
    transposed: bool = False
    parallel: bool = False
    no_heads: str | None = None
    experts: Experts | None = None

    def build(self, seed: int = 0) -> Any:
        """The model with random weights, float32, in eval mode; ``seed`` decides every weight."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if self.model_type == PER_EXPERT:
            register_per_expert_mixtral()
        config = AutoConfig.for_model(self.model_type, **self.settings)
        # Some initial values are random (GPT-OSS's sinks), and :func:`randomise` adds to them.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # Of torch, about a function in GPTBigCode's module of transformers 5.14.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(model, seed)
        return model

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        return model.get_submodule(self.blocks)  # type: ignore[return-value]

    def is_sparse(self, block: int) -> bool:
        """Whether the FFN of block ``block`` is a mixture of experts."""
        return self.experts is not None and block not in self.experts.dense_blocks

    def rows(self, part: Literal["q", "k", "v"], head: int) -> Tensor:
        """Indices of the rows (outputs) of q, k or v of one head, in their own or in the fused matrix.

        ``head`` counts query heads for q, KV heads for k and v.
        """
        d = self.head_dim
        own = torch.arange(head * d, (head + 1) * d)
        after_q, after_k = self.n_heads * d, (self.n_heads + self.n_kv_heads) * d
        match self.attention:
            case "separate":
                return own
            case "fused_concatenated":  # all q, all k, all v
                return own + {"q": 0, "k": after_q, "v": after_k}[part]
            case "fused_interleaved":  # q, k, v of head 0, then of head 1, ...
                return torch.arange(d) + (3 * head + {"q": 0, "k": 1, "v": 2}[part]) * d
            case "fused_grouped":  # the q heads of group 0, its k, its v, then group 1, ...
                queries = self.n_heads // self.n_kv_heads
                group, place = divmod(head, queries) if part == "q" else (head, queries + (part == "v"))
                return torch.arange(d) + (group * (queries + 2) + place) * d
            case "fused_partitioned":  # q, v, k (in this order) of the heads of partition 0, then of partition 1, ...
                local = self.n_heads // PARTITIONS
                partition, place = divmod(head, local)
                third = {"q": 0, "v": 1, "k": 2}[part]
                return torch.arange(d) + ((3 * partition + third) * local + place) * d
            case _:
                raise ValueError(f"{self.name}: {self.attention} has no rows of single heads")

    def output_columns(self, query_head: int) -> Tensor:
        """Indices of the inputs of the output projection that one query head makes; the same in every family."""
        return torch.arange(query_head * self.head_dim, (query_head + 1) * self.head_dim)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Attributes:
        layout: "fused" is one parameter [E, ...] per matrix; "modules" is an nn.ModuleList of experts.
        router: attribute of the mixture whose ``weight`` is [E, hidden].
        names: matrices of the experts; fused: (gate_up, down), modules: (gate, up, down).
        transposed: fused matrices are [E, in, out] instead of [E, out, in].
        interleaved: rows of gate and up alternate, gate first; otherwise all of gate, then all of up.
        biases: fused matrices have biases, ``<name>_bias``, and the router has one.
        groups: the router chooses groups of experts first, so each group must keep the same number.
        dense_blocks: blocks that have an ordinary gated FFN.
        shared: attribute of the expert that sees every token, a gated FFN of ``shared_width`` neurons.
    """

    n: int = 6
    top_k: int = 2
    width: int = EXPERT_WIDTH
    layout: Literal["fused", "modules"] = "fused"
    router: str = "gate"
    names: tuple[str, ...] = ("gate_up_proj", "down_proj")
    transposed: bool = False
    interleaved: bool = False
    biases: bool = False
    groups: int = 1
    dense_blocks: tuple[int, ...] = ()
    shared: str | None = None
    shared_width: int = 0


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter a value that matters: initial ones hide errors (zero biases, unit norms, even routing)."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tables = [id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "norm" in name:
            parameter += 0.3 * noise(*parameter.shape)
        elif id(parameter) in tables:
            parameter.copy_(0.5 * noise(*parameter.shape))
        else:
            # Rows of unlike size: units of unlike importance, and tokens that are not shared evenly among experts.
            scale = 0.5 + torch.rand(parameter.shape[:-1], generator=generator)
            parameter.copy_(0.2 * noise(*parameter.shape) * scale[..., None])
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer += 0.1 * noise(*buffer.shape)


PER_EXPERT = "per_expert_mixtral"


@cache
def register_per_expert_mixtral() -> None:
    """Mixtral with one module per expert, as transformers had it before version 5 and as other people's code has it.

    No class of the installed transformers keeps its experts in an nn.ModuleList any more.
    """
    import transformers
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        MixtralModel,
    )

    class PerExpertMixtralConfig(MixtralConfig):
        model_type = PER_EXPERT

    class PerExpertMixtralModel(MixtralModel):
        config_class = PerExpertMixtralConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.layers:
                layer.mlp = PerExpertMixture(config)

    class PerExpertMixtralForCausalLM(MixtralForCausalLM):
        config_class = PerExpertMixtralConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = PerExpertMixtralModel(config)
            self.post_init()

    for cls in (PerExpertMixtralModel, PerExpertMixtralForCausalLM):
        cls.config = PerExpertMixtralConfig
        # As if transformers had it: what is imported from there, and said to come from there.
        cls.__module__ = "transformers.models.per_expert_mixtral"
        setattr(transformers, cls.__name__, cls)
    transformers.PerExpertMixtralConfig = PerExpertMixtralConfig
    AutoConfig.register(PER_EXPERT, PerExpertMixtralConfig)
    AutoModel.register(PerExpertMixtralConfig, PerExpertMixtralModel)
    AutoModelForCausalLM.register(PerExpertMixtralConfig, PerExpertMixtralForCausalLM)


class PerExpert(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PerExpertMixture(nn.Module):
    """Softmax over the experts, the largest ``top_k`` rescaled to a sum of 1; an expert runs on its tokens only."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, self.num_experts, bias=False)
        self.experts = nn.ModuleList(PerExpert(config) for _ in range(self.num_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        states = hidden_states.flatten(0, 1)
        weights, chosen = self.gate(states).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        total = torch.zeros_like(states)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            total.index_add_(0, token, expert(states[token]) * weights[token, place, None])
        return total.view_as(hidden_states)


_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
#: Names that most configuration classes share.
_LLAMA = {
    **_IDS,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
#: Names of the GPT-2 family.
_GPT = {**_IDS, "n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 6, "n_inner": WIDTH, "n_positions": 128}
_FALCON = {
    **_IDS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 6,
    "ffn_hidden_size": WIDTH,
    "bias": True,
    "max_position_embeddings": 128,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * (BLOCKS // 2)

#: Positions are a slope per head, made by the model for all heads and handed to every block.
_ALIBI = "ALiBi: positions are a slope per head"
_ONE_GROUP = "multi-query attention has one KV group"
_ACROSS = "a norm spans all heads"
_PER_HEAD = "norms have weights per head"
_LATENT = "multi-head latent attention"


def _llama_like(name: str, model_type: str | None = None, **keys: Any) -> Architecture:
    """An entry of Llama's names; keys are fields of :class:`Architecture`, and the rest settings."""
    own = {key: keys.pop(key) for key in list(keys) if key in Architecture.__dataclass_fields__}
    head_dim = own.setdefault("head_dim", keys.get("head_dim", 8))
    if head_dim != 8:  # so that hidden_size // num_attention_heads is the wrong answer
        keys["head_dim"] = head_dim
    settings = {
        **_LLAMA,
        "num_key_value_heads": own.get("n_kv_heads", 3),
        "num_attention_heads": own.get("n_heads", 6),
        **keys,
    }
    return Architecture(name, model_type or name, settings, **own)


_OPT_NAMES = {"ffn": "plain", "ffn_path": "", "ffn_names": ("fc1", "fc2"), "blocks": "model.decoder.layers"}
_OPT_ATTENTION = {"attention_names": ("q_proj", "k_proj", "v_proj", "out_proj"), "n_kv_heads": 6}
_OPT = {
    **_IDS,
    "hidden_size": HIDDEN,
    "ffn_dim": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
_4H = ("dense_h_to_4h", "dense_4h_to_h")
_QKV = ("query_key_value", "dense")
_NEOX = {
    "ffn": "plain",
    "ffn_names": _4H,
    "attention": "fused_interleaved",
    "attention_path": "attention",
    "attention_names": _QKV,
    "n_kv_heads": 6,
    "blocks": "gpt_neox.layers",
}
_FALCON_NAMES = {
    "ffn": "plain",
    "ffn_names": _4H,
    "attention_path": "self_attention",
    "attention_names": _QKV,
    "blocks": "transformer.h",
}
_GPT_NAMES = {
    "ffn": "plain",
    "ffn_names": ("c_fc", "c_proj"),
    "attention_path": "attn",
    "attention_names": ("c_attn", "c_proj"),
    "blocks": "transformer.h",
}
_GPTJ_NAMES = {
    "ffn": "plain",
    "ffn_names": ("fc_in", "fc_out"),
    "attention_path": "attn",
    "n_kv_heads": 6,
    "blocks": "transformer.h",
    "parallel": True,
}
_FUSED = {"ffn": "fused_gated", "ffn_names": ("gate_up_proj", "down_proj")}
_MLA = {
    "attention": "mla",
    "attention_names": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "n_kv_heads": 6,
    "no_heads": _LATENT,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_DEEPSEEK = {
    "ffn": "experts",
    "moe_intermediate_size": EXPERT_WIDTH,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    **_MLA,
}
_DEEPSEEK_EXPERTS = {"n": 8, "dense_blocks": (0,), "shared": "shared_experts", "shared_width": 2 * EXPERT_WIDTH}
_MOE = {"ffn": "experts", "moe_intermediate_size": EXPERT_WIDTH, "num_experts_per_tok": 2, "num_experts": 6}

_ENTRIES = (
    # Gated FFN, separate projections.
    _llama_like("llama"),
    _llama_like("llama_bias", "llama", mlp_bias=True, attention_bias=True),
    _llama_like("mistral", head_dim=12, sliding_window=WINDOW),
    _llama_like("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    _llama_like("qwen3", head_dim=12),
    _llama_like("gemma", head_dim=12, tie_word_embeddings=True),
    _llama_like(
        "gemma2",
        head_dim=12,
        tie_word_embeddings=True,
        sliding_window=WINDOW,
        query_pre_attn_scalar=10,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    _llama_like(
        "gemma3",
        "gemma3_text",
        head_dim=12,
        tie_word_embeddings=True,
        sliding_window=WINDOW,
        query_pre_attn_scalar=10,
        layer_types=_ALTERNATING,
    ),
    _llama_like("olmo", clip_qkv=2.0),
    _llama_like("olmo2", no_heads=_ACROSS),
    _llama_like("smollm3", no_rope_layers=[1, 0, 1, 0], mlp_bias=True, attention_bias=True),
    _llama_like("stablelm", use_qkv_bias=True),
    _llama_like("stablelm_parallel", "stablelm", use_qkv_bias=True, use_parallel_residual=True, parallel=True),
    _llama_like("stablelm_norms", "stablelm", qk_layernorm=True, no_heads=_PER_HEAD),
    _llama_like("cohere", parallel=True, logit_scale=0.25, attention_bias=True, tie_word_embeddings=True),
    _llama_like("cohere_norms", "cohere", parallel=True, use_qk_norm=True, logit_scale=0.25, no_heads=_PER_HEAD),
    _llama_like(
        "cohere2", parallel=True, logit_scale=0.25, head_dim=12, sliding_window=WINDOW, layer_types=_ALTERNATING
    ),
    _llama_like(
        "granite",
        embedding_multiplier=2.0,
        attention_multiplier=0.5,
        residual_multiplier=0.6,
        logits_scaling=1.5,
        attention_bias=True,
        mlp_bias=True,
    ),
    # Gated FFN with gate and up in one matrix.
    _llama_like("glm", head_dim=12, attention_bias=True, **_FUSED),
    _llama_like("glm4", head_dim=12, attention_bias=True, **_FUSED),
    _llama_like("phi3", attention="fused_concatenated", attention_names=("qkv_proj", "o_proj"), **_FUSED),
    # Plain FFN.
    Architecture("opt", "opt", _OPT, **_OPT_NAMES, **_OPT_ATTENTION),
    Architecture(
        "opt_350m",
        "opt",
        {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
        **_OPT_NAMES,
        **_OPT_ATTENTION,
    ),
    _llama_like("gpt_neox", parallel=True, **_NEOX),
    _llama_like("gpt_neox_sequential", "gpt_neox", use_parallel_residual=False, **_NEOX),
    Architecture("gpt2", "gpt2", _GPT, attention="fused_concatenated", n_kv_heads=6, transposed=True, **_GPT_NAMES),
    Architecture(
        "falcon_7b",
        "falcon",
        {**_FALCON, "multi_query": True, "parallel_attn": True},
        attention="fused_concatenated",
        n_kv_heads=1,
        parallel=True,
        no_heads=_ONE_GROUP,
        **_FALCON_NAMES,
    ),
    Architecture(
        "falcon_40b",
        "falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 3},
        attention="fused_grouped",
        parallel=True,
        **_FALCON_NAMES,
    ),
    Architecture(
        "falcon_sequential",
        "falcon",
        {**_FALCON, "multi_query": False, "parallel_attn": False},
        attention="fused_interleaved",
        n_kv_heads=6,
        **_FALCON_NAMES,
    ),
    Architecture(
        "falcon_alibi",
        "falcon",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True},
        attention="fused_interleaved",
        n_kv_heads=6,
        no_heads=_ALIBI,
        **_FALCON_NAMES,
    ),
    Architecture(
        "bloom",
        "bloom",
        {**_IDS, "hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": 6},
        attention="fused_interleaved",
        n_kv_heads=6,
        width=4 * HIDDEN,  # written into BloomMLP; no key sets it
        no_heads=_ALIBI,
        **_FALCON_NAMES,
    ),
    _llama_like(
        "phi",
        ffn="plain",
        ffn_names=("fc1", "fc2"),
        attention_names=("q_proj", "k_proj", "v_proj", "dense"),
        parallel=True,
    ),
    _llama_like("starcoder2", ffn="plain", ffn_names=("c_fc", "c_proj"), sliding_window=WINDOW),
    _llama_like(
        "nemotron",
        ffn="plain",
        ffn_names=("up_proj", "down_proj"),
        head_dim=12,
        mlp_bias=True,
        attention_bias=True,
    ),
    Architecture(
        "gptj",
        "gptj",
        {**_GPT, "rotary_dim": 4},
        attention_names=("q_proj", "k_proj", "v_proj", "out_proj"),
        **_GPTJ_NAMES,
    ),
    Architecture(
        "codegen",
        "codegen",
        {**_GPT, "rotary_dim": 4, "n_embd": 64, "n_head": 8},
        hidden=64,
        n_heads=8,
        attention="fused_partitioned",
        attention_names=("qkv_proj", "out_proj"),
        no_heads=f"qkv is laid out in {PARTITIONS} parts of equally many heads",
        **{**_GPTJ_NAMES, "n_kv_heads": 8},
    ),
    Architecture(
        "gpt_bigcode",
        "gpt_bigcode",
        {**_GPT, "multi_query": True},
        attention="fused_concatenated",
        n_kv_heads=1,
        no_heads=_ONE_GROUP,
        **_GPT_NAMES,
    ),
    Architecture(
        "gpt_bigcode_heads",
        "gpt_bigcode",
        {**_GPT, "multi_query": False},
        attention="fused_interleaved",
        n_kv_heads=6,
        **_GPT_NAMES,
    ),
    # Mixtures of experts.
    _llama_like(
        "mixtral",
        ffn="experts",
        intermediate_size=EXPERT_WIDTH,
        width=0,
        num_local_experts=6,
        num_experts_per_tok=2,
        experts=Experts(),
    ),
    _llama_like(
        "mixtral_modules",
        PER_EXPERT,
        ffn="experts",
        intermediate_size=EXPERT_WIDTH,
        width=0,
        num_local_experts=6,
        num_experts_per_tok=2,
        experts=Experts(layout="modules", names=("gate_proj", "up_proj", "down_proj")),
    ),
    _llama_like(
        "qwen2_moe",
        decoder_sparse_step=2,  # blocks 1 and 3
        mlp_only_layers=[3],
        shared_expert_intermediate_size=56,
        norm_topk_prob=False,
        experts=Experts(dense_blocks=(0, 2, 3), shared="shared_expert", shared_width=56),
        **_MOE,
    ),
    _llama_like(
        "qwen3_moe",
        head_dim=12,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        experts=Experts(dense_blocks=(1,)),
        **_MOE,
    ),
    _llama_like(
        "olmoe",
        ffn="experts",
        intermediate_size=EXPERT_WIDTH,
        width=0,
        num_experts=6,
        num_experts_per_tok=2,
        clip_qkv=2.0,
        no_heads=_ACROSS,
        experts=Experts(),
    ),
    _llama_like("deepseek_v2", mlp_bias=True, experts=Experts(**_DEEPSEEK_EXPERTS), **_DEEPSEEK),
    _llama_like(
        "deepseek_v2_groups",
        "deepseek_v2",
        topk_method="group_limited_greedy",
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.7,
        experts=Experts(groups=2, **_DEEPSEEK_EXPERTS),
        **_DEEPSEEK,
    ),
    _llama_like(
        "deepseek_v3",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.7,
        experts=Experts(**_DEEPSEEK_EXPERTS),
        **_DEEPSEEK,
    ),
    _llama_like(
        "deepseek_v3_groups",
        "deepseek_v3",
        n_group=2,
        topk_group=1,
        experts=Experts(groups=2, **_DEEPSEEK_EXPERTS),
        **_DEEPSEEK,
    ),
    _llama_like(
        "gpt_oss",
        ffn="experts",
        intermediate_size=EXPERT_WIDTH,
        width=0,
        head_dim=12,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        swiglu_limit=1.0,  # low enough to clamp
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "truncate": False,
        },
        no_heads="an attention sink per head",
        experts=Experts(router="router", transposed=True, interleaved=True, biases=True),
    ),
)

#: name -> entry, dense models first.
ARCHITECTURES: dict[str, Architecture] = {entry.name: entry for entry in _ENTRIES}
