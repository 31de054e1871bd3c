"""The calls of attention that a model makes, as a torch function mode sees them: queries, keys and what masks them.

Each way to call attention has a reader here, which says what went in and leaves the call as it is.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MHA = inspect.signature(F.multi_head_attention_forward)
MHA_REFUSED = {"bias_k": "a learned key", "add_zero_attn": "a key of zeros", "static_k": "keys of its own"}


class AttentionQK(NamedTuple):
    """What one attention compared: the softmax of scale q k^T, over the keys that are not masked."""

    q: Tensor  # [B, H, Q, d]
    k: Tensor  # [B, G, K, d]: G divides H, query head h has the keys of head h // (H // G)
    scale: float
    causal: bool = False  # key j takes part in row i for j <= i
    # Broadcastable to [B, H, Q, K]: bool, True where the key takes part, or floating point, added to the scores; or
    # flex_attention's mask_mod(b, h, q, k). None: every key takes part, but for causal.
    mask: Tensor | Callable[..., Tensor] | None = None
    score_mod: Any = None  # what else changes the scores before their softmax: flex_attention's function, or its name


class AttentionCalls(TorchFunctionMode):
    """Appends an AttentionQK to `seen` (or, from inside a compiled graph, how to make one) for each attention.

    Args:
        wanted: whether the attention of the module that runs now is; asked before anything is computed for it.
        name: what the errors call that module.
    """

    def __init__(self, wanted: Callable[[], bool], name: Callable[[], str]) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.wanted, self.name = wanted, name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        # torch.compile traces this method too, and appends at run time; what it reads here it has to guard.
        if torch.compiler.is_compiling():
            if getattr(func, "__name__", "") == "flex_attention":
                self.seen.append((args[0], args[1], args[3], args[4], args[5]))
            elif func is F.scaled_dot_product_attention:
                self.seen.append((args, kwargs))
            return func(*args, **kwargs)
        reader = READERS.get(func)
        if reader is not None and torch._C._current_graph_task_id() == -1 and self.wanted():  # no recomputation
            found = reader(args, kwargs, self.name)
            if found is not None:
                self.seen.append(found)
        return func(*args, **kwargs)

    def drain(self) -> list[AttentionQK]:
        """What was seen since the last time."""
        if not self.seen:
            return []
        found = [x if isinstance(x, AttentionQK) else _of_graph(*x) for x in self.seen]
        self.seen.clear()
        return found


def _of_graph(*call: Any) -> AttentionQK:
    if len(call) == 2:
        return _of_sdpa(*call)
    q, k, score_mod, block_mask, scale = call
    from torch.nn.attention import flex_attention as flex  # imported by who called it

    mask = None if block_mask[-1] is flex.noop_mask else block_mask[-1]
    return AttentionQK(q, k, float(scale), mask=mask, score_mod=None if _is_identity(score_mod, flex) else score_mod)


def _is_identity(score_mod: Any, flex: Any) -> bool:
    """torch's own, or that which transformers always passes, if there is none of what it may add."""
    if score_mod is flex._identity:
        return True
    of_transformers = getattr(score_mod, "__qualname__", "") == "flex_attention_forward.<locals>.score_mod"
    return of_transformers and all(cell.cell_contents is None for cell in score_mod.__closure__ or ())


def _read_sdpa(args: tuple, kwargs: dict[str, Any], name: Callable[[], str]) -> AttentionQK:
    return _of_sdpa(args, kwargs)


def _of_sdpa(args: tuple, kwargs: dict[str, Any]) -> AttentionQK:
    return _sdpa(*args, **kwargs)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionQK:
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if query.ndim == 3:  # [B, Q, d]: one head
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        attn_mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
    return AttentionQK(query, key, scale, bool(is_causal), attn_mask)


