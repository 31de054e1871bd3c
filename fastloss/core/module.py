"""The module form of a loss."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .checks import as_plain, check_dense, check_no_graph
from .entry import Names, names_of, unknown_option


class Loss(nn.Module):
    """Module form of a loss function: options at construction, tensors at call.

    A subclass names its function, `fn = staticmethod(pixel_loss)`; its `__init__` and `forward` have the options, the
    tensors and the docstring of that. Options are checked against the function's keyword-only parameters; the first of
    them may come without its name, ``PixelLoss(1)``. A tensor or Parameter option (a learnable temperature) becomes a
    buffer or Parameter. numpy's numbers and vectors become Python's, which torch.compile takes for constants.
    Keywords given at call override the options of the module for that call.

    Raises:
        TypeError: an unknown option. ValueError: an option is a tensor that requires a gradient and no Parameter.
    """

    fn: Callable[..., Any]
    at_call: tuple[str, ...] = ()  # options that may follow the tensors of a call without their names
    _names: Names

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "fn" in vars(cls):
            cls._names = names_of(cls.fn)
            _document(cls)

    def __init__(self, *first: Any, **options: Any) -> None:
        super().__init__()
        owner, allowed = type(self).__name__, self._names.options
        if first:
            if len(first) > 1 or not allowed or allowed[0] in options:
                raise TypeError(f"{owner}: expected one option at most without its name, {allowed[:1]}, and only once")
            options = {allowed[0]: first[0], **options}
        for name, value in options.items():
            if name not in allowed:
                raise unknown_option(owner, name, allowed, self._names.hints)
            check_no_graph(owner, name, value)
            if isinstance(value, Tensor):
                check_dense(name, value)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, as_plain(value))
        self._options = tuple(options)

    def forward(self, *tensors: Any, **overrides: Any) -> Any:
        options = {name: getattr(self, name) for name in self._options}
        if self.at_call:
            tensors, overrides = self._with_names(tensors, overrides)
        return self.fn(*tensors, **(options | overrides))

    def _with_names(self, tensors: tuple, overrides: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The tensors of a call, and its keywords with what followed the tensors."""
        count = len(self._names.positional)
        more = tensors[count:]
        if len(more) > len(self.at_call) or any(name in overrides for name in self.at_call[: len(more)]):
            wanted = ", ".join(self._names.positional + self.at_call)
            raise TypeError(
                f"{type(self).__name__}: expected ({wanted}), each once, got {len(tensors)} arguments without a name"
                + (f" and {', '.join(overrides)}" if overrides else "")
            )
        return tensors[:count], overrides | {self.at_call[i]: value for i, value in enumerate(more)}

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in self._options}
        return ", ".join(f"{k}={'<tensor>' if isinstance(v, Tensor) else repr(v)}" for k, v in shown.items())


def _document(cls: type[Loss]) -> None:
    """Give the class an `__init__` and a `forward` of its own that say what its function says, for help() and editors.

    The code is that of :class:`Loss`. Each class needs its own copies, as a signature belongs to a function.
    """
    parameters = inspect.signature(cls.fn).parameters.values()
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    tensors = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = [_with_default(p, "given at call") for p in parameters if p.kind is p.KEYWORD_ONLY]
    first = [p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in options[:1]]
    late = [
        _with_default(p, "the module's").replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for p in parameters
        if p.name in cls.at_call
    ]
    overrides = inspect.Parameter("overrides", inspect.Parameter.VAR_KEYWORD)
    init_doc = f"The options are those of :func:`{cls._names.owner}`, see `forward`; each may come at a call too."
    for made, own, doc in (
        (Loss.__init__, [this, *first, *options[1:]], init_doc),
        (Loss.forward, [this, *tensors, *late, overrides], cls.fn.__doc__),
    ):
        name = made.__name__
        if name in vars(cls):
            continue
        copy = types.FunctionType(made.__code__, made.__globals__, name, made.__defaults__, made.__closure__)
        copy.__doc__, copy.__module__, copy.__qualname__ = doc, cls.__module__, f"{cls.__qualname__}.{name}"
        copy.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        setattr(cls, name, copy)


class _Words(str):
    """A default that help() shows without quotes."""

    def __repr__(self) -> str:
        return f"<{self}>"


def _with_default(parameter: inspect.Parameter, words: str) -> inspect.Parameter:
    return parameter.replace(default=_Words(words)) if parameter.default is parameter.empty else parameter
