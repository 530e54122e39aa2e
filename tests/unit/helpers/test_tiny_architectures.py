"""The tiny models of tests/helpers/architectures.py are what they are said to be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.architectures import ARCHITECTURES, BLOCKS, EXPERT_WIDTH, VOCABULARY, WINDOW, Architecture, Experts
from tests.helpers.tiny import tokens

every = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
dense = pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES.values() if a.width], ids=[n for n, a in ARCHITECTURES.items() if a.width]
)
sparse = pytest.mark.parametrize(
    "architecture",
    [a for a in ARCHITECTURES.values() if a.experts],
    ids=[n for n, a in ARCHITECTURES.items() if a.experts],
)
IDS = tokens(2, 12, vocabulary=VOCABULARY)
#: transformers 5.14 checks the token ids that a configuration class has before it is given ours.
ABOUT_DEFAULTS = "within the vocabulary"


def logits(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@contextmanager
def messages() -> Iterator[list[str]]:
    """What transformers logs from warnings up; its deprecations are log messages, not Python warnings."""
    from transformers.utils import logging as transformers_logging

    # Otherwise a message that an earlier test has seen would not come again.
    transformers_logging.warning_once.cache_clear()
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


@every
def test_it_builds_runs_and_generates_without_a_word(architecture):
    assert len(IDS[0]) > WINDOW
    with messages() as found:
        model = architecture.build()
        whole = logits(model, IDS)
        made = model.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert not [message for message in found if ABOUT_DEFAULTS not in message]
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.model_type == architecture.model_type
    assert whole.isfinite().all()
    assert whole.std() > 0.05, "logits that hardly differ hide errors"
    full = logits(model, made.sequences)[:, IDS.shape[1] - 1 : -1]
    assert (torch.stack(made.logits, 1) - full).abs().max() <= 1e-5 * full.abs().max()
    again = architecture.build().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert not torch.equal(logits(architecture.build(seed=1), IDS), whole)


@every
def test_no_parameter_has_its_initial_value(architecture):
    for name, parameter in architecture.build().named_parameters():
        assert parameter.std() > 0.05, name


def matrix(module: nn.Module, transposed: bool = False) -> Tensor:
    """Weight [out, in]."""
    weight = module.weight.detach()
    return weight.T if transposed else weight


def ffn_of(architecture: Architecture, block: nn.Module) -> nn.Module:
    return block.get_submodule(architecture.ffn_path) if architecture.ffn_path else block


@every
def test_matrices_have_the_shapes_that_are_said(architecture):
    model = architecture.build()
    blocks = architecture.blocks_of(model)
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) == BLOCKS
    a, d, t = architecture, architecture.hidden, architecture.transposed
    for index, block in enumerate(blocks):
        attention = block.get_submodule(a.attention_path)
        assert attention.layer_idx == index
        *inputs, output = (matrix(getattr(attention, name), t) for name in a.attention_names)
        heads, groups = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        if a.attention == "mla":
            assert hasattr(attention, "kv_b_proj")
        elif a.attention == "separate":
            assert [tuple(x.shape) for x in inputs] == [(heads, d), (groups, d), (groups, d)]
        else:
            assert [tuple(x.shape) for x in inputs] == [(heads + 2 * groups, d)]
        assert tuple(output.shape) == (d, heads)
        if not a.is_sparse(index):
            check_dense_ffn(ffn_of(a, block), a.ffn_names, a.width, d, t)


def check_dense_ffn(ffn: nn.Module, names: tuple[str, ...], width: int, hidden: int, transposed: bool = False) -> None:
    *inputs, output = (matrix(getattr(ffn, name), transposed) for name in names)
    rows = 2 * width if len(names) == 2 and "gate" in names[0] else width
    assert all(tuple(x.shape) == (rows, hidden) for x in inputs)
    assert tuple(output.shape) == (hidden, width)
    linears = [name for name, child in ffn.named_children() if hasattr(child, "weight") and "norm" not in name]
    assert sorted(linears) == sorted(names)


def activation(ffn: nn.Module):
    return next(getattr(ffn, name) for name in ("act_fn", "activation_fn", "act", "gelu_impl") if hasattr(ffn, name))


def run_dense(ffn: nn.Module, names: tuple[str, ...], x: Tensor, transposed: bool = False) -> Tensor:
    """The FFN by its description: what its output projection gives."""
    parts = [F.linear(x, matrix(getattr(ffn, name), transposed), getattr(ffn, name).bias) for name in names[:-1]]
    act = activation(ffn)
    if len(parts) == 2:
        gate, up = parts
        inner = act(gate) * up
    elif "gate" in names[0]:
        gate, up = parts[0].chunk(2, -1)
        inner = act(gate) * up
    else:
        inner = act(parts[0])
    return F.linear(inner, matrix(getattr(ffn, names[-1]), transposed), getattr(ffn, names[-1]).bias)


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


@dense
def test_a_dense_ffn_computes_what_is_said(architecture):
    model = architecture.build()
    index = next(i for i in range(BLOCKS) if not architecture.is_sparse(i))
    ffn, names = ffn_of(architecture, architecture.blocks_of(model)[index]), architecture.ffn_names
    seen: dict[str, Tensor] = {}
    getattr(ffn, names[0]).register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    getattr(ffn, names[-1]).register_forward_hook(
        lambda m, args, out: seen.update(y=out.clone())
    )  # Falcon adds to it in place
    logits(model, IDS)
    with torch.no_grad():
        assert close(run_dense(ffn, names, seen["x"], architecture.transposed), seen["y"])


def run_experts(experts: nn.Module, said: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Fused experts by their description."""
    total = torch.zeros_like(x)
    up_name, down_name = said.names
    for expert in range(said.n):
        token, place = torch.where(index == expert)
        first, second = getattr(experts, up_name)[expert], getattr(experts, down_name)[expert]
        biases = [getattr(experts, f"{name}_bias")[expert] if said.biases else None for name in said.names]
        both = F.linear(x[token], first.T if said.transposed else first, biases[0])
        gate, up = (both[:, ::2], both[:, 1::2]) if said.interleaved else both.chunk(2, -1)
        if said.interleaved:  # GPT-OSS's clamped SwiGLU
            gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
            inner = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
        else:
            inner = experts.act_fn(gate) * up
        out = F.linear(inner, second.T if said.transposed else second, biases[1])
        total.index_add_(0, token, out * weights[token, place, None])
    return total