def _read_mha(args: tuple, kwargs: dict[str, Any], name: Callable[[], str]) -> AttentionQK:
    """The queries and keys of torch.nn.MultiheadAttention, projected a second time: its own never leave its call."""
    bound = MHA.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    for option, what in MHA_REFUSED.items():
        if call[option] is not None and call[option] is not False:
            raise ValueError(
                f"collect_qk: layer {name()!r} is a MultiheadAttention with {option}, so its softmax has {what} beside "
                "those of its input. Leave it out with layers="
            )
    with contextlib.ExitStack() as stack:
        if not torch._C._are_functorch_transforms_active():
            # Activation checkpoints count what is saved in their region, and would miss this when they run it again.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        q, k = _project(call)
    causal = bool(call["is_causal"] and call["key_padding_mask"] is None and not call["need_weights"])
    mask = None if causal else _mha_mask(call, q.shape[0], k.shape[2])
    return AttentionQK(q, k, q.shape[-1] ** -0.5, causal, mask)


def _same(x: Tensor) -> Tensor:
    return x


def _project(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """([N, H, L, d], [N, H, S, d])."""
    if call["use_separate_proj_weight"]:
        weights = (call["q_proj_weight"], call["k_proj_weight"])
    else:
        weights = call["in_proj_weight"].chunk(3)[:2]
    biases = (None, None) if call["in_proj_bias"] is None else call["in_proj_bias"].chunk(3)[:2]
    out = []
    for x, weight, bias in zip((call["query"], call["key"]), weights, biases, strict=True):
        x = F.linear(x if x.ndim == 3 else x.unsqueeze(1), weight, bias)  # [L, N, H d]
        out.append(x.unflatten(-1, (call["num_heads"], -1)).permute(1, 2, 0, 3))
    q, k = out
    return q, k


def _mha_mask(call: dict[str, Any], batch: int, keys: int) -> Tensor | None:
    """Both masks in one, bool if both are. MultiheadAttention's bool masks are True where the key is left out."""
    mask, padding = call["attn_mask"], call["key_padding_mask"]
    parts = []
    if mask is not None:
        parts.append(mask if mask.ndim == 2 else mask.unflatten(0, (batch, -1)))
    if padding is not None:
        parts.append(padding.reshape(batch, 1, 1, keys))
    if not parts:
        return None
    if all(part.dtype == torch.bool for part in parts):
        return torch.stack(torch.broadcast_tensors(*parts)).any(0).logical_not()
    scores = [_as_scores(part, call["query"].dtype) for part in parts]
    return scores[0] if len(scores) == 1 else scores[0] + scores[1]


def _as_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _read_eager(args: tuple, kwargs: dict[str, Any], name: Callable[[], str]) -> AttentionQK | None:
    """transformers' attention in plain products: the first product in its `eager_attention_forward`, of which every
    model of it has one, with the same names."""
    frame = _caller()
    if frame is None or frame.f_code.co_name != "eager_attention_forward":
        return None
    at = frame.f_locals
    q, k = at.get("query"), at.get("key")
    if "attn_weights" in at or not isinstance(q, Tensor) or not isinstance(k, Tensor):
        return None
    scale = at.get("scaling")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    more = at.get("kwargs") or {}
    others = [x for x in ("softcap", "position_bias") if at.get(x, more.get(x)) is not None]
    others += ["sinks"] if getattr(at.get("module"), "sinks", None) is not None else []
    mask = at.get("attention_mask")
    if isinstance(mask, Tensor):
        mask = mask[..., : k.shape[2]]
    return AttentionQK(q, k, scale, mask=mask, score_mod=", ".join(others) or None)


def _caller() -> FrameType | None:
    """The frame that called the torch function, below any modes."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name in ("_caller", "_read_eager", "__torch_function__"):
        frame = frame.f_back
    return frame


READERS: dict[Any, Callable[..., AttentionQK | None]] = {
    F.scaled_dot_product_attention: _read_sdpa,
    F.multi_head_attention_forward: _read_mha,
    torch.matmul: _read_eager,
}
