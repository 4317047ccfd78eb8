"""A data worker stays light: it starts for every rank, many times over."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = {
    "transformers",
    "torchvision",
    "cv2",
    "pyarrow",
    "datasets",
    "deepspeed",
    "vllm",
    "pandas",
    "matplotlib",
    "sklearn",
}
SCRIPT = """
import sys
import vlm.data.loader, vlm.data.index, vlm.data.processor, vlm.data.ledger
from tests.data.samples import processor, sample, user, assistant
p = processor()
message = user("<image>what?"), assistant("a square")
p.encode(sample(*message, images=["images/rgba.png"]))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_reading_samples_imports_nothing_heavy():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "torch" in loaded and "PIL" in loaded
    assert not loaded & HEAVY
