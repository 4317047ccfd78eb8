"""The systems that are compared: how each is told to train the same, and where its log is.

All have the recipe's values; what is not in RECIPE's list of flags is the same for all: float32, a
CPU, no DeepSpeed, the seed, a line of the log for every step, `WORKERS` loader workers.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from bench.peers.plain import PlainOptions
from bench.peers.setting import GLOBAL_BATCH, MAX_PIXELS, SEED, Setting
