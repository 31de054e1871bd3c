"""What `import fastloss` loads besides torch: its own modules, and none of those that take seconds."""

from __future__ import annotations

import json
import subprocess
import sys

SLOW = ("torch._dynamo", "torch._inductor", "triton", "torchvision", "sympy", "numpy.testing", "matplotlib")
SCRIPT = """
import json, sys
import torch
before = set(sys.modules)
import fastloss
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_import_loads_nothing_slow():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "fastloss" in loaded
    slow = [name for name in loaded if name.startswith(SLOW)]
    assert not slow, f"import fastloss loads {slow}"
    others = {name.split(".")[0] for name in loaded} - {"fastloss"} - set(sys.stdlib_module_names)
    assert not others, f"import fastloss loads modules of {sorted(others)}"