@sparse
def test_experts_are_what_is_said(architecture):
    model, said = architecture.build(), architecture.experts
    logged: dict[int, tuple] = {}
    for index, block in enumerate(architecture.blocks_of(model)):
        mixture = block.get_submodule(architecture.ffn_path)
        assert hasattr(mixture, "experts") == architecture.is_sparse(index)
        if not architecture.is_sparse(index):
            continue
        router = getattr(mixture, said.router)
        assert tuple(router.weight.shape) == (said.n, architecture.hidden)
        assert (getattr(router, "bias", None) is not None) == said.biases
        assert (getattr(router, "num_group", None) or 1) == said.groups
        top_k = router.top_k if hasattr(router, "top_k") else mixture.top_k
        assert top_k == said.top_k
        if said.shared:
            check_dense_ffn(
                getattr(mixture, said.shared), architecture.ffn_names, said.shared_width, architecture.hidden
            )
        if said.layout == "modules":
            assert isinstance(mixture.experts, nn.ModuleList)
            assert len(mixture.experts) == said.n
            for expert in mixture.experts:
                check_dense_ffn(expert, said.names, said.width, architecture.hidden)
        else:
            mixture.experts.register_forward_hook(
                lambda m, args, out, index=index: logged.update({index: (m, args, out)})
            )
    logits(model, IDS)
    if said.layout == "fused":
        assert sorted(logged) == [i for i in range(BLOCKS) if architecture.is_sparse(i)]
        for experts, (x, index, weights), out in logged.values():
            assert tuple(index.shape) == (IDS.numel(), said.top_k)
            with torch.no_grad():
                assert close(run_experts(experts, said, x, index, weights), out)
            shape = (said.n, architecture.hidden, 2 * EXPERT_WIDTH)
            expected = shape if said.transposed else (shape[0], shape[2], shape[1])
            assert tuple(getattr(experts, said.names[0]).shape) == expected


