"""Queries and keys gathered from models of every kind: they are what the model compared, and it computes the same."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint

from fastloss import attention_consistency_from_qk as from_qk
from fastloss import collect_qk
from tests.conformance.tools import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here depends on the backend")


class Attention(nn.Module):
    """Grouped heads, causal or with a mask, by scaled_dot_product_attention or by flex_attention."""

    def __init__(self, call=F.scaled_dot_product_attention, **options):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.call, self.options = call, options

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 8)).transpose(1, 2).chunk(2, -1)
        self.qk = q, k
        return x + self.out(self.call(q, k, v, enable_gqa=True, **self.options).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.blocks = nn.Sequential(*(layers or (Attention(is_causal=True), Attention(scale=0.3))))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.blocks(x))


def inputs(*shape, seed=0):
    return torch.randn(*(shape or (2, 6, 16)), generator=torch.Generator().manual_seed(seed))


def attend(layer):
    """The maps [B, H, Q, K] of what was gathered."""
    q, k, scale, causal, mask, _ = layer
    scores = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def test_scaled_dot_product_attention_of_any_module():
    model, x = Model(), inputs()
    expected = model(x)
    with collect_qk(model) as seen:
        out = model(x)
    assert torch.equal(out, expected)
    assert list(seen.layers) == ["blocks.0", "blocks.1"]
    for layer, block in zip(seen.layers.values(), model.blocks, strict=True):
        assert layer.q is block.qk[0] and layer.k is block.qk[1]
    first, second = seen.layers.values()
    assert (first.causal, first.scale, second.causal, second.scale) == (True, 0.5, False, 0.3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_training_is_the_same_to_the_bit():
    """Steps with dropout, and the same without the hook: every output and every parameter."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), Model())
    results = []
    for context in (lambda m: contextlib.nullcontext(), collect_qk):
        trained = copy.deepcopy(model)
        torch.manual_seed(1)
        outs = []
        for step in range(4):
            with context(trained):
                outs.append(trained(inputs(seed=step)))
            outs[-1].square().mean().backward()
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter -= 0.1 * parameter.grad
            trained.zero_grad()
        results.append([*outs, *trained.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_three_lines_of_consistency():
    """The mean over the layers of the loss, with its gradients; nothing of one view against itself."""
    model, x, y = Model(), inputs(), inputs(seed=1)
    with collect_qk(model) as first:
        model(x)
    with collect_qk(model) as second:
        model(y)
    loss = first.consistency(second, metric="js", temperature=2.0)
    got = torch.autograd.grad(loss, model.blocks[0].q.weight, retain_graph=True)[0]
    parts = []
    for name, a in first.layers.items():
        b = second.layers[name]
        parts.append(from_qk(a.q, a.k, b.q, b.k, metric="js", scale=a.scale, causal=a.causal, temperature=2.0))
    expected = sum(parts) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected, model.blocks[0].q.weight)[0])
    assert got.abs().max() > 0
    assert first.consistency(first).item() == 0


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 10}, {"bias": False}])
def test_multihead_attention(sizes, need_weights, batch_first):
    """Packed and separate projections: the maps of q and k are those that the module gives, masks and all."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, batch_first=batch_first, **sizes)
    kdim, vdim = sizes.get("kdim", 16), sizes.get("vdim", 16)
    query, key, value = inputs(2, 5, 16), inputs(2, 7, kdim), inputs(2, 7, vdim)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    mask = (torch.arange(7) < torch.arange(5)[:, None] + 3).logical_not()
    swap = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    call = [swap(t) for t in (query, key, value)]
    for options in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": mask},
        {"key_padding_mask": padding, "attn_mask": mask},
    ):
        wanted = model(*call, need_weights=True, average_attn_weights=False, **options)[1]
        expected = model(*call, need_weights=need_weights, **options)[0]
        with collect_qk(model) as seen:
            out = model(*call, need_weights=need_weights, **options)[0]
        assert torch.equal(out, expected)
        (layer,) = seen.layers.values()
        torch.testing.assert_close(attend(layer), wanted)
        assert torch.isfinite(seen.consistency(seen))
    seen.consistency(seen).backward()
    assert (model.in_proj_weight if "kdim" not in sizes else model.k_proj_weight).grad is not None


def test_encoder_in_evaluation_leaves_the_fused_path():
    """Bit-equal to that path off; the same up to rounding as with it on."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    x = inputs()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            fused = model(x)
            with collect_qk(model) as seen:
                out = model(x)
            before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            plain = model(x)
            torch.backends.mha.set_fastpath_enabled(before)
        assert torch.equal(out, plain)
        torch.testing.assert_close(out, fused)
        assert list(seen.layers) == ["layers.0.self_attn", "layers.1.self_attn"]


