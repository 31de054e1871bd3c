"""How many kernels a first step compiles, and that a smaller last batch or images of another size compile none.

The counts are Triton's own, over a stub driver; nothing is compiled (tests/triton/compilations.py), but in the test of
warmup(). Processes of their own, as TRITON_INTERPRET decides at import.
"""

from __future__ import annotations

import json

import pytest

from tests.triton import stub_driver
from tests.triton.test_aot import needs_triton, python
from tests.triton.test_plans import needs_compiler

# At most so many: the first step's, and those of later ones that are not 0. Rows of odd images are no whole vectors;
# tiny images have tiles of their own; of lpips, layers that are no whole tiles, or of odd planes, have other kernels;
# of attention maps, rows of each power of two of keys; of queries and keys, those that are no whole tiles.
MOST = {
    "pixel_loss": (3, {"odd, 255x321": 2}),
    "pixel_loss, weight": (2, {"odd, 255x321": 2}),
    "smoothness_loss": (3, {"28x28": 2, "odd, 255x321": 2}),
    "smoothness_loss, guide and weight": (3, {"28x28": 2, "odd, 255x321": 2}),
    "ssim_loss": (2, {"odd, 255x321": 2}),
    "image_loss": (4, {"28x28": 1, "odd, 255x321": 2}),
    "image_loss, ssim": (4, {}),
    "feature_distance": (2, {}),
    "lpips_distance": (2, {"224x224": 2, "100x100": 2, "odd, 65x33": 2}),
    "dists_distance": (2, {"224x224": 2}),
    "attention_consistency_loss": (3, {"256": 2, "odd, 197": 2, "odd, 51": 2}),
    "attention_consistency_from_qk": (4, {"odd, 197": 3}),
    "attention_consistency_from_qk, causal": (4, {}),
    "clip_loss": (7, {}),
    "clip_loss, small": (7, {}),
    "clip_loss, learned scale, cosine": (9, {}),
    "info_nce": (7, {}),
    "info_nce, bank": (3, {}),
    "info_nce, own negatives": (6, {}),
    "siglip_loss": (2, {}),
    "supcon_loss": (5, {}),
    "nt_xent_loss": (5, {}),
}


def report(folder, *options: str) -> dict:
    environment = stub_driver.build(folder)
    output = python("-W", "ignore", "-m", "tests.triton.compilations", *options, **environment,
                    TRITON_CACHE_DIR=str(folder / "cache"))  # fmt: skip
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
@needs_triton
@needs_compiler
def test_shapes_that_change_compile_nothing_anew(tmp_path):
    found = report(tmp_path)
    print(found.pop("triton"))
    assert set(found) == set(MOST)
    for name, steps in found.items():
        first, others = MOST[name]
        counts = {change: sum(kernels.values()) for change, kernels in steps.items()}
        assert 0 < counts.pop("first") <= first, (name, steps)
        assert {change: n for change, n in counts.items() if n > others.get(change, 0)} == {}, (name, steps)


@pytest.mark.slow
@needs_triton
@needs_compiler
def test_warmup_compiles_what_a_first_step_needs(tmp_path):
    """Really compiled: the three kernels of pixel_loss, which a step after it does not compile again."""
    found = report(tmp_path, "--warmup")
    assert found["reported"] == found["loaded"] == 3 and found["step after"] == found["again"] == 0
