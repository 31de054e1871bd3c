"""The README: short, its example runs, and what it and the documents link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastloss

ROOT = Path(fastloss.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
if not PAGES[0].exists():
    pytest.skip("no checkout", allow_module_level=True)


def test_it_is_read_in_a_few_minutes():
    lines = PAGES[0].read_text(encoding="utf8").splitlines()
    assert len(lines) <= 120


def test_its_example_runs():
    pytest.importorskip("torchvision")
    (example,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf8"), re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    for name in ("l_contrast", "l_perceptual", "l_pixel"):
        assert names[name].isfinite() and names[name].item() > 0
    assert all(p.grad.abs().sum() > 0 for p in names["imagen"].parameters())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_its_links_lead_somewhere(page):
    """Files of the repository, and headings of pages; addresses of the web are not looked at."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf8")):
        if target.startswith(("http:", "https:")):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert heading in slugs, f"{page.name} links to {target}"
