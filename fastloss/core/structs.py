"""NamedTuples in the functions of an op, their fields one by one in its schema.

    def _siglip_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads

is written so for people. The dispatcher, C++ and autograd know a flat list: `grad`, the fields of `Inputs`, those of
`Saved`, those of `Needs` as `needs_<field>`, and a tuple of the fields of `Grads` comes back. A forward returns
`tuple[Tensor, Saved]`, the output and what is saved. Nobody but :func:`flattened` makes the list from the structs.
A `Grads` of one field comes back as that one tensor.

A backward keeps for itself the fields that it takes, and no others. One that does without some inputs takes, in the
place of `Inputs`, a struct of those that it needs, under the same names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

NEEDS = "needs"  # the parameter whose fields are flags: their names would be those of the inputs


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _fields(name: str, struct: Any) -> Iterator[inspect.Parameter]:
    prefix = "needs_" if name == NEEDS else ""
    for field, kind in get_type_hints(struct).items():
        yield inspect.Parameter(prefix + field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)


def _flat_types(returned: Any) -> list[Any]:
    parts = [returned] if _is_struct(returned) else get_args(returned)
    return [kind for part in parts for kind in (get_type_hints(part).values() if _is_struct(part) else [part])]


@functools.cache
def flattened(fn: Callable) -> Callable:
    """`fn` with the fields of its structs as parameters and results; `fn` itself where it has no structs."""
    signature = inspect.signature(fn, eval_str=True)
    returned = signature.return_annotation
    nested = _is_struct(returned) or any(map(_is_struct, get_args(returned)))
    parameters: list[inspect.Parameter] = []
    places: list[tuple[Any, int, int]] = []  # of each parameter of `fn`: its struct or None, where its fields are
    for parameter in signature.parameters.values():
        struct = parameter.annotation if _is_struct(parameter.annotation) else None
        fields = [parameter] if struct is None else list(_fields(parameter.name, struct))
        places.append((struct, len(parameters), len(parameters) + len(fields)))
        parameters += fields
    if not nested and all(struct is None for struct, _, _ in places):
        return fn

    types = _flat_types(returned)

    def flat(*args: Any) -> Any:
        out = fn(*[args[first] if struct is None else struct(*args[first:end]) for struct, first, end in places])
        if not nested:
            return out
        values: list[Any] = []
        for part in out:
            values += part if isinstance(part, tuple) else [part]
        return tuple(values) if len(types) > 1 else values[0]

    returns = returned if not nested else tuple[tuple(types)] if len(types) > 1 else types[0]  # type: ignore[misc]
    flat.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return flat