def test_multihead_attention_unbatched_and_causal():
    model = nn.MultiheadAttention(16, 4)
    x, mask = inputs(5, 16), nn.Transformer.generate_square_subsequent_mask(5)
    with collect_qk(model) as seen:
        model(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    assert seen.layers[""].causal and seen.layers[""].mask is None and seen.layers[""].q.shape == (1, 4, 5, 4)
    for option in ("add_bias_kv", "add_zero_attn"):
        model = nn.Sequential(nn.MultiheadAttention(16, 4, **{option: True}))
        with pytest.raises(ValueError, match=r"layer '0' is a MultiheadAttention with (bias_k|add_zero_attn)"):
            with collect_qk(model):
                model[0](x, x, x)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention(compiled):
    """As it is and compiled by itself; the eager backend here, as the compiler's own takes a minute."""
    call = torch.compile(flex.flex_attention, backend="eager") if compiled else flex.flex_attention
    mask = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, 6, 6, device="cpu")
    model, x = Model(Attention(call, block_mask=mask), Attention(call, scale=0.3)), inputs()
    expected = model(x)
    seen = []
    for _ in range(2):
        with collect_qk(model) as collection:
            out = model(x)
        assert torch.equal(out, expected)
        seen.append(collection)
    assert list(collection.layers) == ["blocks.0", "blocks.1"]
    for layer, block in zip(collection.layers.values(), model.blocks, strict=True):
        assert torch.equal(layer.q, block.qk[0]) and torch.equal(layer.k, block.qk[1]) and layer.score_mod is None
    assert collection.layers["blocks.1"].scale == 0.3
    assert seen[0].consistency(seen[1]).item() == 0
    other = Model(Attention(is_causal=True), Attention(scale=0.3))
    other.load_state_dict(model.state_dict())
    with collect_qk(other) as plain, collect_qk(other) as noisy:
        other(x)
    assert plain.consistency(noisy).item() == 0
    changed = Model(Attention(call, score_mod=lambda score, b, h, q, k: score + q - k))
    with collect_qk(changed) as collection:
        changed(x)
    with pytest.raises(ValueError, match="layer 'blocks.0': its scores are changed by a score_mod"):
        collection.consistency(collection)


def test_layers_by_name_or_pattern():
    model, x = Model(*(Attention() for _ in range(12))), inputs()
    for layers, wanted in (("blocks.1", [1]), (["blocks.1?", "blocks.3"], [3, 10, 11]), ("blocks", range(12))):
        with collect_qk(model, layers) as seen:
            model(x)
        assert list(seen.layers) == [f"blocks.{i}" for i in wanted]


def test_what_is_not_there():
    model, x = Model(), inputs()
    with pytest.raises(
        ValueError, match=r"layers: no module of the model is called 'block\.0'; there are '', 'blocks'"
    ):
        collect_qk(model, "block.0")
    with pytest.raises(TypeError, match="layers: expected names"):
        collect_qk(model, 3)
    with pytest.raises(ValueError, match="at least one name"):
        collect_qk(model, [])
    with pytest.raises(TypeError, match="model: expected a torch"):
        collect_qk(model.forward)
    with pytest.raises(RuntimeError, match=r"modules called 'head': 'head \(Linear\)'. Looked for: calls of scaled"):
        with collect_qk(model, ["blocks.0", "head"]):
            model(x)
    linear = nn.Sequential(nn.Linear(16, 3))
    with pytest.raises(
        RuntimeError, match=r"no attention was seen. Looked for: .*Modules: ' \(Sequential\)', '0 \(Lin"
    ):
        with collect_qk(linear):
            linear(x)
    with pytest.raises(RuntimeError, match="no attention was seen"):
        with collect_qk(linear):
            model(x)  # of another model
    with collect_qk(model) as first, collect_qk(model, "blocks.0") as second:
        model(x)
    with pytest.raises(ValueError, match=r"other: expected as many layers as the first view, 2 \('blocks.0', "):
        first.consistency(second)
    with pytest.raises(TypeError, match="other: expected what collect_qk gives"):
        first.consistency(model)
    biased = Model(Attention(attn_mask=inputs(6, 6)))
    with collect_qk(biased) as seen:
        biased(x)
    with pytest.raises(ValueError, match="layer 'blocks.0': its floating-point mask is more than 0 and -inf"):
        seen.consistency(seen)


