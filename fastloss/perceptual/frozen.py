"""A loss that has frozen networks: they move, cast, copy and pickle with it, and no model that holds it has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

NAMES = ("backbones", "lins")


class FrozenNetworks(nn.Module):
    """`backbones` and `lins` are lists of modules which this one has as plain attributes, not as submodules."""

    backbones: nn.ModuleList
    lins: nn.ModuleList
    save_networks = False  # of what was pickled before there was the option

    def __init__(self, save_networks: bool) -> None:
        super().__init__()
        if not isinstance(save_networks, bool):
            raise TypeError(f"save_networks: expected True or False, got {type(save_networks).__name__}")
        self.save_networks = save_networks

    def freeze(self, backbones: Sequence[nn.Module], lins: Sequence[nn.Module]) -> None:
        """Takes the networks as they are, in eval mode and without gradients."""
        for name, modules in zip(NAMES, (backbones, lins), strict=True):
            self.__dict__[name] = nn.ModuleList(modules).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Any:
        """The mode of this module; the networks stay in eval mode, those too that another module holds and trains."""
        super().train(mode)
        self.backbones.eval()
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for name in NAMES:  # submodules of what was pickled by a version up to 0.1
            if name in self._modules:
                self.__dict__[name] = self._modules.pop(name)

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in NAMES:
            getattr(self, name)._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.save_networks:
            for name in NAMES:
                getattr(self, name).state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        starts = tuple(f"{prefix}{name}." for name in NAMES)
        rest = {key: value for key, value in state_dict.items() if not key.startswith(starts)}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not self.save_networks:
            return
        for name, start in zip(NAMES, starts, strict=True):
            own = {key[len(start) :]: value for key, value in state_dict.items() if key.startswith(start)}
            assign = local_metadata.get("assign_to_params_buffers", False)
            try:
                found = getattr(self, name).load_state_dict(own, strict=False, assign=assign)
            except RuntimeError as error:  # sizes differ
                error_msgs.append(f"{start}*: {error}")
                continue
            missing_keys += [start + key for key in found.missing_keys]
            if strict:
                unexpected_keys += [start + key for key in found.unexpected_keys]
