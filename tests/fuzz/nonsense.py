"""A drawn call with one argument replaced by something that does not belong there."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.fuzz.drawer import FLOATS, Drawer
from tests.fuzz.values import Made, Raw, Spelled, T, code


def _table(sure: tuple[str, ...], perhaps: tuple[str, ...]) -> tuple[tuple[str, bool], ...]:
    """(expression, whether no function can make sense of it in that place)."""
    return tuple((text, text in sure) for text in sure + perhaps)


TENSORS = _table(
    sure=(
        "[0.5, 0.25]", "'tensor'", "np.ones((2, 3))", "{t}.to(torch.complex64)", "{t}.detach().to_sparse()",
        "torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])", "{t}.detach().float().to_mkldnn()",
        "{t}.to(torch.float8_e4m3fn)", "object()",
        "torch.quantize_per_tensor({t}.detach().float(), 0.1, 0, torch.quint8)",
    ),
    perhaps=(
        "None", "0.5", "{t}.to(torch.int64)", "{t} > 0", "{t}.detach().to('meta')", "{t}[None]", "{t}.detach().sum()",
        "{t}.detach().flatten()", "{t}.detach()[..., :-1]", "torch.zeros(3, 0)", "torch.zeros(0)",
        "{t}.detach().requires_grad_()",
    ),
)  # fmt: skip
NUMBERS = _table(
    sure=(
        "'0.1'", "nan", "inf", "-inf", "10 ** 400", "-10 ** 400", "True", "1j", "[0.5]", "torch.tensor([1.0, 2.0])",
        "np.array([1.0, 2.0])", "np.float64('nan')", "object()", "{'a': 1}", "b'1'",
    ),
    perhaps=(
        "None", "0", "-1.0", "1e39", "1e-46", "1e308", "-1e308", "1e-320", "torch.tensor(2)", "Decimal('0.5')",
        "Fraction(1, 2)", "2 ** 40 + 1", "torch.tensor(0.5, device='meta')", "np.True_", "0.5", "3",
    ),
)  # fmt: skip
CHOICES = _table(
    sure=(
        "'nope'", "3.7", "[]", "{}", "True", "b'mean'", "nan", "('mean', 'sum')", "'Mean'", "object()",
        "torch.ones(3)", "np.ones(3)", "0",
    ),
    perhaps=(
        "None", "1.0", "torch.tensor(1)", "np.str_('mean')", "np.int64(1)",
    ),
)  # fmt: skip
FLAGS = _table(
    sure=(
        "'yes'", "[]", "2.5", "object()",
    ),
    perhaps=(
        "1", "None", "np.True_", "torch.tensor(True)",
    ),
)  # fmt: skip
SEQUENCES = _table(
    sure=(
        "0.5", "'weights'", "['1']", "[None]", "[[1.0]]", "object()", "[nan]", "[True]", "{1.0: 2.0}",
        "torch.ones(2, 2)", "[1j]",
    ),
    perhaps=(
        "[]", "{}", "[1.0] * 40", "iter([1.0])", "None", "[1e39]",
    ),
)  # fmt: skip


def kind_of_value(value: Any) -> tuple:
    if isinstance(value, T):
        return TENSORS
    if isinstance(value, bool):
        return FLAGS
    if isinstance(value, (int, float)) or isinstance(value, Spelled) and isinstance(value.value, (int, float)):
        return NUMBERS
    if isinstance(value, (list, tuple, dict, Spelled)):
        return SEQUENCES
    return CHOICES if isinstance(value, str) else ()


def spoiled(d: Drawer, call: Any) -> Any:
    """The call with one argument spoiled, at any depth; a call without such an argument as it is."""
    places = [(("args", i), value) for i, value in enumerate(call.args)]
    places += [(("options", name), value) for name, value in call.options.items() if name not in ("loss_fn", "encoded")]
    place, value = d.pick(*places)
    changed = _changed(d, value)
    if changed is None:
        return call
    new, told, sure = changed
    if place[0] == "args":
        args = list(call.args)
        args[place[1]] = new
        call = dataclasses.replace(call, args=tuple(args))
    else:
        call = dataclasses.replace(call, options=call.options | {place[1]: new})
    where = f"argument {place[1]}" if place[0] == "args" else place[1]
    sure = sure and not ("data_range" in f"{where} {told}" and "[1.0, 2.0]" in told)  # which is (low, high)
    return dataclasses.replace(call, spoiled=f"{where} {told}", sure=sure, backend=None)


def _changed(d: Drawer, value: Any) -> tuple[Any, str, bool] | None:
    """(the value spoiled, in words, whether it must be refused)."""
    if isinstance(value, Made):
        if not value.options:
            return None
        name = d.pick(*value.options)
        made = _changed(d, value.options[name])
        return made and (Made(value.name, value.options | {name: made[0]}), f"{name} {made[1]}", made[2])
    inside = list(value.items()) if isinstance(value, dict) else (
        list(enumerate(value)) if isinstance(value, (list, tuple)) else [])  # fmt: skip
    if inside and (isinstance(inside[0][1], dict) or d.chance(0.6)):
        key, item = d.pick(*inside)
        made = _changed(d, item)
        if made is None:
            return None
        new: Any = dict(value) if isinstance(value, dict) else list(value)
        new[key] = made[0]
        return tuple(new) if isinstance(value, tuple) else new, f"[{key!r}] {made[1]}", made[2]
    kinds = kind_of_value(value)
    if not kinds:
        return None
    if isinstance(value, T) and value.dtype not in FLOATS:
        kinds = tuple(pair for pair in kinds if "requires_grad_" not in pair[0])  # whole numbers cannot
    text, sure = d.pick(*kinds)
    if isinstance(value, T):
        text = text.replace("{t}", code(value))
        return Raw(text), f"tensor: {text}", sure
    return Raw(text), f"{text}", sure
