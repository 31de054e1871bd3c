"""What the ranks do in the tests; each part returns what the test of the same name then looks at."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from fastloss import (
    ClipLoss,
    Exchange,
    MemoryBank,
    cached_step,
    clip_loss,
    info_nce,
    nt_xent_loss,
    siglip_loss,
    supcon_loss,
)
from tests.distributed.banks import sharded_bank
from tests.distributed.cases import (
    BOTH,
    CASES,
    COUNTS,
    EQUAL,
    MIB,
    STRATEGIES,
    counts_of,
    data,
    embedded,
    exchange_of,
    parameters,
    result,
)
from tests.distributed.counting import similarities, traffic
from tests.distributed.drop_ins import drop_ins
from tests.distributed.encoders import Encoder, data_of_ranks


def everything(rank: int, world: int) -> dict[str, Any]:
    """All parts in one start of the processes, which takes longer than the parts."""
    parts: dict[str, Callable] = {"losses": losses, "by_module": by_module, "mismatches": mismatches, "wire": wire}
    parts |= {"traffic": traffic, "similarities": similarities, "nothing": nothing, "bank": bank}
    parts["sharded_bank"] = sharded_bank
    parts |= {"compiled": compiled, "cached": cached} if world == 2 else {"of_three": of_three}
    if importlib.util.find_spec("open_clip"):
        parts["open_clip"] = open_clip
    parts["drop_ins"] = drop_ins
    found = {name: part(rank, world) for name, part in parts.items()}
    if world == 4:  # the last, for it leaves the group broken
        found["death"] = death(rank, world)
    return found


def averaged(grads: list[Tensor], world: int, how: str = "mean", group: Any = None) -> list[Tensor]:
    """As DDP averages the gradients of parameters, or as a training does that sums them."""
    for grad in grads:
        dist.all_reduce(grad, group=group)
    return [grad / world for grad in grads] if how == "mean" else grads


def losses(rank: int, world: int, group: Any = dist.group.WORLD) -> dict[Any, Any]:
    """All cases by one gather and in pieces: with one number of ranks in chunks, with the next around a ring; float32
    by one of the two. Three ranks in pieces alone."""
    found = {}
    for i, (name, case) in enumerate(CASES.items()):
        counts = counts_of(case, world)
        strategies = ["gather", STRATEGIES[1 + (i + world) % 2]][world == 3 :]
        for strategy in strategies:
            exchange = exchange_of(case, counts, strategy)
            in_float32 = strategy == strategies[i // 2 % len(strategies)]
            for dtype in (torch.float64, torch.float32) if in_float32 else (torch.float64,):
                got = result(case, dtype, counts, rank, group, exchange)
                got["grads"] = averaged(got["grads"], world, exchange.gradients, group)
                found[name, strategy, dtype] = got
    return found


def of_three(rank: int, world: int) -> dict[Any, Any]:
    """The first three ranks by themselves."""
    group = dist.new_group([0, 1, 2])
    return losses(rank, 3, group) if rank < 3 else {}


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.column, self.log_scale, self.bias = map(nn.Parameter, parameters(torch.float64))

    def forward(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        e = embedded(x, [self.image, self.text, self.column, self.log_scale, self.bias])
        return e.a, e.b, e.scale


def by_module(rank: int, world: int) -> dict[str, Tensor]:
    """A module, a mesh and real DDP, whose buckets share the group with the loss; two steps."""
    mesh, counts = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)), COUNTS[world]
    towers = DistributedDataParallel(Towers(), find_unused_parameters=True)
    loss_fn = ClipLoss(group=mesh["dp"], exchange=Exchange(rows="uneven"))
    for _ in range(2):
        towers.zero_grad()
        image, text, scale = towers(data(counts).of(rank, counts))
        loss = loss_fn(image, text, logit_scale=scale)
        loss.backward()
    grads = {n: p.grad for n, p in towers.module.named_parameters() if n in ("image", "text", "log_scale")}
    return {"loss": loss.detach(), **grads}


def open_clip(rank: int, world: int) -> dict[str, Any]:
    """The averaged loss and gradients of theirs and of ours."""
    (folder,) = importlib.util.find_spec("open_clip").submodule_search_locations
    spec = importlib.util.spec_from_file_location("open_clip_loss", f"{folder}/loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # the package imports all models
    theirs = module.ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world)

    def ours(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return clip_loss(image, text, logit_scale=scale, group=dist.group.WORLD)

    found, counts = {}, [EQUAL] * world
    for name, loss_fn in (("theirs", theirs), ("ours", ours)):
        of = parameters(torch.float64)
        e = embedded(data(counts).of(rank, counts), of)
        loss = loss_fn(e.a, e.b, e.scale)
        grads = torch.autograd.grad(loss, [of[0], of[1], of[3]])
        found[name] = averaged([loss.detach(), *grads], world)
    return found


def mismatches(rank: int, world: int) -> dict[str, str]:
    """What each call says in which the last rank differs from the others; a right one in the end."""
    last = rank == world - 1
    plain = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
    narrow, double, fewer = plain[:, :6], plain.double(), plain[:3]
    odd_width, odd_dtype, odd_rows = (each if last else plain for each in (narrow, double, fewer))
    other = {
        "width": lambda: clip_loss(odd_width, odd_width, **LEARNED),
        "rows": lambda: clip_loss(odd_rows, odd_rows, **LEARNED),
        "dtype": lambda: clip_loss(odd_dtype, odd_dtype, **LEARNED),
        "one dtype": lambda: clip_loss(odd_dtype, plain, **LEARNED),
        "one dtype, siglip": lambda: siglip_loss(odd_dtype, plain, logit_bias=None, **LEARNED),
        "one dtype, groups": lambda: clip_loss(odd_dtype, plain, image_groups=torch.arange(4), **LEARNED),
        "option": lambda: clip_loss(plain, plain, normalize=last, **LEARNED),
        "number": lambda: clip_loss(plain, plain, label_smoothing=0.2 if last else 0.1, **LEARNED),
        "loss": lambda: (siglip_loss if last else clip_loss)(plain, plain, logit_bias=None, **LEARNED),
        "gradient": lambda: clip_loss(plain.clone().requires_grad_(not last), plain, **LEARNED),
        "weights": lambda: nt_xent_loss(plain, plain, weights=torch.ones(4) if last else None, group=dist.group.WORLD),
        "ids": lambda: info_nce(plain, plain, query_ids=torch.ones(4).long() if last else None, group=dist.group.WORLD),
        "negatives": lambda: info_nce(plain, plain, plain[: 1 + last], group=dist.group.WORLD),
        "labels": lambda: supcon_loss(plain, torch.arange(4), include_positive=last, group=dist.group.WORLD),
        "list": lambda: clip_loss(plain, plain, exchange=Exchange(rows=[4] * (world - 1) + [5]), **LEARNED),
        "exchange": lambda: clip_loss(plain, plain, exchange=Exchange(gradients="sum" if last else "mean"), **LEARNED),
        "right": lambda: clip_loss(plain, plain, **LEARNED),
    }  # fmt: skip
    said = {}
    for name, call in other.items():
        try:
            said[name] = f"loss {call().item()}"
        except ValueError as error:
            said[name] = f"ValueError: {error}"
    return said


LEARNED: dict[str, Any] = {"logit_scale": 3.0, "group": dist.group.WORLD}


def wire(rank: int, world: int) -> dict[str, Any]:
    """Ours with rows rounded on their way, and the same by hand: each rank's rows against the others' rounded ones."""
    counts = COUNTS[world]
    x = data(counts).to(torch.float32)
    of = parameters(torch.float32)
    e = embedded(x.of(rank, counts), of)
    exchange = Exchange(rows=counts, wire=torch.bfloat16)
    loss = info_nce(e.a, e.b, temperature=1 / e.scale, normalize=False, group=dist.group.WORLD, exchange=exchange)
    ours = [loss.detach(), *averaged(list(torch.autograd.grad(loss, [of[0], of[1], of[3]])), world)]
    of = parameters(torch.float64)
    whole, start, total = embedded(data(counts), of), 0, torch.zeros((), dtype=torch.float64)
    for rows in counts:
        mine = torch.arange(sum(counts))
        own = ((mine >= start) & (mine < start + rows))[:, None]
        rounded = whole.b + (whole.b.float().bfloat16().double() - whole.b).detach()
        keys, targets = torch.where(own, whole.b, rounded), torch.arange(start, start + rows)
        options = {"normalize": False, "targets": targets, "reduction": "sum"}
        total = total + info_nce(whole.a[targets], keys, temperature=1 / whole.scale, **options)
        start += rows
    mean = total / sum(counts)
    return {"ours": ours, "by hand": [mean.detach(), *torch.autograd.grad(mean, [of[0], of[1], of[3]])]}


def nothing(rank: int, world: int) -> dict[Any, list[Tensor]]:
    """Loss and gradients where all weights of all ranks are 0 and the embeddings no numbers."""
    found = {}
    for strategy in STRATEGIES:
        where = {"group": dist.group.WORLD, "exchange": Exchange(strategy=strategy, mib=MIB)}
        for loss_fn, options in (
            (info_nce, {"symmetric": True}), (clip_loss, {"logit_scale": 3.0}), (siglip_loss, BOTH), (nt_xent_loss, {}),
        ):  # fmt: skip
            a, b = (torch.full((4, 8), torch.nan).requires_grad_() for _ in range(2))
            loss = loss_fn(a, b, weights=torch.zeros(4), **options, **where)
            found[strategy, loss_fn.__name__] = [loss.detach(), *torch.autograd.grad(loss, (a, b))]
    return found


def compiled(rank: int, world: int) -> dict[str, Any]:
    """Each loss compiled without a graph break, and eager: (loss, gradient), at several sizes."""
    group = dist.group.WORLD

    def clip(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return clip_loss(a, b, logit_scale=s.exp(), group=group)

    def others(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        chunked, ring, gather = (
            {"group": group, "exchange": Exchange(strategy=strategy, mib=5e-4, rows=(5, 7))}
            for strategy in ("chunked", "ring", "gather")
        )
        loss = info_nce(a, b, temperature=s.exp(), weights=a[:, 0].detach().abs(), **chunked)
        loss = loss + siglip_loss(a, b, logit_scale=s.exp(), logit_bias=-1.0, **ring)
        loss = loss + nt_xent_loss(a, b, temperature=s.exp(), **gather)
        return loss + supcon_loss(a, torch.arange(len(a)) // 2, temperature=s.exp(), **ring)

    found = {}
    for fn, several in ((clip, (4, 5, 7)), (others, ((5, 7)[rank],))):
        fast = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=fn is clip)
        for rows in several:
            g = torch.Generator().manual_seed(rank)
            for kind, call in (("compiled", fast), ("eager", fn)):
                a, b = (torch.randn(rows, 8, generator=g.manual_seed(rank)).requires_grad_() for _ in range(2))
                s = torch.zeros(()).requires_grad_()
                loss = call(a, b, s)
                found[fn.__name__, rows, kind] = [loss.detach(), *torch.autograd.grad(loss, (a, b, s))]
    return found


def cached(rank: int, world: int) -> dict[str, Any]:
    """Two DDP models, 13 rows on one rank and 7 on the other: 3 pieces and 2; the scale is read beside the forward."""
    x, y = data_of_ranks()
    mine = slice(0, 13) if rank == 0 else slice(13, 20)
    encoders = Encoder(12, scale=True), Encoder(10)
    image, text = (DistributedDataParallel(e) for e in encoders)
    counted, reduce = [], dist.all_reduce

    def loss_fn(a: dict, b: Tensor) -> Tensor:
        scale = encoders[0].log_scale.exp()
        exchange = Exchange(rows="uneven")
        return clip_loss(a["emb"], b, logit_scale=scale, normalize=True, group=dist.group.WORLD, exchange=exchange)

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if tensor.numel() > 1:  # the loss's own are one number each
            counted.append(sum(p.numel() for e in encoders for p in e.parameters() if p.grad is not None))
        return reduce(tensor, *args, **options)

    reductions = []
    dist.all_reduce = all_reduce
    try:
        for quiet in (False, True):
            for e in encoders:
                e.zero_grad()
            counted.clear()
            with image.no_sync() if quiet else torch.enable_grad(), text.no_sync() if quiet else torch.enable_grad():
                cached_step((image, text), (x[mine], y[mine]), loss_fn, chunk=5)
            reductions += [len(counted) // 2, len(counted) - len(counted) // 2]
            if not quiet:
                grads = [p.grad.clone() for e in encoders for p in e.parameters()]
    finally:
        dist.all_reduce = reduce
    normed = nn.Sequential(nn.Linear(12, 8), nn.SyncBatchNorm(8))
    try:
        said = str(cached_step((normed,), (x[mine],), torch.sum, chunk=5))
    except ValueError as error:
        said = str(error)
    return {"reductions": reductions, "grads": grads, "SyncBatchNorm": said}


def bank(rank: int, world: int) -> list[int]:
    """Ids in the bank of a model under DDP, after pushes of rank + 1 rows a rank, with a forward between them."""
    model = nn.Module()
    model.memory, model.linear = MemoryBank(5, 2, group=dist.group.WORLD), nn.Linear(2, 2)
    model.forward = lambda x: model.linear(x)
    replicas = DistributedDataParallel(model)
    for step in range(3):
        ids = 100 * step + 10 * rank + torch.arange(rank + 1)
        model.memory.push(replicas(torch.ones(1, 2)).expand(rank + 1, 2), ids)
    return model.memory.stored()[1].tolist()


def death(rank: int, world: int) -> str:
    """What the others say when the last rank has left."""
    if rank == world - 1:
        return ""
    x = torch.ones(4, 8).requires_grad_()
    try:
        clip_loss(x, x, **LEARNED)
    except RuntimeError as error:
        return str(error)
    return "no error"