class Failing(nn.Module):
    def forward(self, x):
        raise ArithmeticError


def test_nested_repeated_and_after_an_exception():
    model, x = Model(), inputs()
    with collect_qk(model) as outer:
        model(x)
        with collect_qk(model, "blocks.1") as inner:
            model(x)
        with pytest.raises(RuntimeError, match="entered before"), outer:
            pass
    assert list(outer.layers) == ["blocks.0", "blocks.1", "blocks.0#2", "blocks.1#2"]
    assert inner.layers["blocks.1"].q is outer.layers["blocks.1#2"].q
    failing = Model(Attention(), Failing())
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            with collect_qk(failing):
                failing(x)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in failing.modules())
        assert torch._C._len_torch_function_stack() == 0
    with collect_qk(failing) as seen:  # caught inside: what runs then has its own name
        with contextlib.suppress(ArithmeticError):
            failing(x)
        failing.blocks[0](x)
    assert list(seen.layers) == ["blocks.0", "blocks.0#2"]


def test_threads_have_their_own():
    """Another thread runs the model within the with: its attention is not gathered."""
    model, x = Model(), inputs()
    with collect_qk(model) as seen:
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        thread.join()
        model(x)
    assert list(seen.layers) == ["blocks.0", "blocks.1"]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.mha = Attention(), nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return checkpoint(lambda x: self.mha(*[self.inner(x)] * 3)[0], x, use_reentrant=False)


def test_activation_checkpoints():
    """What backward runs again is not gathered again, and the gradients are those without a checkpoint."""
    model, x = Checkpointed(), inputs()
    grads = []
    for kind in (Checkpointed, Plain):
        model.__class__ = kind
        with collect_qk(model) as first:
            out = model(x)
            (
                out.sum() + sum(layer.q.square().mean() + layer.k.sin().mean() for layer in first.layers.values())
            ).backward()
        assert list(first.layers) == ["inner", "mha"]
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


class Plain(Checkpointed):
    def forward(self, x):
        return self.mha(*[self.inner(x)] * 3)[0]


def test_torch_compile_is_refused_in_a_sentence():
    model, x = Model(), inputs()
    with pytest.raises(RuntimeError, match=r"module '' of the model is compiled.* as it was before torch\.compile"):
        with collect_qk(torch.compile(model, backend="eager")):
            pass
    for fullgraph in (True, False):
        whole = torch.compile(lambda x: model(x).sin(), backend="eager", fullgraph=fullgraph)
        with pytest.raises(RuntimeError, match="a compiled function runs the model"):
            with collect_qk(model):
                whole(x)
        assert torch.equal(whole(x), model(x).sin())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def bert(transformers):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return transformers.BertModel(config), "encoder.layer.{}.attention.self"


def llama(transformers):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    return transformers.LlamaModel(config), "layers.{}.self_attn"


def dinov2(transformers):
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    return transformers.Dinov2Model(config), "encoder.layer.{}.attention*"


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("family", [bert, llama, dinov2])
def test_transformers(family, implementation):
    """The maps of q and k are those that the model itself gives, and it computes the same. transformers compiles
    flex_attention: that takes a minute."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, name = family(transformers)
    model.eval().set_attn_implementation("eager")
    if family is dinov2:
        call = {"pixel_values": inputs(2, 3, 16, 16)}
    else:
        call = {"input_ids": torch.arange(14).view(2, 7), "attention_mask": torch.arange(7) < torch.tensor([[7], [5]])}
        call["attention_mask"] = call["attention_mask"].long()
    maps = model(**call, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    with torch.set_grad_enabled(implementation != "flex_attention"):  # which has no backward on a CPU
        expected = model(**call).last_hidden_state
        with collect_qk(model) as seen:
            out = model(**call).last_hidden_state
    assert torch.equal(out, expected)
    assert len(seen.layers) == 2
    assert all(fnmatch.fnmatchcase(layer, name.format(i)) for i, layer in enumerate(seen.layers))
    loss = seen.consistency(seen)
    assert loss.item() == 0
    if implementation == "flex_attention":
        return
    loss.backward()
    for layer, wanted in zip(seen.layers.values(), maps, strict=True):
        real = slice(0, 7) if family is dinov2 else slice(0, 5)
        torch.testing.assert_close(attend(layer)[:, :, real], wanted[:, :, real], rtol=1e-4, atol=1e-6)