def output_inputs(architecture: Architecture, model) -> Tensor:
    """What enters the output projection of block 1's attention, [tokens, heads * head_dim]."""
    attention = architecture.blocks_of(model)[1].get_submodule(architecture.attention_path)
    seen: list[Tensor] = []
    output = getattr(attention, architecture.attention_names[-1])
    handle = output.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    logits(model, IDS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "architecture",
    [a for a in ARCHITECTURES.values() if a.attention != "mla"],
    ids=[n for n, a in ARCHITECTURES.items() if a.attention != "mla"],
)
def test_rows_of_a_head_reach_the_columns_of_that_head_alone(architecture):
    """Of q, the head's own; of k and v, those of the query heads that read them."""
    a = architecture
    model = a.build()
    before = output_inputs(a, model)
    attention = a.blocks_of(model)[1].get_submodule(a.attention_path)
    names = dict(
        zip("qkv", a.attention_names[:-1] if a.attention == "separate" else a.attention_names[:1] * 3, strict=True)
    )
    # A norm over all heads mixes what q and k make; values pass by it.
    parts = "v" if a.no_heads == "a norm spans all heads" else "qkv"
    queries = a.n_heads // a.n_kv_heads
    for part in parts:
        linear = getattr(attention, names[part])
        for head in range(a.n_heads if part == "q" else a.n_kv_heads):
            kept = {name: value.clone() for name, value in linear.state_dict().items()}
            weight = linear.weight.data.T if a.transposed else linear.weight.data
            rows = a.rows(part, head)
            weight[rows] = 0
            if linear.bias is not None:
                linear.bias.data[rows] = 0
            readers = [head] if part == "q" else range(head * queries, (head + 1) * queries)
            columns = torch.zeros(a.n_heads * a.head_dim, dtype=torch.bool)
            columns[torch.cat([a.output_columns(reader) for reader in readers])] = True
            after = output_inputs(a, model)
            assert torch.equal(after[:, ~columns], before[:, ~columns]), (part, head)
            changed = (after - before).abs().amax(0) > 1e-4
            assert changed[columns].float().mean() > 0.9, (part, head)
            if part == "v":
                assert not after[:, columns].any(), head
            linear.load_state_dict(kept)


@every
def test_parallel_means_that_the_ffn_does_not_see_its_blocks_attention(architecture):
    model = architecture.build()
    block = architecture.blocks_of(model)[1]
    ffn = ffn_of(architecture, block)
    seen: list[Tensor] = []
    first = ffn if architecture.ffn_path else getattr(ffn, architecture.ffn_names[0])
    first.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    logits(model, IDS)
    output = getattr(block.get_submodule(architecture.attention_path), architecture.attention_names[-1])
    output.weight.data *= 2
    logits(model, IDS)
    assert torch.equal(*seen) == architecture.parallel


@every
def test_attention_without_a_reason_against_it_can_lose_heads(architecture):
    """Nothing in it but the projections and norms of one head's size counts its heads."""
    a = architecture
    model = a.build()
    attention = a.blocks_of(model)[1].get_submodule(a.attention_path)
    others = [p for name, p in attention.named_parameters() if name.split(".")[0] not in a.attention_names]
    counts_heads = len(others) > 2 or any(tuple(p.shape) != (a.head_dim,) for p in others)
    alibi = getattr(model.config, "alibi", a.model_type == "bloom")
    partitioned = a.attention == "fused_partitioned"
    reasons = (a.attention == "mla", a.n_kv_heads == 1, bool(alibi), partitioned, counts_heads)
    assert (a.no_heads is not None) == any(reasons)


def test_the_per_expert_layout_is_saved_and_reloaded(tmp_path):
    from transformers import AutoModelForCausalLM

    model = ARCHITECTURES["mixtral_modules"].build()
    model.save_pretrained(tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(reloaded, IDS), logits(model, IDS))
    assert isinstance(reloaded.model.layers[0].mlp.experts, nn.ModuleList)


def test_rows_of_latent_attention_are_refused():
    with pytest.raises(ValueError, match="no rows of single heads"):
        ARCHITECTURES["deepseek_v3"].rows("q", 0)
