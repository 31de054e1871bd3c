"""Memory of a cached step: of a piece's activations and of the embeddings, not of the batch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_the_resident_set_grows_by_a_piece_and_the_embeddings():
    """8,192 rows in pieces of 256. With graphs of all of them the convolutions alone keep 768 MiB, the logits 256."""
    command = [sys.executable, "-m", "benchmarks.cached_step", "--rows", "8192", "--chunk", "256"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    found = json.loads(said)
    assert found["logits_mib"] == 256
    assert 0 < found["growth_mib"] <= 128, said
