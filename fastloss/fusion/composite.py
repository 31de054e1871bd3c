"""The weighted fusion of losses: fixed weights, or weights that follow the losses, all on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import result_dtype
from ..core.checks import check_choice, check_no_graph, check_number, check_same_device, check_tensor
from ..core.entry import public_function, unknown_option
from ..core.traced import filled
from .rules import WEIGHTINGS, Rule

Part = Tensor | float


class CompositeLoss(nn.Module):
    r"""Weighted sum of named losses, :math:`L = \sum_i w_i m_i L_i`, with the parts for the log.

    The weights :math:`w_i` are the ones given; the multipliers :math:`m_i` come from the weighting, over the K parts
    whose weight is not 0 (no gradient flows through them, except to the log-variances)::

        "fixed"        1
        "uncertainty"  exp(-s_i) / 2, and s_i / 2 is added to the total: sum_i w_i L_i / (2 e^s_i) + s_i / 2.
                       s is the parameter `rule.log_variances`: give it to the optimizer. Option log_variance=0.0.
        "dwa"          K softmax_i(L_i[t-1] / L_i[t-2] / T), 1 in the first two steps. Options temperature=2.0 (T) and
                       period=1: over how many steps a loss is averaged; the paper's t counts epochs.
        "relobralo"    alpha (rho m_i[t-1] + (1 - rho) b_i(0)) + (1 - alpha) b_i(t-1), 1 in the first step, with
                       b_i(t') = K softmax_i(L_i[t] / (tau L_i[t'])) and rho = 1 with probability beta, else 0.
                       Options alpha=0.95, beta=0.99, tau=1.0, seed=0: rho is drawn from the seed and the step count.
        "vqgan"        |dL_ref / dW| / (|dL_i / dW| + eps), from 0 to max_ratio, and 1 for the reference part: every
                       part's gradient at the last layer W gets the norm of the reference's. Options reference
                       (required), eps=1e-4, max_ratio=1e4; pass `last_layer=W` at call. One more backward pass from
                       each part to W.

    "dwa" and "relobralo" compare a loss with its past: they expect losses of one sign (a zero past counts as ratio 1).
    A step with a loss that is not finite leaves the multipliers as they were. In eval mode nothing changes, so
    validation does not disturb training. On several ranks each follows its own losses.

    A part may be constant for a while, a discriminator that has not begun, say: a number, or a tensor without a
    gradient beside others that have one. It enters the total like any other, but the weighting passes it by: its
    multiplier stays what it was (1 at first), its log-variance gets no gradient, and the K of the others' balance are
    the parts that are not constant. When it begins, "dwa" and "relobralo" compare it from there on.

    Args:
        weights: number >= 0 by name. Weight 0 turns a part off: it does not enter the total and need not be passed.
        weighting: see above.
        **options: of the weighting, see above.

    Call:
        ``loss(parts)`` or ``loss(contrastive=..., pixel=...)`` with a scalar tensor or a number by name, and
        `last_layer` for "vqgan". Returns the total, a float32 scalar (float64 if a part is), and the dictionary of the
        parts as passed, detached and unweighted, numbers as tensors. Nothing waits for the device.
        ``current_weights`` has :math:`w_i m_i` by name.

    State: buffers and parameters only, so that a state dict resumes exactly; the weights given are not part of it.

    Raises:
        TypeError: a part is neither a floating-point tensor nor a number, or an option is unknown. ValueError: a part
            is unknown, missing, no scalar or no finite number, or weights, options or devices do not fit.

    Source: Kendall et al., "Multi-task learning using uncertainty to weigh losses", CVPR 2018; Liu et al., "End-to-end
    multi-task learning with attention", CVPR 2019 (DWA); Bischof and Kraus, "Multi-objective loss balancing for
    physics-informed deep learning", 2021 (ReLoBRaLo); Esser et al., "Taming transformers", CVPR 2021 (VQGAN).

    Example:
        >>> fuse = CompositeLoss({"contrastive": 1.0, "pixel": 0.5})
        >>> total, parts = fuse({"contrastive": torch.tensor(1.0), "pixel": torch.tensor(1.0)})
        >>> total.item()
        1.5
    """

    rule: Rule

    def __init__(self, weights: Mapping[str, float], *, weighting: str = "fixed", **options: Any) -> None:
        super().__init__()
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights: expected a dictionary of numbers by part, got {type(weights).__name__}")
        for name, weight in weights.items():
            if not isinstance(name, str) or name in ("", "last_layer"):
                raise ValueError(f"weights: expected names of parts other than '' and 'last_layer', got {name!r}")
            check_no_graph("CompositeLoss", f"weights[{name!r}]", weight)
        self.weights = {name: check_number(f"weights[{name!r}]", weight, 0) for name, weight in weights.items()}
        active = sorted(name for name, weight in self.weights.items() if weight > 0)
        if not active:
            raise ValueError(f"weights: expected at least one weight > 0, got {dict(weights)}")
        check_choice("weighting", weighting, WEIGHTINGS)
        self.weighting = weighting
        kind = WEIGHTINGS[weighting]
        allowed = list(getattr(kind.__init__, "__kwdefaults__", None) or {})
        allowed += ["reference"] if weighting == "vqgan" else []
        for name in options:
            if name not in allowed:
                raise unknown_option("CompositeLoss", name, allowed, of=f" of {weighting!r}")
        if weighting == "vqgan" and "reference" not in options:
            raise ValueError(f"reference: weighting 'vqgan' expects the name of a part, one of {active}, got none")
        self.rule = kind(active, [self.weights[name] for name in active], **options)

    @public_function
    def forward(
        self, parts: Mapping[str, Part] | None = None, /, *, last_layer: Tensor | None = None, **named: Part
    ) -> tuple[Tensor, dict[str, Tensor]]:
        given = self._check({} if parts is None else parts, named)
        tensors = {name: part for name, part in given.items() if isinstance(part, Tensor)}
        dtype = result_dtype(*(part for name, part in tensors.items() if self.weights[name] > 0))
        device = next(iter(tensors.values()), self.rule.base).device
        found = {
            name: part if isinstance(part, Tensor) else filled((), part, dtype, device) for name, part in given.items()
        }
        detached = {name: found[name].detach() for name in self.weights if name in found}
        if self.weighting == "fixed":  # in the order given, so that it is the sum that one would write, to the bit
            total = torch.zeros((), dtype=dtype, device=device)
            for name, weight in self.weights.items():
                if weight > 0:
                    total = total + weight * found[name].to(dtype)
            return total, detached
        if self.rule.base.device != device or self.rule.base.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"CompositeLoss: its state is {self.rule.base.dtype} on {self.rule.base.device}, the parts are on "
                f"{device}; move the module there with .to(device), and keep it in float32"
            )
        losses = torch.stack([found[name].to(dtype) for name in self.rule.names])
        learning = any(found[name].requires_grad for name in self.rule.names)
        constant = [name not in tensors or (learning and not found[name].requires_grad) for name in self.rule.names]
        return self.rule.total(losses, constant, found, last_layer), detached

    def _check(self, parts: Mapping[str, Part], named: Mapping[str, Part]) -> dict[str, Part]:
        if not isinstance(parts, Mapping):
            raise TypeError(f"parts: expected a dictionary of scalar tensors, got {type(parts).__name__}")
        twice = sorted(set(parts) & set(named))
        if twice:
            raise ValueError(f"parts: {twice} came both in the dictionary and as keywords")
        merged = {**parts, **named}
        unknown = [name for name in merged if name not in self.weights]
        missing = [name for name, weight in self.weights.items() if weight > 0 and name not in merged]
        if unknown or missing:
            raise ValueError(
                f"parts: expected {list(self.weights)}, got {list(merged)}; unknown: {unknown}, missing: {missing}"
            )
        first: tuple[str, Tensor] | None = None
        for name, part in merged.items():
            if not isinstance(part, Tensor):
                merged[name] = check_number(f"parts[{name!r}]", part)
                continue
            check_tensor(f"parts[{name!r}]", part)
            if part.ndim != 0:
                raise ValueError(f"parts[{name!r}]: expected a scalar (0-D) loss, got shape {tuple(part.shape)}")
            first = first or (name, part)
            check_same_device(f"parts[{first[0]!r}]", first[1], f"parts[{name!r}]", part)
        return merged

    @property
    def current_weights(self) -> dict[str, Tensor]:
        """The weight of each part in the total, as 0-d tensors: those of the last step, those given included."""
        effective = dict(zip(self.rule.names, self.rule.effective().unbind(), strict=True))
        return {name: effective.get(name, self.rule.base.new_zeros(())) for name in self.weights}

    def extra_repr(self) -> str:
        return f"{self.weights}, weighting={self.weighting!r}"
