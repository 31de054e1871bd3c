"""What every public function passes through on its way in: :func:`public_function`.

The names of a call's arguments are looked at only where Python itself has refused them, with a TypeError, so that a
call that is right pays nothing for it. To torch.compile the same names are constants, looked at while it traces.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, overload

import torch
from torch import Tensor

from .inference import copies_for_graph
from .planned_calls import PlannedCalls

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


TORCH_NAMES = {"input": "image_pred", "target": "image"}


class Names(NamedTuple):
    """What a function calls its arguments, and what others call them."""

    owner: str
    positional: tuple[str, ...]
    options: tuple[str, ...]  # the keyword-only ones
    others: Mapping[str, str] | None  # this function's name by that of another library; None: it takes any keyword
    hints: Mapping[str, str]  # what to pass instead, by a name that has no equal here


class TakesInputAndTarget(Protocol[P, R_co]):
    """A loss of images, whose prediction and target may come as torch's keywords `input` and `target` too."""

    __name__: str

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    @overload
    def __call__(self, *, input: Tensor, target: Tensor = ..., **options: Any) -> R_co: ...


def names_of(fn: Callable[..., Any]) -> Names:
    """Those that :func:`public_function` was told, or what the signature has."""
    known = getattr(fn, "names", None)
    return known if isinstance(known, Names) else _read(fn, {}, {})


def _read(fn: Callable[..., Any], others: Mapping[str, str], hints: Mapping[str, str]) -> Names:
    parameters = inspect.signature(fn).parameters.values()
    positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    options = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    owner = fn.__qualname__.removesuffix(".forward")
    others = {name: own for name, own in others.items() if own in positional + options}
    return Names(owner, positional, options, None if takes_any else others, hints)


def unknown_option(
    owner: str, name: str, options: Collection[str], hints: Mapping[str, str] | None = None, of: str = ""
) -> TypeError:
    """The error about a keyword that `owner` does not have: what to pass instead, or the nearest name."""
    found = f"{owner}: unknown option {name!r}; "
    if hints and name in hints:
        return TypeError(f"{found}pass {hints[name]}")
    near = difflib.get_close_matches(name, options, 1)
    every = f"he options{of} are {list(options)}"
    return TypeError(found + (f"did you mean {near[0]!r}? T" if near else "t") + every)


def own_names(names: Names, given: int, options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call, after `given` positional arguments, under the function's own names.

    Raises:
        TypeError: there is no such name, or an argument came under two of its names.
    """
    if names.others is None or all(name in names.positional or name in names.options for name in options):
        return options
    found: dict[str, Any] = {}
    for name, value in options.items():
        own = names.others.get(name, name)
        if own not in names.positional and own not in names.options:
            raise unknown_option(names.owner, name, names.options, names.hints) from None
        if own in found or (own != name and (own in options or own in names.positional[:given])):
            raise TypeError(
                f"{names.owner}: {name} is another name of {own}, which came too; the arguments in order are "
                f"({', '.join(name for name in names.positional if name != 'self')})"
            ) from None
        found[own] = value
    return found


@overload
def public_function(fn: F) -> F: ...


@overload
def public_function(
    *, others: Mapping[str, str] | None = None, hints: Mapping[str, str] | None = None
) -> Callable[[F], F]: ...


def public_function(
    fn: Callable[..., Any] | None = None,
    *,
    others: Mapping[str, str] | None = None,
    hints: Mapping[str, str] | None = None,
) -> Any:
    """`fn`, which gets copies of inference tensors where it records a graph, and other libraries' names as its own.

    Args:
        fn: the function; left out where the decorator has arguments.
        others: its own name of an argument by that of another library. They are taken as keywords.
        hints: what to pass instead of a keyword that has no equal here, for the error: ``{"tau": "temperature=..."}``.
    """
    if fn is None:
        return functools.partial(_entry, others=others or {}, hints=hints or {})
    return _entry(fn, {}, {})


def takes_input_and_target(
    *, hints: Mapping[str, str] | None = None, planned: bool = False
) -> Callable[[Callable[P, R_co]], TakesInputAndTarget[P, R_co]]:
    """:func:`public_function` of a loss of images: torch's `input` is the prediction, its `target` the image.

    `planned`: its calls may go straight to a launch plan, on the terms of core/planned_calls.py.
    """
    return functools.partial(_entry, others=TORCH_NAMES, hints=hints or {}, planned=planned)


def _entry(fn: Callable[..., Any], others: Mapping[str, str], hints: Mapping[str, str], planned: bool = False) -> Any:
    names = _read(fn, others, hints)

    def ordinary(*args: Any, **options: Any) -> Any:
        copies = copies_for_graph(args, options) if torch.is_grad_enabled() else None
        return fn(*args, **options) if copies is None else fn(*copies[0], **copies[1])

    call = PlannedCalls(ordinary) if planned else ordinary

    @functools.wraps(fn)
    def entry(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return fn(*args, **own_names(names, len(args), options))
        try:
            return call(*args, **options)
        except TypeError:
            named = own_names(names, len(args), options)
            if named is options:  # the error was about something else
                raise
        return entry(*args, **named)

    entry.names = names  # type: ignore[attr-defined]
    return _shares_errors(entry) if "group" in names.options else entry


def _shares_errors(entry: Callable[..., Any]) -> Any:
    """`entry`, whose errors the other ranks get to know where the call has a `group`: they would wait for this one."""

    @functools.wraps(entry)
    def call(*args: Any, **options: Any) -> Any:
        if options.get("group") is None or torch.compiler.is_compiling():
            return entry(*args, **options)
        from ..distributed.ranks import together

        return together(entry, args, options)

    return call
