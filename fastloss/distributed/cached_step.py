"""Gradient caching: the exact gradients of a large batch at the memory of a piece of it.

1. embed all pieces without graphs, and remember the random state that each began with
2. the loss of all embeddings, and its gradients by them
3. embed each piece again, with a graph and the same random numbers, and send its rows of the gradients through it
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from ..core.checks import check_choice, check_flag, check_integer
from ..core.entry import public_function
from .pieces_of_ranks import average_gradients, check_sync_norms, most_pieces


@public_function
def cached_step(
    encoders: Sequence[Callable[..., Any]],
    inputs: Sequence[Any],
    loss_fn: Callable[..., Any],
    *,
    chunk: int = 256,
    embed: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    numbers: Collection[str | int] = ("logit_scale",),
    reduce: str = "step",
    scaler: Any = None,
    progress: bool | Callable[[int, int], None] = False,
) -> Tensor:
    r"""Forward and backward of a batch too large for one graph: gradients are those of ``loss_fn`` of the whole batch.

    In place of ``loss_fn(encoder_a(a), encoder_b(b)).backward()``, at the activations of `chunk` rows and a second
    forward of the encoders::

        loss = cached_step((image_encoder, text_encoder), (images, tokens), clip, chunk=256)
        optimizer.step()

    The second pass has the random numbers (dropout) and the autocast of the first, buffers move once (BatchNorm's
    statistics, piece by piece), and afterwards the generators stand where the first pass and the loss left them.
    Gradients are added to ``.grad``. An encoder without a parameter that needs a gradient runs once.

    Under DistributedDataParallel the gradients are averaged over its ranks once, at the end, with all parameters, also
    those that `loss_fn` alone reads; not inside ``no_sync()``. For the loss of the batch of all ranks, `loss_fn` is one
    with a `group`.

    Modules of ``fully_shard`` (FSDP2) reduce their gradients themselves, see `reduce`. A parameter of theirs that
    `loss_fn` needs must come to it as an output (`numbers`), as outside of its forward a rank has only a shard of it.

    Ranks may have different numbers of pieces. Under FSDP, whose every forward is one of all ranks, those with fewer
    repeat their last piece with gradients of 0.

    Args:
        encoders: modules or functions, one per input; one may stand there twice.
        inputs: a tensor [M, ...] each, or a tuple (positional arguments) or a mapping (keywords) of such tensors. What
            is no tensor, or a 0-D one, goes to every piece. Each input has a number of rows M of its own.
        loss_fn: of the outputs of all encoders, rows of all pieces together; returns a scalar, or a tuple that begins
            with one. Tensors that it reads elsewhere, such as a parameter, get their gradients too.
        chunk: rows of a piece, >= 1. BatchNorm normalises over a piece.
        embed: ``embed(encoder, piece)`` to be called in place of the encoder, or a sequence of such functions, one per
            encoder, e.g. ``lambda model, x: model.encode_image(x)``. Of a DistributedDataParallel it gets the module.
        numbers: keys of a dict, or positions in a tuple, of outputs that are no rows: each is taken from the last piece
            and gets its gradient once. 0-D tensors always are.
        reduce: when the gradients of FSDP2 modules are reduced. ``"step"``: once, with the last piece; until then a
            rank holds gradients of whole parameters. ``"chunk"``: after each piece; a rank holds gradients of its
            shards alone, and communicates as often as there are pieces. DistributedDataParallel, with nothing to
            shard, averages once in either case.
        scaler: a ``torch.amp.GradScaler``, which then scales the loss before its backward.
        progress: True: a bar (needs tqdm). A function: called with the pieces done and all of them.

    Returns:
        The detached loss, without the scaler's factor.

    Raises:
        TypeError, ValueError: arguments that do not fit one another, an output that is neither rows nor among
            `numbers`, a FullyShardedDataParallel module (FSDP1, there is no support for it), a loss that is no scalar,
            SyncBatchNorm where ranks have different numbers of pieces.

    Source: Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021.

    Example:
        >>> encoder = torch.nn.Linear(3, 2)
        >>> loss = cached_step((encoder,), (torch.ones(5, 3),), lambda x: x.square().mean(), chunk=2)
        >>> encoder.weight.grad.shape
        torch.Size([2, 3])
    """
    chunk = check_integer("chunk", chunk, 1)
    check_choice("reduce", reduce, ("step", "chunk"))
    towers = [_Tower(*each, chunk, numbers) for each in _each(encoders, inputs, embed)]
    report = _reporter(progress, sum(len(tower.pieces) * (1 + tower.trains) for tower in towers))
    autocast = _autocast_of_now()
    with torch.no_grad(), _buffers_as_before(towers):
        for tower in towers:
            tower.first_pass(autocast, report)
    with torch.enable_grad():
        outputs = [tower.joined() for tower in towers]
        found = loss_fn(*outputs)
        loss = found if isinstance(found, Tensor) else found[0]
        if loss.ndim:
            raise ValueError(f"loss_fn: expected a scalar loss, got shape {tuple(loss.shape)}")
        (loss if scaler is None else scaler.scale(loss)).backward()
        del found, outputs
        last_uses = {tower.use: tower for tower in towers}
        for tower in towers:
            if tower.trains:
                tower.second_pass(autocast, report, reduce == "chunk", last_uses[tower.use] is tower)
    for replicas in {id(tower.replicas): tower.replicas for tower in towers}.values():
        if replicas is not None and replicas.require_backward_grad_sync:
            average_gradients(replicas)
    return loss.detach()


class _Output(NamedTuple):
    """A tensor of the encoder's output: where it stands, and what of it there is so far."""

    name: str
    is_number: bool
    parts: list[Tensor]


