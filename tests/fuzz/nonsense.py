"""A drawn call with one argument replaced by something that does not belong there."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.fuzz.drawer import Drawer
from tests.fuzz.values import Made, Raw, Spelled, T, code

# (expression, whether no function can make sense of it)
TENSORS = (
    ("None", False), ("[0.5, 0.25]", True), ("'tensor'", True), ("np.ones((2, 3))", True), ("0.5", False),
    ("{t}.to(torch.int64)", False), ("{t} > 0", False), ("{t}.to(torch.complex64)", True), ("{t}.detach().to_sparse()", True),
    ("{t}.detach().to('meta')", False), ("{t}[None]", False), ("{t}.detach().sum()", False), ("{t}.detach().flatten()", False),
    ("{t}.detach()[..., :-1]", False), ("torch.zeros(3, 0)", False), ("torch.zeros(0)", False),
    ("torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])", True),
    ("{t}.detach().float().to_mkldnn()", True), ("{t}.to(torch.float8_e4m3fn)", True), ("object()", True),
    ("torch.quantize_per_tensor({t}.detach().float(), 0.1, 0, torch.quint8)", True), ("{t}.detach().requires_grad_()", False),
)  # fmt: skip
NUMBERS = (
    ("'0.1'", True), ("None", False), ("nan", True), ("inf", True), ("-inf", True), ("0", False), ("-1.0", False),
    ("1e39", False), ("1e-46", False), ("1e308", False), ("-1e308", False), ("1e-320", False), ("10 ** 400", True),
    ("-10 ** 400", True), ("True", True), ("1j", True), ("[0.5]", True), ("torch.tensor([1.0, 2.0])", True),
    ("np.array([1.0, 2.0])", True), ("torch.tensor(2)", False), ("Decimal('0.5')", False), ("Fraction(1, 2)", False),
    ("np.float64('nan')", True), ("2 ** 40 + 1", False), ("object()", True), ("{'a': 1}", True), ("b'1'", True),
    ("torch.tensor(0.5, device='meta')", False), ("np.True_", False), ("0.5", False), ("3", False),
)  # fmt: skip
CHOICES = (
    ("'nope'", True), ("3.7", True), ("None", False), ("[]", True), ("{}", True), ("True", True), ("b'mean'", True),
    ("1.0", False), ("nan", True), ("torch.tensor(1)", False), ("np.str_('mean')", False), ("('mean', 'sum')", True),
    ("np.int64(1)", False), ("'Mean'", True), ("object()", True), ("torch.ones(3)", True), ("np.ones(3)", True), ("0", True),
)  # fmt: skip
FLAGS = (("'yes'", True), ("1", False), ("None", False), ("np.True_", False), ("[]", True), ("torch.tensor(True)", False),
         ("2.5", True), ("object()", True))  # fmt: skip
SEQUENCES = (
    ("0.5", True), ("'weights'", True), ("[]", False), ("['1']", True), ("[None]", True), ("[[1.0]]", True), ("{}", False),
    ("object()", True), ("[nan]", True), ("[True]", True), ("[1.0] * 40", False), ("{1.0: 2.0}", True), ("iter([1.0])", False),
    ("torch.ones(2, 2)", True), ("None", False), ("[1e39]", False), ("[1j]", True),
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
    text, sure = d.pick(*kinds)
    if isinstance(value, T):
        text = text.replace("{t}", code(value))
        return Raw(text), f"tensor: {text}", sure
    return Raw(text), f"{text}", sure
