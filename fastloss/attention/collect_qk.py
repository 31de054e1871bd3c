"""Queries and keys of every attention in a model, gathered while it runs: :func:`collect_qk`."""

from __future__ import annotations

import contextlib
import fnmatch
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import is_sequence
from ..core.entry import public_function
from .attention_calls import AttentionCalls, AttentionQK
from .from_qk import attention_consistency_from_qk

LOOKED_FOR = (
    "calls of scaled_dot_product_attention, torch.nn.MultiheadAttention, flex_attention and the eager attention of "
    "transformers, made while a module of the model runs"
)
SHOWN = 12  # modules in an error


@public_function
def collect_qk(model: nn.Module, layers: str | Sequence[str] | None = None) -> QKCollection:
    r"""Gathers queries and keys of every attention in a model while it runs, without a change to the model.

    A context manager: within it, each attention of `model` runs on the kernel it always has, and what it is called with
    is kept. Row i of an attention is :math:`\mathrm{softmax}(s\, q_i K^T)`, with the q, k and scale s that are gathered
    (after rotary embeddings, norms, whatever the model does to them). Seen are

    * ``torch.nn.functional.scaled_dot_product_attention``, called from any module;
    * ``torch.nn.MultiheadAttention``, also in ``nn.TransformerEncoderLayer``: q and k are projected once more beside
      the module's own, which do not leave it;
    * ``torch.nn.attention.flex_attention``, as it is or under ``torch.compile``;
    * the models of transformers, with ``attn_implementation`` ``"sdpa"``, ``"eager"`` or ``"flex_attention"``.

    Outputs are bit-equal to those without it. One exception: in evaluation without gradients ``nn.MultiheadAttention``
    and the TransformerEncoder classes have a fused path that no hook can look into, and it isn't taken here; results
    are those of ``torch.backends.mha.set_fastpath_enabled(False)``, equal up to rounding (and the encoder's rows of
    padding, which the fused path sets to 0).

    Args:
        model: any module, in training or evaluation. Its submodules are run by calling them, as usual.
        layers: names of modules, as in ``model.named_modules()``, or patterns of them, as in ``fnmatch`` (``*`` is any
            text, with dots): gathered is the attention of these modules and of those inside. None: all.

    Returns:
        an object with

        * ``layers``: a dict in order of execution, from the name of the module that called attention to a named
          tuple of ``q`` ``[B, H, Q, d]``, ``k`` ``[B, G, K, d]`` (G divides H), ``scale``, ``causal``, ``mask`` (which
          broadcasts to ``[B, H, Q, K]``: bool, True where a key takes part, or floating point, added to the scores;
          or the mask_mod of flex_attention) and ``score_mod`` (what else changed the scores, else None). They are in
          the graph: gradients reach the model through them. A module's second call has ``#2`` after its name.
        * ``consistency(other, metric="sym_kl", temperature=1.0, stop_gradient=None)``: the mean over the layers of
          :func:`attention_consistency_from_qk` of this collection and another.

        It is for one ``with``; every pass of the model within it adds to it.

    Raises:
        TypeError: `model` is no module, `layers` no names. ValueError: a name or pattern that fits no module; a
        MultiheadAttention with bias_k or add_zero_attn runs, whose softmax has a key more. RuntimeError: at the end of
        the ``with``, if no attention was seen, or none for a pattern; the collection is entered twice; the model, a
        part of it or a function that runs it is compiled by ``torch.compile``.

    Collections may be nested, also of one model. One belongs to the thread that enters it and sees nothing of others;
    hooks come and go with it, so enter and leave while no other thread runs the model. Hooks and modes are removed
    whatever is raised. Runs that an activation checkpoint repeats in backward are not gathered again; with
    ``use_reentrant=True`` the q and k in a checkpoint have no gradients.

    Source: the attention distillation of Wang et al., "MiniLM", NeurIPS 2020 and the two passes of Liang et al.,
    "R-Drop", NeurIPS 2021 are what it is for.

    Example:
        >>> model = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
        >>> x = torch.randn(4, 5, 16)
        >>> with collect_qk(model) as first: out = model(x)
        >>> with collect_qk(model) as second: _ = model(x + 0.1 * torch.randn_like(x))
        >>> loss = out.square().mean() + first.consistency(second)
        >>> {name: tuple(layer.q.shape) for name, layer in first.layers.items()}
        {'self_attn': (4, 2, 5, 8)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    names = [name for name, _ in model.named_modules()]
    patterns = _patterns(layers)
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"layers: no module of the model is called {pattern!r}; there are {_some(names)}")
    return QKCollection(model, patterns)


def _patterns(layers: Any) -> list[str] | None:
    if layers is None:
        return None
    found = [layers] if isinstance(layers, str) else list(layers) if is_sequence(layers) else [layers]
    for pattern in found:
        if not isinstance(pattern, str):
            raise TypeError(f"layers: expected names or patterns of modules, got {type(pattern).__name__}")
    if not found:
        raise ValueError("layers: expected at least one name or pattern, or None for all, got none")
    return found


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


class QKCollection:
    """What :func:`collect_qk` returns, see there."""

    def __init__(self, model: nn.Module, patterns: list[str] | None) -> None:
        self.layers: dict[str, AttentionQK] = {}
        self._model, self._patterns = model, patterns
        self._calls = AttentionCalls(self._runs_wanted, self._name)
        self._running: list[str] = []  # names of the modules that run, the innermost last
        self._times: dict[str, int] = {}  # attentions seen by name
        self._thread = 0
        self._open: contextlib.ExitStack | None = None

    def __enter__(self) -> QKCollection:
        if self._thread:
            raise RuntimeError("collect_qk: this collection was entered before; it is for one `with`, make another")
        if torch.compiler.is_compiling():
            raise RuntimeError(NOT_COMPILED.format("it is entered in a function that is compiled"))
        for name, module in self._model.named_modules():
            if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
                raise RuntimeError(NOT_COMPILED.format(f"module {name!r} of the model is compiled"))
        self._thread = threading.get_ident()
        with contextlib.ExitStack() as stack:
            for name, module in self._model.named_modules():
                before, after = self._hooks(name)
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after, always_call=True).remove)
            stack.enter_context(self._calls)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._open is not None
        self._open.close()
        if kind is None:
            self._check_found()

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(*_: Any) -> None:
            # The second: after a graph break dynamo runs the hook as it is, with its callback set.
            if torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
                raise RuntimeError(NOT_COMPILED.format("a compiled function runs the model"))
            if threading.get_ident() == self._thread:
                self._settle()
                self._running.append(name)

        def after(*_: Any) -> None:
            if threading.get_ident() == self._thread and name in self._running:
                self._settle()
                while self._running.pop() != name:  # one that was left by an exception
                    pass

        return before, after

    def _settle(self) -> None:
        """What was seen since a module was entered or left last is of the module that runs. By name only here: a
        graph that appends what it sees would have to be compiled again for every name."""
        found = self._calls.drain()
        if not found or not self._runs_wanted():
            return
        name = self._name()
        for attention in found:
            self._times[name] = self._times.get(name, 0) + 1
            times = self._times[name]
            self.layers[name if times == 1 else f"{name}#{times}"] = attention

    def _name(self) -> str:
        return self._running[-1]

    def _runs_wanted(self) -> bool:
        if not self._running or threading.get_ident() != self._thread:
            return False
        return self._patterns is None or any(_inside(self._name(), pattern) for pattern in self._patterns)

    def _check_found(self) -> None:
        modules = {name: f"{name} ({type(module).__name__})" for name, module in self._model.named_modules()}
        if self._patterns is None and not self.layers:
            raise RuntimeError(
                f"collect_qk: no attention was seen. Looked for: {LOOKED_FOR}. Modules: {_some(modules.values())}"
            )
        for pattern in self._patterns or ():
            if not any(_inside(name, pattern) for name in self._times):
                inside = [shown for name, shown in modules.items() if _inside(name, pattern)]
                raise RuntimeError(
                    f"collect_qk: no attention was seen in the modules called {pattern!r}: {_some(inside)}. "
                    f"Looked for: {LOOKED_FOR}"
                )

    def consistency(
        self,
        other: QKCollection,
        *,
        metric: str = "sym_kl",
        temperature: float = 1.0,
        stop_gradient: str | None = None,
    ) -> Tensor:
        """The mean over the layers of :func:`attention_consistency_from_qk` of this collection, the first view, and of
        `other`, the second.

        Args:
            other: of the same layers, or of as many, which are then paired in order of execution (a teacher's). Keys
                take part where both views have them.
            metric, temperature, stop_gradient: as there.

        Raises:
            TypeError, ValueError: `other` is no collection or has other layers; a layer's scores are changed by more
            than a mask of 0 and -inf (a score_mod, position biases); and as there. Looking at a floating-point mask
            waits for the GPU.
        """
        if not isinstance(other, QKCollection):
            raise TypeError(f"other: expected what collect_qk gives, got {type(other).__name__}")
        if not self.layers or len(self.layers) != len(other.layers):
            raise ValueError(
                f"other: expected as many layers as the first view, {len(self.layers)} ({_some(self.layers)}) "
                f"and at least one, got {len(other.layers)} ({_some(other.layers)})"
            )
        by_name = self.layers.keys() == other.layers.keys()
        seconds = [other.layers[name] for name in self.layers] if by_name else list(other.layers.values())
        losses = [
            _consistency(name, *pair, metric=metric, temperature=temperature, stop_gradient=stop_gradient)
            for name, *pair in zip(self.layers, self.layers.values(), seconds, strict=True)
        ]
        return torch.stack([x.to(losses[0].device) for x in losses]).mean()


NOT_COMPILED = (
    "collect_qk: {}, and in the graphs of torch.compile nothing says which module an attention belongs to. Give it "
    "the model as it was before torch.compile; a flex_attention that is compiled by itself is seen"
)


def _inside(name: str, pattern: str) -> bool:
    """Whether a module, or one that it is inside of, fits."""
    parts = name.split(".")
    outer = [".".join(parts[:n]) for n in range(len(parts) + 1)]
    return any(fnmatch.fnmatchcase(x, pattern) for x in outer)


def _consistency(name: str, first: AttentionQK, second: AttentionQK, **options: Any) -> Tensor:
    if first.causal != second.causal:
        raise ValueError(f"other: layer {name!r} is causal in one view and not in the other")
    mask = _as_bool(name, first)
    more = _as_bool(name, second) if second.mask is not first.mask or second.score_mod is not None else None
    if more is not None:
        mask = more if mask is None else mask & more
    q2 = second.q if second.scale == first.scale else second.q * (second.scale / first.scale)
    return attention_consistency_from_qk(
        first.q, first.k, q2, second.k, scale=first.scale, causal=first.causal, mask=mask, **options
    )


def _as_bool(name: str, x: AttentionQK) -> Tensor | None:
    """The mask as the loss takes it."""
    if x.score_mod is not None:
        what = x.score_mod if isinstance(x.score_mod, str) else "a score_mod"
        raise ValueError(f"layer {name!r}: its scores are changed by {what}, which consistency does not know")
    if x.mask is None or (isinstance(x.mask, Tensor) and x.mask.dtype == torch.bool):
        return x.mask
    if not isinstance(x.mask, Tensor):
        from torch.nn.attention.flex_attention import create_mask

        return create_mask(x.mask, x.q.shape[0], x.q.shape[1], x.q.shape[2], x.k.shape[2], device=str(x.q.device))
    mask = x.mask.detach()
    kept = mask == 0
    if not bool((kept | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise ValueError(f"layer {name!r}: its floating-point mask is more than 0 and -inf, which consistency needs")
    return kept