class _Tower:
    """An encoder with its input: the pieces, their random states, and the leaves that the loss is computed from."""

    def __init__(self, encoder: Any, given: Any, embed: Any, chunk: int, numbers: Collection[str | int]) -> None:
        self.replicas = encoder if isinstance(encoder, DistributedDataParallel) else None
        self.encoder: Any = encoder.module if self.replicas is not None else encoder
        self.embed, self.numbers = embed, numbers
        self.use = id(encoder), id(embed)  # the same parts of the same encoder
        modules = list(self.encoder.modules()) if isinstance(self.encoder, nn.Module) else []
        if any(_is_a("FullyShardedDataParallel", module) for module in modules):
            raise TypeError(
                "encoders: FullyShardedDataParallel (FSDP1) is not supported; use torch.distributed.fsdp.fully_shard"
            )
        self.shards = [module for module in modules if _is_a("FSDPModule", module)]
        self.trains = not modules or any(p.requires_grad for p in self.encoder.parameters())
        self.given = given
        rows = _rows_of(given)
        self.pieces = [(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
        check_sync_norms(modules, len(self.pieces))
        self.repeats = most_pieces(self.shards, len(self.pieces)) - len(self.pieces)
        self.devices = sorted({t.device for t in _tensors(given) if t.device.type not in ("cpu", "meta")}, key=str)
        self.states: list[_Generators] = []
        self.outputs: list[_Output] = []
        self.leaves: list[Tensor] = []
        self.structure: Any = None

    def _call(self, piece: tuple[int, int]) -> Any:
        x = _sliced(self.given, *piece)
        if self.embed is not None:
            return self.embed(self.encoder, x)
        if isinstance(x, dict):
            return self.encoder(**x)
        return self.encoder(*x) if isinstance(x, (tuple, list)) else self.encoder(x)

    def first_pass(self, autocast: Callable, report: Callable) -> None:
        for start, end in self.pieces:
            self.states.append(_Generators(self.devices))
            with autocast():
                out = self._call((start, end))
            named, self.structure = pytree.tree_flatten_with_path(out)
            if not self.outputs:
                self.outputs = [_Output(*self._kind(path, value), []) for path, value in named]
            for output, (_, value) in zip(self.outputs, named, strict=True):
                if output.is_number:
                    output.parts.clear()
                elif value.ndim == 0 or value.shape[0] != end - start:
                    raise ValueError(
                        f"embed: expected {end - start} rows for a piece of so many, got shape {tuple(value.shape)} as "
                        f"{output.name}; if it is no rows, name it in `numbers`"
                    )
                output.parts.append(value)
            report()
        for _ in range(self.repeats):
            self._repeat(autocast)

    def _kind(self, path: tuple, value: Any) -> tuple[str, bool]:
        keys = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path]
        name = "output" + "".join(f"[{key!r}]" for key in keys)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"embed: expected tensors, alone or in tuples and dicts, got {type(value).__name__} as {name}"
            )
        return name, value.ndim == 0 or any(key in self.numbers for key in keys)

    def joined(self) -> Any:
        """The outputs with the rows of all pieces, as new leaves."""
        for output in self.outputs:
            whole = output.parts[0].clone() if output.is_number else torch.cat(output.parts)
            output.parts.clear()
            needs = self.trains and whole.is_floating_point()
            self.leaves.append(whole.detach().requires_grad_(needs))
        return pytree.tree_unflatten(self.leaves, self.structure)

    def second_pass(self, autocast: Callable, report: Callable, reduce_each: bool, reduce_last: bool) -> None:
        """Each piece again, with its rows of the gradients; FSDP reduces after each of them, or with the last."""
        for place, (start, end) in enumerate(self.pieces):
            self._reduce_next(reduce_each or (reduce_last and not self.repeats and place == len(self.pieces) - 1))
            with self.states[place].again(), autocast():
                values = pytree.tree_leaves(self._call((start, end)))
            tensors, grads = [], []
            for output, value, leaf in zip(self.outputs, values, self.leaves, strict=True):
                last = place == len(self.pieces) - 1
                if leaf.grad is None or not value.requires_grad:
                    continue
                if output.is_number and not last:
                    if not self.shards:
                        continue
                    grads.append(torch.zeros_like(leaf.grad))  # FSDP: the same parameters in each piece of all ranks
                else:
                    grads.append(leaf.grad if output.is_number else leaf.grad[start:end])
                tensors.append(value)
            if tensors:
                torch.autograd.backward(tensors, grads)
            report()
        for repeat in range(self.repeats):
            self._reduce_next(reduce_each or (reduce_last and repeat == self.repeats - 1))
            self._repeat(autocast)
        self._reduce_next(True)

    def _repeat(self, autocast: Callable) -> None:
        """The last piece once more while other ranks have pieces: its outputs are dropped, its gradients are 0."""
        buffers = [(buffer, buffer.clone()) for buffer in self.encoder.buffers()]
        with self.states[-1].again(), autocast():
            values = pytree.tree_leaves(self._call(self.pieces[-1]))
        tensors = []
        for value, leaf in zip(values, self.leaves, strict=False):  # no leaves yet in the first pass
            if leaf.grad is not None and value.requires_grad:
                tensors.append(value)
        if tensors:
            torch.autograd.backward(tensors, [torch.zeros_like(value) for value in tensors])
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    def _reduce_next(self, reduces: bool) -> None:
        for module in self.shards:
            module.set_requires_gradient_sync(reduces, recurse=False)  # type: ignore[operator]


