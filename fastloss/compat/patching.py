"""fastloss's drop-ins in the place of other libraries' classes and functions, and back."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any, NamedTuple

LIBRARIES = (
    "basicsr",
    "fused_ssim",
    "info_nce",
    "kornia",
    "lightly",
    "lpips",
    "open_clip",
    "piq",
    "pytorch_metric_learning",
    "pytorch_msssim",
    "sentence_transformers",
    "siglip_kernel",
    "taming",
    "torchmetrics",
)


class _Place(NamedTuple):
    """Where a class or function is found by its name."""

    home: str  # the module's name
    module: ModuleType
    name: str


class _Swap(NamedTuple):
    path: str  # as in SWAPS of the library's file
    theirs: Any
    ours: Any
    places: list[_Place]


class patch:
    """Puts fastloss's drop-ins in the place of libraries' losses: ``fastloss.patch("open_clip", "lpips")``.

    Every module that has been imported and holds the original gets the drop-in under the same name, the caller's own
    modules too, so that it does not matter whether the library or the names in it were imported before. Objects made
    before keep their class, and so do registries that hold classes in a dictionary.

    As a function it lasts until :meth:`undo`; in a ``with`` statement, until the block ends. It prints as what it
    swapped, where, and what it left as it was, and why. ``fastloss.patch()`` swaps nothing, and prints as what can be
    swapped in the libraries installed here (which it imports).

    Args:
        *libraries: names out of ``fastloss.compat.LIBRARIES``.

    Attributes:
        swapped: the names of what was swapped, each with the modules that held it.
        left: the names of what was not, each with the reason.

    Raises:
        ValueError: no such library. ModuleNotFoundError: it is not installed.

    Example:
        >>> with fastloss.patch("open_clip"):  # doctest: +SKIP
        ...     loss = open_clip.ClipLoss()  # fastloss.compat.open_clip.ClipLoss
    """

    def __init__(self, *libraries: str) -> None:
        for name in libraries:
            if name not in LIBRARIES:
                raise ValueError(f"libraries: expected names out of {LIBRARIES}, got {name!r}")
        self.libraries = libraries
        self.left: dict[str, str] = {}
        self._swaps: list[_Swap] = []
        self._could: dict[str, str] = {} if libraries else {name: _what_is_there(name) for name in LIBRARIES}
        try:
            for name in libraries:
                self._swap(name)
        except BaseException:
            self.undo()
            raise

    @property
    def swapped(self) -> dict[str, list[str]]:
        return {swap.path: sorted(place.home for place in swap.places) for swap in self._swaps}

    def _swap(self, library: str) -> None:
        _check_installed(library)
        table = importlib.import_module(f"{__package__}.{library}")
        for path, ours in table.SWAPS.items():
            theirs = _found(path)
            if theirs is None:
                self.left[path] = "not in the installed version"
            elif theirs is ours:
                self.left[path] = "swapped already"
            else:
                places = _places(theirs, but=theirs.__module__ if _names_itself(theirs) else None)
                for place in places:
                    setattr(place.module, place.name, ours)
                self._swaps.append(_Swap(path, theirs, ours, places))
        self.left |= table.LEFT

    def undo(self) -> None:
        """Puts the originals back where this call took them away, and wherever their library has ours by now."""
        for path, theirs, ours, places in reversed(self._swaps):
            library = path.split(".")[0]
            own = [place for place in _places(ours) if place.home.split(".")[0] == library]
            for _, module, name in (*places, *own):
                if vars(module).get(name) is ours:
                    setattr(module, name, theirs)
        self._swaps = []

    def __enter__(self) -> patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        lines = [f"fastloss.patch({', '.join(map(repr, self.libraries))})"]
        if self._could:
            lines += ["can swap:", *(f"  {name}: {what}" for name, what in self._could.items())]
        if self.swapped:
            lines += ["swapped:", *(f"  {path} in {', '.join(places)}" for path, places in self.swapped.items())]
        if self.left:
            lines += ["left:", *(f"  {path}: {why}" for path, why in self.left.items())]
        return "\n".join(lines)


def _check_installed(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(f"fastloss.patch: {library} is not installed", name=library)


def _what_is_there(library: str) -> str:
    """What could be swapped of a library, in one line."""
    try:
        _check_installed(library)
        table = importlib.import_module(f"{__package__}.{library}")
    except ModuleNotFoundError as error:
        return "not installed" if error.name == library else f"cannot be imported: {error}"
    try:
        return ", ".join(path.removeprefix(f"{library}.") for path in table.SWAPS if _found(path) is not None)
    except Exception as error:  # of the library itself: some look for a GPU as they are imported
        return f"cannot be imported: {error}"


def _found(path: str) -> Any:
    """The class or function of a dotted name, or None."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None


def _places(wanted: Any, but: str | None = None) -> list[_Place]:
    """Where an object is an attribute of an imported module: everywhere but in fastloss and the module called `but`."""
    found = []
    for home, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and home != but and home.split(".")[0] != "fastloss":
            found += [_Place(home, module, name) for name, value in list(vars(module).items()) if value is wanted]
    return found


def _names_itself(item: Any) -> bool:
    """Whether methods of a class look it up by its name, as ``super(SSIM, self)`` does.

    In the module that defines it that name must go on meaning the class itself: with a subclass of it there,
    ``super(SSIM, self)`` would be the same class again, without end.
    """
    methods = [value for value in vars(item).values() if inspect.isfunction(value)] if inspect.isclass(item) else []
    return any(item.__name__ in method.__code__.co_names for method in methods)
