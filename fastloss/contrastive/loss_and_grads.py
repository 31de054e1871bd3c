"""A contrastive loss with its gradients in one call, for training that caches embeddings (GradCache)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_tensor
from .checks import as_scalar
from .info_nce import info_nce
from .options import ContrastiveOutput


class LossAndGrads(NamedTuple):
    """A loss and the gradients of its embeddings, detached; `options` has those of the tensor options that need one."""

    loss: Tensor
    query: Tensor
    key: Tensor
    negatives: Tensor | None
    options: dict[str, Tensor]


def loss_and_grads(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    loss_fn: Callable[..., Tensor | ContrastiveOutput] = info_nce,
    scale: float | Tensor = 1.0,
    **options: Any,
) -> LossAndGrads:
    r"""A contrastive loss and its gradients without the caller's autograd graph, for gradient caching.

    Embed a large batch without graphs, call this once on all embeddings, then run the encoder again in small pieces and
    call ``embeddings.backward(gradient_rows)`` on each: the gradient of the large batch at the memory of a piece.

    Args:
        query: embeddings [M, D]. They need no graph; a graph that they have is not touched.
        key: embeddings [N, D], as `loss_fn` takes them.
        negatives: passed on when not None; gets a gradient when it requires one.
        loss_fn: :func:`info_nce`, :func:`clip_loss`, :func:`siglip_loss`, :func:`nt_xent_loss`, or any function of the
            same kind. An option of its own that is called `scale` or `loss_fn` must be bound before:
            ``functools.partial(my_loss, scale=2.0)``.
        scale: number > 0, or a one-element tensor, whose value is not looked at: the gradients are those of
            ``scale * loss``, multiplied before they are rounded to the embeddings' dtype. A mean over a large batch has
            gradients that float16 rounds to 0, where scaling them afterwards comes too late. With a GradScaler::

                scale = scaler.scale(torch.ones((), device=device))      # no wait for the device
                out = loss_and_grads(query, key, scale=scale)
                for piece, grad in ...: encoder(piece).backward(grad)    # rows of out.query, out.key
                scaler.step(optimizer); scaler.update()                  # as after scaler.scale(loss).backward()
        **options: its options; `reduction` must be ``"mean"`` or ``"sum"``.

    Returns:
        :class:`LossAndGrads`: the detached loss, without `scale`; with it the gradients of `query`, `key` and
        `negatives` (None where it needs none) in their own dtypes, and a dict of those of the tensor options that
        require a gradient (`temperature`).

    Raises:
        ValueError: the loss is not a scalar, scale <= 0 or not finite. TypeError, ValueError: what `loss_fn` raises.

    Source: Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021.

    Example:
        >>> out = loss_and_grads(torch.eye(4), torch.eye(4), temperature=0.5)
        >>> out.query.shape
        torch.Size([4, 4])
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {"query": _leaf("query", query, True), "key": _leaf("key", key, True)}
        args = [leaves["query"], leaves["key"]]
        if negatives is not None:
            leaf = _leaf("negatives", negatives, getattr(negatives, "requires_grad", False))
            args.append(leaf)
            if leaf.requires_grad:
                leaves["negatives"] = leaf
        learned = {n: _leaf(n, v, True) for n, v in options.items() if isinstance(v, Tensor) and v.requires_grad}
        out = loss_fn(*args, **(options | learned))
        loss = out if isinstance(out, Tensor) else out[0]
        if loss.ndim:
            raise ValueError(f"loss_fn: expected a scalar loss (reduction 'mean' or 'sum'), got {tuple(loss.shape)}")
        loss_scale = as_scalar("scale", scale, loss, loss.dtype, positive=True)
        upstream = (torch.ones_like(loss) * loss_scale).detach()
        grads = torch.autograd.grad(loss, [*leaves.values(), *learned.values()], upstream, materialize_grads=True)
    named = dict(zip([*leaves, *learned], grads, strict=True))
    query_grad, key_grad = named.pop("query"), named.pop("key")
    return LossAndGrads(loss.detach(), query_grad, key_grad, named.pop("negatives", None), named)


def _leaf(name: str, value: Tensor, needs_grad: bool) -> Tensor:
    check_tensor(name, value)
    value = value.clone() if value.is_inference() else value.detach()
    return value.requires_grad_(needs_grad)
