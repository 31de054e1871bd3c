"""fastloss's drop-ins in the place of other libraries' classes and functions, and back."""

from __future__ import annotations

import dis
import importlib
import importlib.util
import inspect
import sys
from types import CodeType, FunctionType, ModuleType
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

OWN_NAME = "_without_fastloss"  # what a class is called in its module where its own methods look it up by its name


class _Place(NamedTuple):
    """Where a class or function is found by its name."""

    home: str  # the module's name, or the registry's
    names: dict[str, Any]  # of the module, or of the registry
    name: str


class _Swap(NamedTuple):
    path: str  # as in SWAPS of the library's file
    theirs: Any
    ours: Any
    places: list[_Place]
    renamed: list[tuple[FunctionType, CodeType]]  # methods of theirs, and their code as it was


class patch:
    """Puts fastloss's drop-ins in the place of libraries' losses: ``fastloss.patch("open_clip", "lpips")``.

    Every module that has been imported and holds the original gets the drop-in under the same name, the caller's own
    modules too, so that it does not matter whether the library or the names in it were imported before. So does the
    registry of a library that has one (BasicSR). Objects made before keep their class, and so do subclasses of theirs.

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
                places = [*_places(theirs), *_registered(theirs, getattr(table, "REGISTRIES", {}))]
                self._swaps.append(_Swap(path, theirs, ours, places, _keep_its_own_name(theirs)))
                for place in places:
                    place.names[place.name] = ours
        self.left |= table.LEFT

    def undo(self) -> None:
        """Puts the originals back where this call took them away, and wherever their library has ours by now."""
        for path, theirs, ours, places, renamed in reversed(self._swaps):
            library = path.split(".")[0]
            own = [place for place in _places(ours) if place.home.split(".")[0] == library]
            for place in (*places, *own):
                if place.names.get(place.name) is ours:
                    place.names[place.name] = theirs
            for method, code in renamed:
                method.__code__ = code
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


def _places(wanted: Any) -> list[_Place]:
    """Where an object is an attribute of an imported module: everywhere but in fastloss, and where we put it."""
    found = []
    for home, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and home.split(".")[0] != "fastloss":
            names = [name for name, value in list(vars(module).items()) if value is wanted]
            found += [_Place(home, vars(module), name) for name in names if not name.endswith(OWN_NAME)]
    return found


def _registered(wanted: Any, registries: dict[str, str]) -> list[_Place]:
    """Where an object is in a library's registries, each with the attribute that is its dictionary."""
    found = []
    for path, attribute in registries.items():
        names = getattr(_found(path), attribute, {})
        found += [_Place(path, names, name) for name, value in list(names.items()) if value is wanted]
    return found


def _keep_its_own_name(item: Any) -> list[tuple[FunctionType, CodeType]]:
    """Lets methods that look their class up by its name, as ``super(SSIM, self)`` does, go on finding the class itself.

    With a subclass of it under that name ``super(SSIM, self)`` would be the same class again, without end. So they get
    another name for it, which their module then has too. Returns the methods with the code that they had.
    """
    changed = []
    values = vars(item).values() if inspect.isclass(item) else ()
    for value in values:
        method = getattr(value, "__func__", value)  # of a classmethod or staticmethod
        if isinstance(method, FunctionType) and _looks_up(method.__code__, item.__name__):
            other = f"_{item.__name__}{OWN_NAME}"
            method.__globals__[other] = item
            changed.append((method, method.__code__))
            method.__code__ = _renamed(method.__code__, item.__name__, other)
    return changed


def _looks_up(code: CodeType, name: str) -> bool:
    """Whether this code, or what is defined in it, reads a global of that name."""
    own = any(i.opname == "LOAD_GLOBAL" and i.argval == name for i in dis.get_instructions(code))
    return own or any(_looks_up(inner, name) for inner in code.co_consts if isinstance(inner, CodeType))


def _renamed(code: CodeType, name: str, other: str) -> CodeType:
    inner = (_renamed(each, name, other) if isinstance(each, CodeType) else each for each in code.co_consts)
    names = (other if each == name else each for each in code.co_names)
    return code.replace(co_consts=tuple(inner), co_names=tuple(names))
