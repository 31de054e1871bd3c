"""The weighted fusion of losses: fixed weights, or weights that follow the losses, all on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_integer, check_no_graph, check_number, check_same_device, check_tensor
from ..core import result_dtype
from ..inference import takes_inference_tensors


class Rule(nn.Module):
    """How much each part counts, beyond its own weight. This one: always 1.

    `forward` gets the K detached parts as one vector and returns K multipliers without a gradient; it is called in
    training mode only. State lives in buffers of K numbers in the alphabetical order of the parts, so that a
    checkpoint does not depend on the order in which the weights were given.
    """

    base: Tensor
    multipliers: Tensor

    def __init__(self, names: list[str], base: list[float]) -> None:
        super().__init__()
        self.names = names
        weights = torch.tensor(base, dtype=torch.float32)
        self.register_buffer("base", weights, persistent=False)  # the arguments' business, not the state's

    def effective(self) -> Tensor:
        """The K weights as of the last step, those given included."""
        return self.base

    def total(self, losses: Tensor, parts: Mapping[str, Tensor], last_layer: Tensor | None) -> Tensor:
        return (self.base.to(losses.dtype) * losses).sum()


class AdaptiveRule(Rule):
    """Multipliers that change from step to step; in eval mode the last ones are used and nothing changes."""

    step: Tensor

    def __init__(self, names: list[str], base: list[float]) -> None:
        super().__init__(names, base)
        self.register_buffer("multipliers", torch.ones(len(names), dtype=torch.float32))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def effective(self) -> Tensor:
        return self.base * self.multipliers

    def total(self, losses: Tensor, parts: Mapping[str, Tensor], last_layer: Tensor | None) -> Tensor:
        multipliers = self.multipliers.clone()
        if self.training:
            detached = losses.detach().to(multipliers.dtype)
            gradients = self.gradients(parts, last_layer)
            with torch.no_grad():
                state = self.update(detached, gradients)
                # one overflow (a step that the gradient scaler skips, say) must not stay in the averages for ever
                fine = torch.isfinite(detached).all()
                for values in state.values():
                    fine = fine & torch.isfinite(values).all()
                for name, values in state.items():
                    buffer = getattr(self, name)
                    buffer.copy_(torch.where(fine, values, buffer))
                multipliers = self.multipliers.clone()  # autograd keeps it; the buffer changes in the next step
        return ((self.base * multipliers).to(losses.dtype) * losses).sum()

    def gradients(self, parts: Mapping[str, Tensor], last_layer: Tensor | None) -> Tensor | None:
        return None

    def update(self, losses: Tensor, gradients: Tensor | None) -> dict[str, Tensor]:
        """The new state by buffer name, the multipliers among it."""
        return {}


class UncertaintyRule(Rule):
    """Homoscedastic uncertainty: exp(-s) / 2 with a learnable log-variance s per part, and s / 2 on top."""

    def __init__(self, names: list[str], base: list[float], *, log_variance: float = 0.0) -> None:
        super().__init__(names, base)
        start = check_number("log_variance", log_variance)
        self.log_variances = nn.Parameter(torch.full((len(names),), start, dtype=torch.float32))

    def effective(self) -> Tensor:
        return self.base * (0.5 * torch.exp(-self.log_variances.detach()))

    def total(self, losses: Tensor, parts: Mapping[str, Tensor], last_layer: Tensor | None) -> Tensor:
        s = self.log_variances.to(losses.dtype)
        return (0.5 * torch.exp(-s) * self.base.to(losses.dtype) * losses + 0.5 * s).sum()


class DynamicAverageRule(AdaptiveRule):
    """Dynamic weight average: K softmax(r / T), r the ratio of the last two losses (of their means over `period`)."""

    sums: Tensor
    previous: Tensor
    before: Tensor

    def __init__(self, names: list[str], base: list[float], *, temperature: float = 2.0, period: int = 1) -> None:
        super().__init__(names, base)
        self.temperature = check_number("temperature", temperature, 0, open_low=True)
        self.period = int(check_number("period", period, 1))
        if period != self.period:
            raise ValueError(f"period: expected a whole number of steps, got {period!r}")
        for name in ("sums", "previous", "before"):
            self.register_buffer(name, torch.zeros(len(names), dtype=torch.float32))

    def update(self, losses: Tensor, gradients: Tensor | None) -> dict[str, Tensor]:
        ratio = _ratio(self.previous, self.before)
        multipliers = len(self.names) * torch.softmax(ratio / self.temperature, 0)
        sums, step = self.sums + losses, self.step + 1
        ends = step % self.period == 0
        return {
            "multipliers": torch.where(self.step >= 2 * self.period, multipliers, 1.0),
            "step": step,
            "before": torch.where(ends, self.previous, self.before),
            "previous": torch.where(ends, sums / self.period, self.previous),
            "sums": torch.where(ends, 0.0, sums),
        }


class RelativeBalanceRule(AdaptiveRule):
    """ReLoBRaLo: a running average of softmax(L / (tau L')), L' the last losses, or by chance the first ones."""

    first: Tensor
    previous: Tensor

    def __init__(
        self,
        names: list[str],
        base: list[float],
        *,
        alpha: float = 0.95,
        beta: float = 0.99,
        tau: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(names, base)
        self.alpha, self.beta = check_number("alpha", alpha, 0, 1), check_number("beta", beta, 0, 1)
        self.tau, self.seed = check_number("tau", tau, 0, open_low=True), check_integer("seed", seed, 0)
        for name in ("first", "previous"):
            self.register_buffer(name, torch.zeros(len(names), dtype=torch.float32))

    def update(self, losses: Tensor, gradients: Tensor | None) -> dict[str, Tensor]:
        start = self.step == 0
        since_first, since_last = (
            len(self.names) * torch.softmax(_ratio(losses, past) / self.tau, 0) for past in (self.first, self.previous)
        )
        kept = torch.where(_uniform(self.step, self.seed) < self.beta, self.multipliers, since_first)
        multipliers = self.alpha * kept + (1 - self.alpha) * since_last
        return {
            "multipliers": torch.where(start, 1.0, multipliers),
            "step": self.step + 1,
            "first": torch.where(start, losses, self.first),
            "previous": losses,
        }


class GradientRatioRule(AdaptiveRule):
    """VQGAN: |dL_reference / d last_layer| / (|dL_i / d last_layer| + eps), at most `max_ratio`."""

    def __init__(
        self, names: list[str], base: list[float], *, reference: str, eps: float = 1e-4, max_ratio: float = 1e4
    ) -> None:
        super().__init__(names, base)
        if reference not in names:
            raise ValueError(f"reference: expected a part with a weight > 0, one of {names}, got {reference!r}")
        self.reference, self.eps = reference, check_number("eps", eps, 0, open_low=True)
        self.max_ratio = check_number("max_ratio", max_ratio, 0, open_low=True)

    def gradients(self, parts: Mapping[str, Tensor], last_layer: Tensor | None) -> Tensor:
        """The K norms of the parts' gradients at the last layer."""
        if not isinstance(last_layer, Tensor):
            raise TypeError(
                f"last_layer: weighting 'vqgan' in training mode expects the last layer's weight tensor, "
                f"got {type(last_layer).__name__}"
            )
        norms = []
        for name in self.names:
            grad = None
            if parts[name].requires_grad and last_layer.requires_grad:
                (grad,) = torch.autograd.grad(parts[name], last_layer, retain_graph=True, allow_unused=True)
            if grad is None:
                raise ValueError(
                    f"last_layer: part {name!r} has no gradient with respect to it; pass a tensor that every part "
                    "depends on (under no_grad: .eval() keeps the last ratios)"
                )
            norms.append(torch.linalg.vector_norm(grad.detach().to(self.multipliers.dtype)))
        return torch.stack(norms)

    def update(self, losses: Tensor, gradients: Tensor | None) -> dict[str, Tensor]:
        assert gradients is not None
        at = self.names.index(self.reference)
        ratios = (gradients[at] / (gradients + self.eps)).clamp(0, self.max_ratio)
        one = torch.ones_like(ratios[:1])
        return {"multipliers": torch.cat((ratios[:at], one, ratios[at + 1 :])), "step": self.step + 1}


def _ratio(now: Tensor, past: Tensor) -> Tensor:
    """now / past, and 1 where the past is 0."""
    zero = past == 0
    return torch.where(zero, 1.0, now / torch.where(zero, 1.0, past))


def _uniform(step: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) from the step: an integer hash, so that the state dict holds all there is to resume, ranks
    agree, and the random numbers of the training run stay as they are. Products stay below 2**63."""
    mask = 2**31 - 1
    x = (step * 0x1E3779B1 + seed * 0x5BD1E995 + 0x3C6EF372) & mask
    for multiplier in (0x7FEB352D, 0x5B9F3B15, 0x31848BAB):
        x = ((x ^ (x >> 15)) * multiplier) & mask
    return (x ^ (x >> 16)).to(torch.float32) / 2**31


WEIGHTINGS: dict[str, type[Rule]] = {
    "fixed": Rule,
    "uncertainty": UncertaintyRule,
    "dwa": DynamicAverageRule,
    "relobralo": RelativeBalanceRule,
    "vqgan": GradientRatioRule,
}


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

    Args:
        weights: number >= 0 by name. Weight 0 turns a part off: it does not enter the total and need not be passed.
        weighting: see above.
        **options: of the weighting, see above.

    Call:
        ``loss(parts)`` or ``loss(contrastive=..., pixel=...)`` with a scalar tensor by name, and `last_layer` for
        "vqgan". Returns the total, a float32 scalar (float64 if a part is), and the dictionary of the parts as passed,
        detached and unweighted. Nothing waits for the device. ``current_weights`` has :math:`w_i m_i` by name.

    State: buffers and parameters only, so that a state dict resumes exactly; the weights given are not part of it.

    Raises:
        TypeError: a part is no floating-point tensor, or an option is unknown. ValueError: a part is unknown, missing
            or no scalar, or weights, options or devices do not fit.

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
                raise TypeError(f"CompositeLoss: unknown option {name!r}; the options of {weighting!r} are {allowed}")
        if weighting == "vqgan" and "reference" not in options:
            raise ValueError(f"reference: weighting 'vqgan' expects the name of a part, one of {active}, got none")
        self.rule = kind(active, [self.weights[name] for name in active], **options)

    @takes_inference_tensors
    def forward(
        self, parts: Mapping[str, Tensor] | None = None, /, *, last_layer: Tensor | None = None, **named: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        parts = self._check({} if parts is None else parts, named)
        active = [parts[name] for name in self.weights if self.weights[name] > 0]
        dtype = result_dtype(*active)
        detached = {name: parts[name].detach() for name in self.weights if name in parts}
        if self.weighting == "fixed":  # in the order given, so that it is the sum that one would write, to the bit
            total = active[0].new_zeros((), dtype=dtype)
            for name, weight in self.weights.items():
                if weight > 0:
                    total = total + weight * parts[name].to(dtype)
            return total, detached
        losses = torch.stack([parts[name].to(dtype) for name in self.rule.names])
        if self.rule.base.device != losses.device or self.rule.base.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"CompositeLoss: its state is {self.rule.base.dtype} on {self.rule.base.device}, the parts are on "
                f"{losses.device}; move the module there with .to(device), and keep it in float32"
            )
        return self.rule.total(losses, parts, last_layer), detached

    def _check(self, parts: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        first = next(iter(merged))
        for name, part in merged.items():
            check_tensor(f"parts[{name!r}]", part)
            if part.ndim != 0:
                raise ValueError(f"parts[{name!r}]: expected a scalar (0-D) loss, got shape {tuple(part.shape)}")
            check_same_device(f"parts[{first!r}]", merged[first], f"parts[{name!r}]", part)
        return merged

    @property
    def current_weights(self) -> dict[str, Tensor]:
        """The weight of each part in the total, as 0-d tensors: those of the last step, those given included."""
        effective = dict(zip(self.rule.names, self.rule.effective().unbind(), strict=True))
        return {name: effective.get(name, self.rule.base.new_zeros(())) for name in self.weights}

    def extra_repr(self) -> str:
        return f"{self.weights}, weighting={self.weighting!r}"
