"""The module form of a loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .checks import as_plain, check_dense, check_no_graph


class Loss(nn.Module):
    """Module form of a loss function: keyword options at construction, tensors at call.

    A subclass names its function, `fn = staticmethod(pixel_loss)`. Options are checked against the function's
    keyword-only parameters; a tensor or Parameter option (a learnable temperature) becomes a buffer or Parameter.
    numpy's numbers and vectors become Python's, which torch.compile takes for constants.
    Keywords given at call override the options of the module for that call.

    Raises:
        TypeError: an unknown option. ValueError: an option is a tensor that requires a gradient and no Parameter.
    """

    fn: Callable[..., Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        keywords = inspect.signature(self.fn).parameters.values()
        allowed = [p.name for p in keywords if p.kind is inspect.Parameter.KEYWORD_ONLY]
        for name, value in options.items():
            if name not in allowed:
                raise TypeError(f"{type(self).__name__}: unknown option {name!r}; the options are {allowed}")
            check_no_graph(type(self).__name__, name, value)
            if isinstance(value, Tensor):
                check_dense(name, value)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, as_plain(value))
        self._options = tuple(options)

    def forward(self, *tensors: Any, **overrides: Any) -> Any:
        options = {name: getattr(self, name) for name in self._options}
        return self.fn(*tensors, **(options | overrides))

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in self._options}
        return ", ".join(f"{k}={'<tensor>' if isinstance(v, Tensor) else repr(v)}" for k, v in shown.items())
