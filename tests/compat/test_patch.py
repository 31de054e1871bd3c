"""fastloss.patch: what it swaps, where, and back."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest

import fastloss
from fastloss.compat import LIBRARIES, patching
from tests import ROOT

open_clip = pytest.importorskip("open_clip")
from fastloss.compat import open_clip as ours  # noqa: E402

theirs = ours._theirs.ClipLoss


def test_swaps_what_was_imported_before(monkeypatch):
    user = types.ModuleType("user_training")
    user.Loss = user.also = theirs
    monkeypatch.setitem(sys.modules, "user_training", user)
    with fastloss.patch("open_clip") as swapped:
        assert open_clip.ClipLoss is open_clip.loss.ClipLoss is open_clip.factory.ClipLoss is ours.ClipLoss
        assert user.Loss is user.also is ours.ClipLoss
        places = ["open_clip", "open_clip.factory", "open_clip.loss", "user_training", "user_training"]
        assert [p for p in swapped.swapped["open_clip.loss.ClipLoss"] if not p.startswith("tests.")] == places
        assert "open_clip.loss.ClipLoss in open_clip, open_clip.factory" in repr(swapped)
    assert open_clip.ClipLoss is open_clip.loss.ClipLoss is open_clip.factory.ClipLoss is user.Loss is theirs
    assert ours._theirs.ClipLoss is theirs and issubclass(ours.ClipLoss, theirs) and swapped.swapped == {}


def test_as_a_function_until_undo():
    first = fastloss.patch("open_clip")
    try:
        second = fastloss.patch("open_clip")
        assert second.swapped == {} and second.left["open_clip.loss.ClipLoss"] == "swapped already"
        second.undo()
        assert open_clip.ClipLoss is ours.ClipLoss
        late = types.ModuleType("open_clip.late")
        late.ClipLoss = open_clip.ClipLoss
        sys.modules["open_clip.late"] = late
    finally:
        first.undo()
        del sys.modules["open_clip.late"]
    assert open_clip.ClipLoss is late.ClipLoss is theirs


def test_an_object_made_inside_lasts():
    with fastloss.patch("open_clip"):
        loss = open_clip.loss.ClipLoss()
    assert type(loss) is ours.ClipLoss and isinstance(loss, open_clip.ClipLoss)


def test_what_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match="libraries: expected names out of .*, got 'closed_clip'"):
        fastloss.patch("closed_clip")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModuleNotFoundError, match="open_clip is not installed"):
        fastloss.patch("open_clip")
    assert "open_clip: not installed" in repr(fastloss.patch())


def test_a_name_of_another_version_is_left(monkeypatch):
    monkeypatch.setitem(ours.SWAPS, "open_clip.loss.NoSuchLoss", ours.ClipLoss)
    monkeypatch.setitem(ours.LEFT, "open_clip.loss.Other", "no loss of fastloss's")
    with fastloss.patch("open_clip") as swapped:
        assert swapped.left == {
            "open_clip.loss.NoSuchLoss": "not in the installed version",
            "open_clip.loss.Other": "no loss of fastloss's",
        }
        assert "left:\n  open_clip.loss.NoSuchLoss: not in the installed version" in repr(swapped)


def test_a_failure_puts_everything_back(monkeypatch):
    def fail(library):
        raise ImportError("broken")

    before = patching._check_installed
    monkeypatch.setattr(patching, "LIBRARIES", ("open_clip", "other"))
    monkeypatch.setattr(patching, "_check_installed", lambda name: before(name) if name == "open_clip" else fail(name))
    with pytest.raises(ImportError, match="broken"):
        fastloss.patch("open_clip", "other")
    assert open_clip.ClipLoss is theirs


def test_a_class_that_calls_super_by_its_name(monkeypatch):
    """Its `super(Old, self)` goes on finding Old, in a subclass that the user made before too."""
    home, package, table = (types.ModuleType(name) for name in ("elder.loss", "elder", "fastloss.compat.elder"))
    exec(
        "class Old:\n    def __init__(self):\n        super(Old, self).__init__()\n        self.made = 1\n", vars(home)
    )
    home.Old.__module__, package.Old = "elder.loss", home.Old
    own = type("Own", (home.Old,), {})
    package.BOOK = types.SimpleNamespace(classes={"old": home.Old, "own": own})
    table.SWAPS, table.LEFT = {"elder.Old": type("Old", (home.Old,), {})}, {}
    table.REGISTRIES = {"elder.BOOK": "classes"}
    for module in (home, package, table):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(patching, "LIBRARIES", ("elder",))
    monkeypatch.setattr(patching, "_check_installed", lambda name: None)
    for _ in range(2):
        with fastloss.patch("elder"):
            assert package.Old is home.Old is package.BOOK.classes["old"] is table.SWAPS["elder.Old"]
            assert package.Old().made == own().made == 1 and package.BOOK.classes["own"] is own
    assert own.__mro__[1] is package.Old is home.Old is package.BOOK.classes["old"] and own().made == 1
    assert home.Old.__init__.__code__.co_names[1] == "Old"


def test_every_library_has_its_table():
    """And prints with what can be swapped of it here."""
    found = repr(fastloss.patch())
    for name in LIBRARIES:
        assert f"  {name}: " in found
    assert "  pytorch_msssim: ssim, ms_ssim, SSIM, MS_SSIM\n" in found


def test_the_migration_table_has_every_name():
    text = (ROOT / "docs" / "migration.md").read_text()
    for library in LIBRARIES:
        try:
            table = importlib.import_module(f"fastloss.compat.{library}")
        except ModuleNotFoundError:  # it needs the library
            continue
        for path in table.SWAPS:
            assert f"`{path.rpartition('.')[2]}`" in text, f"docs/migration.md has no {path}"
        for path in table.LEFT:
            assert f"`{path}`" in text, f"docs/migration.md does not say that {path} is left"


@pytest.mark.parametrize("library", [name for name in LIBRARIES if importlib.util.find_spec(name) is not None])
def test_the_tables_name_what_the_libraries_have(library):
    table = importlib.import_module(f"fastloss.compat.{library}")
    before = {path: patching._found(path) for path in (*table.SWAPS, *table.LEFT)}
    assert None not in before.values(), before
    with fastloss.patch(library) as swapped:
        assert swapped.left == table.LEFT and set(swapped.swapped) == set(table.SWAPS)
        assert all(patching._found(path) is ours for path, ours in table.SWAPS.items())
    assert {path: patching._found(path) for path in before} == before