def _is_a(kind: str, module: nn.Module) -> bool:
    """Whether it is of a class of that name, whose module takes long to import."""
    return any(base.__name__ == kind for base in type(module).__mro__)


class _Generators:
    """The random states of the CPU and of devices, as they are now."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices, self.of_cpu = devices, torch.get_rng_state()
        self.of_devices = [torch.get_device_module(d.type).get_rng_state(d) for d in devices]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """These states inside, and those of before afterwards."""
        outer = _Generators(self.devices)
        self._set()
        try:
            yield
        finally:
            outer._set()

    def _set(self) -> None:
        torch.set_rng_state(self.of_cpu)
        for device, state in zip(self.devices, self.of_devices, strict=True):
            torch.get_device_module(device.type).set_rng_state(state, device)


def _each(encoders: Any, inputs: Any, embed: Any) -> list[tuple[Any, Any, Any]]:
    """(encoder, input, its embed) for each of them."""
    for name, value in (("encoders", encoders), ("inputs", inputs)):
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}: expected a tuple, one for each encoder, got {type(value).__name__}")
    if not encoders or len(encoders) != len(inputs):
        raise ValueError(f"inputs: expected one per encoder, {len(encoders)} (at least 1), got {len(inputs)}")
    for i, encoder in enumerate(encoders):
        if not callable(encoder):
            raise TypeError(f"encoders[{i}]: expected a module or a function, got {type(encoder).__name__}")
    own = list(embed) if isinstance(embed, (tuple, list)) else [embed] * len(encoders)
    if len(own) != len(encoders):
        raise ValueError(f"embed: expected one function, or one per encoder, {len(encoders)}, got {len(own)}")
    return list(zip(encoders, inputs, own, strict=True))


def _tensors(x: Any) -> list[Tensor]:
    """Of an input, those that have rows."""
    if isinstance(x, Tensor):
        return [x] if x.ndim else []
    if isinstance(x, Mapping):
        return [t for value in x.values() for t in _tensors(value)]
    return [t for value in x for t in _tensors(value)] if isinstance(x, (tuple, list)) else []


def _rows_of(x: Any) -> int:
    lengths = [t.shape[0] for t in _tensors(x)]
    if not lengths or lengths[0] == 0:
        raise ValueError("inputs: expected tensors [M, ...] with M >= 1 in each of them")
    if any(length != lengths[0] for length in lengths):
        raise ValueError(f"inputs: expected tensors of one length within an input, got {sorted(set(lengths))}")
    return lengths[0]


def _sliced(x: Any, start: int, end: int) -> Any:
    """A piece of an input; a mapping of any class comes out as a dict."""
    if isinstance(x, Tensor):
        return x[start:end] if x.ndim else x
    if isinstance(x, Mapping):
        return {name: _sliced(value, start, end) for name, value in x.items()}
    return type(x)([_sliced(value, start, end) for value in x]) if type(x) in (tuple, list) else x


def _autocast_of_now() -> Callable[[], contextlib.AbstractContextManager]:
    """What enters the autocast of this moment. Without its cache, in which weights cast without a graph would stay."""
    kinds = {"cpu"} | ({torch.accelerator.current_accelerator().type} if torch.accelerator.is_available() else set())  # type: ignore[union-attr]
    active = [(kind, torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]

    def enter() -> contextlib.AbstractContextManager:
        stack = contextlib.ExitStack()
        for kind, dtype in active:
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        return stack

    return enter


@contextlib.contextmanager
def _buffers_as_before(towers: Sequence[_Tower]) -> Iterator[None]:
    """Buffers that the first pass moves go back, as the second moves them again."""
    encoders = {id(t.encoder): t.encoder for t in towers if t.trains and isinstance(t.encoder, nn.Module)}
    kept = [(buffer, buffer.clone()) for encoder in encoders.values() for buffer in encoder.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


def _reporter(progress: Any, total: int) -> Callable[[], None]:
    """What is called after each piece."""
    if not callable(progress):
        if not check_flag("progress", progress):
            return lambda: None
        from tqdm import tqdm

        bar = tqdm(total=total, desc="pieces", leave=False)

        def progress(done: int, total: int) -> None:
            bar.update()
            if done == total:
                bar.close()

    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return report
