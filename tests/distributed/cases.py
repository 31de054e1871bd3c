"""The same losses on one process and on several: what each case calls, and the share of the data that a rank has.

Embeddings come from shared parameters, whose gradients are averaged over the ranks as DDP does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastloss
from fastloss import Exchange, NegativeSampling

COUNTS = {1: [7], 2: [7, 5], 3: [7, 5, 9], 4: [7, 5, 9, 4]}
BOTH = {"logit_scale": 3.0, "logit_bias": -1.0}  # that siglip_loss takes
STRATEGIES = ("gather", "chunked", "ring")
MIB = 2e-3  # pieces of a few rows
EQUAL = 6  # rows a rank, where all have as many
WIDTH, NEGATIVES, OWN = 8, 3, 4  # of the embeddings; shared negatives a rank; negatives of each query


class Data(NamedTuple):
    """Inputs of all ranks, or of one: a row a sample, but of the shared negatives and what goes with them."""

    a: Tensor  # [B, 12]
    b: Tensor  # [B, 10]
    own: Tensor  # [B, OWN, 12]
    column: Tensor  # [B, 3], of a bias per key
    ids: Tensor  # [B]
    labels: Tensor  # [B]
    weights: Tensor  # [B]
    mask: Tensor  # [B], the rank of the first rows counts none of them
    upstream: Tensor  # [2 B], for losses of rows
    targets: Tensor  # [B], of the own rank's rows
    negatives: Tensor  # [K, 12]
    negatives_column: Tensor  # [K, 3]
    negatives_ids: Tensor  # [K]
    bank: Tensor  # [NEGATIVES, 12], the same on all ranks

    def of(self, rank: int, counts: list[int]) -> Data:
        start, shared = sum(counts[:rank]), slice(NEGATIVES * rank, NEGATIVES * (rank + 1))
        mine, total = slice(start, start + counts[rank]), sum(counts)
        both = torch.cat((self.upstream[:total][mine], self.upstream[total:][mine]))
        rows = {name: getattr(self, name)[mine] for name in Data._fields if not name.startswith(("negatives", "bank"))}
        shares = {name: getattr(self, name)[shared] for name in Data._fields if name.startswith("negatives")}
        return Data(**(rows | shares | {"upstream": both, "targets": rows["targets"] - start, "bank": self.bank}))

    def to(self, dtype: torch.dtype) -> Data:
        return Data(*(t.to(dtype) if t.dtype == torch.float64 else t for t in self))


def data(counts: list[int]) -> Data:
    g = torch.Generator().manual_seed(3)
    rows, shared = sum(counts), NEGATIVES * len(counts)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def integers(high: int, size: int) -> Tensor:
        return torch.randint(0, high, (size,), generator=g)

    return Data(
        a=normal(rows, 12), b=normal(rows, 10), own=normal(rows, OWN, 12), column=normal(rows, 3),
        ids=integers(rows // 2, rows), labels=integers(4, rows), weights=normal(rows).abs() * (integers(4, rows) > 0),
        mask=torch.arange(rows) >= counts[0], upstream=normal(2 * rows),
        targets=torch.cat([sum(counts[:i]) + integers(max(n, 1), n) for i, n in enumerate(counts)]),
        negatives=normal(shared, 12), negatives_column=normal(shared, 3), negatives_ids=integers(rows // 2, shared),
        bank=normal(NEGATIVES, 12),
    )  # fmt: skip


class Embedded(NamedTuple):
    a: Tensor
    b: Tensor
    own: Tensor
    negatives: Tensor
    key_bias: Tensor  # [B]
    all_bias: Tensor  # [B + K]
    all_ids: Tensor  # [B + K]
    bank: Tensor
    bank_bias: Tensor  # [B + NEGATIVES]
    bank_ids: Tensor  # [B + NEGATIVES]
    scale: Tensor
    bias: Tensor


def parameters(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    sizes = ((12, WIDTH), (10, WIDTH), (3,), (), ())
    values = [torch.randn(size, generator=g, dtype=torch.float64) / 2 for size in sizes]
    return [v.to(dtype).requires_grad_() for v in values]


def embedded(x: Data, of: list[Tensor]) -> Embedded:
    image, text, column, log_scale, bias = of
    key_bias = x.column @ column
    return Embedded(
        a=x.a @ image, b=x.b @ text, own=x.own @ image, negatives=x.negatives @ image, key_bias=key_bias,
        all_bias=torch.cat((key_bias, x.negatives_column @ column)),
        all_ids=torch.cat((x.ids, x.negatives_ids)), bank=x.bank @ image,
        bank_bias=torch.cat((key_bias, x.bank[:, :3] @ column)),
        bank_ids=torch.cat((x.ids, torch.arange(NEGATIVES))), scale=(log_scale + 1.5).exp(), bias=bias,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    loss: str
    call: Callable[[Callable, Embedded, Data, dict], Any]
    options: dict[str, Any] = field(default_factory=dict)
    exchange: dict[str, Any] = field(default_factory=dict)
    equal: bool = False  # all ranks have EQUAL rows
    empty: bool = False  # the second rank has no rows


def _info_nce(**given: str) -> Callable:
    """`given`: options by the name of what of the data they are."""

    def call(loss: Callable, e: Embedded, x: Data, options: dict) -> Any:
        more = {k: getattr(e, v) if v in Embedded._fields else getattr(x, v) for k, v in given.items()}
        negatives = (more.pop("negatives"),) if "negatives" in more else ()
        return loss(e.a, e.b, *negatives, temperature=1 / e.scale, **more, **options)

    return call


def _pairs(**given: str) -> Callable:
    def call(loss: Callable, e: Embedded, x: Data, options: dict) -> Any:
        more = {k: getattr(x, v) for k, v in given.items()}
        numbers = {"logit_bias": e.bias, "logit_scale": e.scale}
        return loss(e.a, e.b, **(numbers | more | options))

    return call


def _views(**given: str) -> Callable:
    def call(loss: Callable, e: Embedded, x: Data, options: dict) -> Any:
        more = {k: getattr(x, v) for k, v in given.items()}
        return loss(e.a, e.b, temperature=1 / e.scale, **more, **options)

    return call


def _labels(**given: str) -> Callable:
    def call(loss: Callable, e: Embedded, x: Data, options: dict) -> Any:
        more = {k: getattr(x, v) for k, v in given.items()}
        return loss(torch.cat((e.a, e.b))[: len(e.a)], x.labels, temperature=1 / e.scale, **more, **options)

    return call


def _captions(loss: Callable, e: Embedded, x: Data, options: dict) -> Any:
    """Two texts an image."""
    groups = {"image_groups": x.labels, "text_groups": torch.cat((x.ids, x.ids + 1))}
    text = torch.cat((e.b, 2 * e.b))
    return loss(e.a, text, logit_scale=e.scale, logit_bias=e.bias, normalize=True, **groups, **options)


def _without_labels(loss: Callable, e: Embedded, x: Data, options: dict) -> Any:
    return loss(torch.stack((e.a, e.b), 1), temperature=1 / e.scale, **options)


SAMPLING = NegativeSampling(hardness=0.5, margin=0.1, tau_plus=0.05)
EVERY = {"symmetric": True, "return_lse": True, "label_smoothing": 0.1, "in_batch": True}
CASES: dict[str, Case] = {
    "clip": Case("clip_loss", _pairs()),
    "clip, normalized": Case("clip_loss", _pairs(), {"normalize": True, "logit_bias": None}, equal=True),
    "clip, a number": Case("clip_loss", _pairs(), {"logit_scale": 3.0, "logit_bias": 0.5, "return_lse": True}),
    "clip, ids, weights, smoothing": Case(
        "clip_loss", _pairs(image_ids="ids", weights="weights"), {"label_smoothing": 0.1, "return_lse": True}
    ),
    "clip, two ids, sum": Case("clip_loss", _pairs(image_ids="ids", text_ids="labels"), {"reduction": "sum"}),
    "clip, rows": Case("clip_loss", _pairs(weights="weights"), {"reduction": "none"}),
    "clip, one rank's rows left out": Case("clip_loss", _pairs(weights="mask"), {}),
    "clip, gradients summed": Case("clip_loss", _pairs(), {}, {"gradients": "sum"}),
    "info_nce": Case("info_nce", _info_nce()),
    "info_nce, equal": Case("info_nce", _info_nce(), {"normalize": False}, equal=True),
    "info_nce, targets": Case("info_nce", _info_nce(targets="targets", query_ids="ids", key_ids="labels")),
    "info_nce, decoupled": Case("info_nce", _info_nce(weights="weights"), {"include_positive": False}),
    "info_nce, sampling": Case("info_nce", _info_nce(), {"sampling": SAMPLING, "return_lse": True}),
    "info_nce, bias": Case("info_nce", _info_nce(bias="bias"), {"return_lse": True, "reduction": "sum"}),
    "info_nce, shared negatives, ids, bias": Case(
        "info_nce",
        _info_nce(negatives="negatives", query_ids="ids", key_ids="all_ids", bias="all_bias"),
        {"in_batch": True},
    ),
    "info_nce, shared negatives alone": Case("info_nce", _info_nce(negatives="negatives", bias="all_bias")),
    "info_nce, a bank": Case("info_nce", _info_nce(negatives="bank"), {}, {"negatives": "replicated"}),
    "info_nce, a bank and the batch, ids, bias": Case(
        "info_nce",
        _info_nce(negatives="bank", bias="bank_bias", query_ids="ids", key_ids="bank_ids"),
        {"in_batch": True},
        {"negatives": "replicated"},
    ),
    "clip, a rank without rows": Case("clip_loss", _pairs(weights="weights"), empty=True),
    "supcon, a rank without rows": Case("supcon_loss", _labels(), empty=True),
    "info_nce, own negatives": Case("info_nce", _info_nce(negatives="own")),
    "info_nce, own negatives and the batch": Case("info_nce", _info_nce(negatives="own"), {"in_batch": True}),
    "info_nce, symmetric with all": Case(
        "info_nce", _info_nce(negatives="negatives", bias="all_bias", weights="weights", key_ids="ids"), EVERY
    ),
    "info_nce, symmetric, sampling": Case("info_nce", _info_nce(), {"symmetric": True, "sampling": SAMPLING}),
    "siglip": Case("siglip_loss", _pairs()),
    "siglip, equal": Case("siglip_loss", _pairs(), {"normalize": True, "logit_bias": -3.0}, equal=True),
    "siglip, ids, weights": Case("siglip_loss", _pairs(text_ids="ids", weights="weights"), {"normalize": True}),
    "siglip, groups": Case("siglip_loss", _pairs(image_groups="labels", text_groups="ids", weights="weights")),
    "siglip, groups, one side, soft": Case(
        "siglip_loss", _captions, {"symmetric": False, "soft_labels": True}, equal=True
    ),
    "clip, groups": Case("clip_loss", _captions, {"label_smoothing": 0.1}),
    "clip, groups, weights": Case("clip_loss", _pairs(image_groups="labels", text_groups="ids", weights="weights")),
    "siglip, negatives": Case("siglip_loss", _pairs(), {"negative_only": True, "reduction": "sum"}),
    "siglip, rows": Case("siglip_loss", _pairs(weights="weights"), {"reduction": "none"}),
    "nt_xent": Case("nt_xent_loss", _views()),
    "nt_xent, equal": Case("nt_xent_loss", _views(), {"normalize": False, "reduction": "sum"}, equal=True),
    "nt_xent, ids, weights, smoothing": Case(
        "nt_xent_loss", _views(ids="ids", weights="weights"), {"label_smoothing": 0.1, "return_lse": True}
    ),
    "nt_xent, sampling, rows": Case("nt_xent_loss", _views(), {"sampling": SAMPLING, "reduction": "none"}),
    "nt_xent, decoupled": Case("nt_xent_loss", _views(), {"include_positive": False}),
    "supcon": Case("supcon_loss", _labels()),
    "supcon, equal": Case("supcon_loss", _labels(), {"normalize": False, "reduction": "sum"}, equal=True),
    "supcon, views": Case("supcon_loss", _without_labels),
    "supcon, other labels": Case(
        "supcon_loss", _labels(weights="weights"), {"include_positive": False, "return_lse": True}
    ),
    "supcon, rows": Case("supcon_loss", _labels(weights="weights"), {"reduction": "none", "return_lse": True}),
}


def counts_of(case: Case, world: int) -> list[int]:
    if case.empty:
        return [4, 0, 5, 3][:world]
    return [EQUAL] * world if case.equal else COUNTS[world]


def result(
    case: Case, dtype: torch.dtype, counts: list[int], rank: int | None, group: Any = None, exchange: Any = None
) -> dict[str, Any]:
    """Loss, by-products and gradients of the parameters, of one rank or (None) of the whole batch on one process."""
    x = data(counts).to(dtype)
    if rank is not None:
        x = x.of(rank, counts)
    of = parameters(dtype)
    e = embedded(x, of)
    options = case.options if group is None else case.options | {"group": group, "exchange": exchange}
    out = case.call(getattr(fastloss, case.loss), e, x, options)
    loss, by_products = (out, ()) if isinstance(out, Tensor) else (out[0], out[1:])
    up = x.upstream[: loss.numel()].to(dtype) if loss.ndim else torch.ones((), dtype=dtype)
    grads = torch.autograd.grad(loss, of, up, materialize_grads=True)
    return {"loss": loss.detach(), "by-products": [t.detach() for t in by_products], "grads": list(grads)}


def exchange_of(case: Case, counts: list[int], strategy: str = "gather") -> Exchange:
    """Uneven rows: told by the ranks, or known; both occur."""
    uneven: Any = "uneven" if len(case.loss) % 2 else counts
    if case.call is _captions:
        uneven = {"image": counts, "text": [2 * n for n in counts]}
    return Exchange(rows="equal" if case.equal else uneven, strategy=strategy, mib=MIB, **case.exchange)
