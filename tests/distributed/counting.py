"""What a rank counts of a step: the bytes that arrive, and the similarities that it makes."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastloss import Exchange, clip_loss, info_nce, nt_xent_loss, siglip_loss, supcon_loss
from tests.distributed.cases import BOTH, EQUAL, MIB, STRATEGIES


def traffic(rank: int, world: int) -> dict[str, list[int]]:
    """Bytes that arrive in a step's large collectives, per rank, for bfloat16 and float32 embeddings."""
    from fastloss.distributed import collectives

    sizes: list[int] = []
    gather, reduce = collectives.all_gather, collectives.reduce_scatter

    def all_gather(out: Tensor, x: Tensor, **options: Any) -> Any:
        sizes.append((world - 1) * x.nbytes)
        return gather(out, x, **options)

    def reduce_scatter(out: Tensor, x: Tensor, **options: Any) -> Any:
        sizes.append((world - 1) * out.nbytes)
        return reduce(out, x, **options)

    collectives.all_gather, collectives.reduce_scatter = all_gather, reduce_scatter
    found = {}
    try:
        for name, dtype, exchange, loss_fn in (
            ("float32", torch.float32, None, info_nce),
            ("bfloat16", torch.bfloat16, None, info_nce),
            ("wire", torch.float32, Exchange(wire=torch.bfloat16), info_nce),
            ("clip, groups", torch.float32, None, grouped),
        ):
            query, key = (torch.randn(EQUAL, 8, dtype=dtype).requires_grad_() for _ in range(2))
            loss_fn(query, key, group=dist.group.WORLD, exchange=exchange).backward()
            found[name] = [size for size in sizes if size > (world - 1) * 8 * EQUAL]  # not the groups
            sizes.clear()
    finally:
        collectives.all_gather, collectives.reduce_scatter = gather, reduce
    return found | in_pieces(rank, world)


def in_pieces(rank: int, world: int) -> dict[Any, list[int]]:
    """Bytes of embeddings and gradients that arrive in forward and backward, by strategy, loss and dtype."""
    from fastloss.distributed import walks

    arrived = [0]
    gather, reduce, exchange = walks.all_gather, walks.reduce_scatter, walks.send_and_receive

    def all_gather(out: Tensor, x: Tensor, **options: Any) -> Any:
        arrived[0] += (world - 1) * x.nbytes
        return gather(out, x, **options)

    def reduce_scatter(out: Tensor, x: Tensor, **options: Any) -> Any:
        arrived[0] += (world - 1) * out.nbytes
        return reduce(out, x, **options)

    def send_and_receive(ops: list[Any]) -> Any:
        arrived[0] += sum(op.tensor.nbytes for op in ops if op.op is dist.irecv)
        return exchange(ops)

    walks.all_gather, walks.reduce_scatter, walks.send_and_receive = all_gather, reduce_scatter, send_and_receive
    found = {}
    try:
        for strategy in ("chunked", "ring"):
            for name, dtype, wire in (
                ("float32", torch.float32, None),
                ("bfloat16", torch.bfloat16, None),
                ("wire", torch.float32, torch.bfloat16),
            ):
                where = {"group": dist.group.WORLD, "exchange": Exchange(strategy=strategy, mib=MIB, wire=wire)}
                for loss_fn, options in ((info_nce, {}), (grouped, {}), (siglip_loss, BOTH), (nt_xent_loss, {})):
                    if name != "float32" and loss_fn is not info_nce:
                        continue
                    a, b = (torch.randn(EQUAL, 8, dtype=dtype).requires_grad_() for _ in range(2))
                    arrived[0] = 0
                    loss = loss_fn(a, b, **options, **where)
                    forward = arrived[0]
                    loss.backward()
                    found[strategy, loss_fn.__name__, name] = [forward, arrived[0] - forward]
    finally:
        walks.all_gather, walks.reduce_scatter, walks.send_and_receive = gather, reduce, exchange
    return found


def grouped(image: Tensor, text: Tensor, **where: Any) -> Tensor:
    """With several positives a row and a column."""
    of = {"image_groups": torch.arange(len(image)) // 2, "text_groups": torch.arange(len(text)) // 3}
    return clip_loss(image, text, logit_scale=3.0, **of, **where)


def similarities(rank: int, world: int) -> dict[Any, list[int]]:
    """How many similarities a rank makes in forward and backward, by strategy and loss, of EQUAL rows a rank."""
    stats, pairs = (importlib.import_module(f"fastloss.contrastive.{name}") for name in ("ops.softmax_stats", "siglip"))
    made, originals = [0], (stats.logits_of, pairs.siglip_reference, pairs.siglip.reference)

    def logits_of(x: Any) -> Any:
        rows, columns = x.query.shape[0], x.key.shape[0]
        made[0] += rows * (rows + 1) // 2 if x.self_similarity else rows * columns
        return originals[0](x)

    def of_pairs(x: Any) -> Tensor:
        made[0] += x.image.shape[0] * x.text.shape[0]
        return originals[1](x)

    stats.logits_of, pairs.siglip_reference = logits_of, of_pairs
    pairs.siglip.reference = lambda *args: of_pairs(pairs.Inputs(*args))
    found = {}
    try:
        for strategy in STRATEGIES:
            where = {"group": dist.group.WORLD, "exchange": Exchange(strategy=strategy, mib=MIB)}
            for name, call in (
                ("info_nce", lambda a, b: info_nce(a, b, **where)),  # noqa: B023 called at once
                ("clip", lambda a, b: clip_loss(a, b, logit_scale=3.0, **where)),  # noqa: B023
                ("siglip", lambda a, b: siglip_loss(a, b, **BOTH, **where)),  # noqa: B023
                ("nt_xent", lambda a, b: nt_xent_loss(a, b, **where)),  # noqa: B023
                ("supcon", lambda a, b: supcon_loss(a, torch.arange(len(a)) // 2, **where)),  # noqa: B023
                ("clip, groups", lambda a, b: grouped(a, b, **where)),  # noqa: B023
                ("clip, three texts an image", lambda a, b: grouped(a, torch.cat((b, b, b)), **where)),  # noqa: B023
            ):
                a, b = (torch.randn(EQUAL, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
                made[0] = 0
                loss = call(a, b)
                forward = made[0]
                loss.backward()
                found[strategy, name] = [forward, made[0] - forward]
    finally:
        stats.logits_of, pairs.siglip_reference, pairs.siglip.reference = originals
    return found
