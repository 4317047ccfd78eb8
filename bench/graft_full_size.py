"""The surgery at full size: peak memory and speed beside `cp`, and the same bytes twice.

    python -m bench.graft_full_size                 # Qwen2.5-VL-7B + Qwen3-8B: 40 GB of disk
    python -m bench.graft_full_size --llm 0.6b

Makes donors in the hub's layout (flat configs, weights of the real shapes in five or fewer files
with an index, the test model's tokenizer moved to the real ids), builds from them in a process of
its own, in turn with `cp` of the files that the build reads, and removes all it made. Weights are
normal numbers from a pool of 32 Mi; files that give no tensor, the old language model's, are
holes. Donors leave the page cache before each run; both sides end with their bytes on the disk.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import vlm.shards
from vlm.checkpoint import TensorReader, write_json
from vlm.graft.report import REPORT
from vlm.hf_config import parse_config, parse_text_config, read_json
from vlm.model import LanguageModel, VisionLanguageModel
from vlm.shards import Entry, Shard, plan_shards

ROOT = Path(__file__).parents[1]
TEST_MODEL = ROOT / "tests" / "golden" / "model"
TIME = "/usr/bin/time"
FIRST_SPECIAL = 151643
"""The id of `<|endoftext|>` in both donors; the other special tokens follow in the same order."""
# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, tied
SIZES = {
    "0.6b": (1024, 28, 16, 8, 3072, True),
    "1.7b": (2048, 28, 16, 8, 6144, True),
    "4b": (2560, 36, 32, 8, 9728, True),
    "8b": (4096, 36, 32, 8, 12288, False),
    "14b": (5120, 40, 40, 8, 17408, False),
}


def vision_config() -> dict:
    """Qwen2.5-VL-7B-Instruct's `config.json`."""
    raw = read_json(TEST_MODEL / "config.json")
    raw |= {key: raw[key] + FIRST_SPECIAL - 4000 for key in raw if key.endswith("token_id")}
    raw.pop("head_dim")
    raw |= {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
    raw |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    raw |= {"max_window_layers": 28, "tie_word_embeddings": False}
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    tower = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
    tower |= {"out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]}
    return raw | {"vision_config": raw["vision_config"] | tower}


def llm_config(size: str) -> dict:
    """A dense Qwen3's `config.json`."""
    hidden, layers, heads, groups, inner, tied = SIZES[size]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def donor_shards(raw: dict, pool: Tensor) -> list[Shard]:
    """The weight files of a donor, under the hub's names."""
    with torch.device("meta"):
        if raw["model_type"] == "qwen3":
            model = LanguageModel(parse_text_config(raw))
        else:
            model = VisionLanguageModel(parse_config(raw))
    entries = []
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        start, parts, left = number * 7919 % len(pool), [], tensor.numel()
        while left:  # from another place of the pool, and round it
            parts.append(pool[start : start + left])
            left -= len(parts[-1])
            start = 0
        entries.append(Entry(name, "BF16", tuple(tensor.shape), tuple(parts)))
    return plan_shards(entries, 3_900_000_000)


def write_donor(folder: Path, raw: dict, shards: list[Shard], used: list[Shard]) -> None:
    folder.mkdir(parents=True)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            for entry in shard.entries if shard in used else ():
                for part in entry.parts:
                    file.write(part.view(torch.uint8).numpy())
            file.truncate(shard.size)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        write_json(folder / vlm.shards.INDEX, index)
    write_json(folder / "config.json", raw)
    for name in ("chat_template.jinja", "preprocessor_config.json", "tokenizer_config.json"):
        shutil.copyfile(TEST_MODEL / name, folder / name)
    tokenizer = read_json(TEST_MODEL / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    for index in range(len(vocabulary), FIRST_SPECIAL):
        vocabulary[f"<filler {index}>"] = index
    for token in tokenizer["added_tokens"]:
        token["id"] += FIRST_SPECIAL - 4000
    write_json(folder / "tokenizer.json", tokenizer)


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    os.sync()
    for path in files:
        number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process; exits where it fails.

    GNU time's own small process stands between: a child of ours would count our memory as its.
    """
    started = time.perf_counter()
    result = subprocess.run([TIME, "-v", *command], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    peak = re.search(r"Maximum resident set size \(kbytes\): (\d+)", result.stderr)
    if result.returncode or not peak:
        sys.exit(f"{shlex.join(command)} failed: {result.stderr}")
    return seconds, int(peak[1]) * 1024


def copy(files: list[Path], folder: Path) -> float:
    """Seconds that `cp` takes, and `sync` of its copies."""
    folder.mkdir()
    names = [str(path) for path in files]
    copies = [str(folder / f"{number}") for number in range(len(files))]
    started = time.perf_counter()
    for source, target in zip(names, copies, strict=True):
        subprocess.run(["cp", "--reflink=never", source, target], check=True)
    subprocess.run(["sync", *copies], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_copied(out: Path, donors: dict[str, Path]) -> int:
    """Tensors that the report calls copied, each compared with the donor's bit for bit."""
    hybrid, readers = TensorReader(out), {name: TensorReader(d) for name, d in donors.items()}
    rows = [row for row in read_json(out / REPORT)["tensors"] if row["action"] == "copied"]
    for row in rows:
        name, donor = row["name"], readers[row["donor"]]
        if not torch.equal(hybrid.get(name).view(torch.uint8), donor.get(name).view(torch.uint8)):
            sys.exit(f"{name} is not the donor's")
    return len(rows)


def measure(size: str, work: Path, repeats: int) -> dict:
    pool = (torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    configs = {"vision": vision_config(), "llm": llm_config(size)}
    shards = {name: donor_shards(raw, pool) for name, raw in configs.items()}
    used = shards | {
        "vision": [s for s in shards["vision"] if any("visual." in e.name for e in s.entries)]
    }
    read = sum(shard.size for part in used.values() for shard in part)
    if shutil.disk_usage(work).free < 2.05 * read:
        sys.exit(f"{work} has not the {2.05 * read / 1e9:.0f} GB that this takes; see --work")
    donors = {name: work / name for name in configs}
    for name, folder in donors.items():
        print(f"writing the {name} donor", flush=True)
        write_donor(folder, configs[name], shards[name], used[name])
    files = [donors[name] / shard.file for name, part in used.items() for shard in part]
    out = work / "hybrid"
    command = [sys.executable, "-m", "vlm.graft", "build", "--seed", "0"]
    command += ["--vision", str(donors["vision"]), "--llm", str(donors["llm"]), "--out", str(out)]
    load = os.getloadavg()[0]
    builds, peaks, copies, hashes, copied = [], [], [], [], 0
    for number in range(repeats):
        forget(files)
        seconds, peak = run(command)
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        builds.append(written / seconds)
        peaks.append(peak)
        hashes.append({path.name: sha256(path) for path in sorted(out.glob("*.safetensors"))})
        copied = copied or count_copied(out, donors)
        shutil.rmtree(out)
        forget(files)
        copies.append(read / copy(files, work / "copy"))
        print(
            f"run {number + 1}: build {seconds:.1f} s, {builds[-1] / 1e6:.0f} MB/s, peak "
            f"{peak / 1e6:.0f} MB; cp {copies[-1] / 1e6:.0f} MB/s",
            flush=True,
        )
    if any(held != hashes[0] for held in hashes):
        sys.exit("two builds with one seed differ")
    build, cp = statistics.median(builds), statistics.median(copies)
    return {
        "command": f"python -m bench.graft_full_size --llm {size} --repeats {repeats}",
        "build": shlex.join([TIME, "-v", "python", *command[1:]]).replace(str(work), "WORK"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {memory_gb():.0f} GB memory",
        "load_average_at_start": round(load, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "donor_bytes": {n: sum(shard.size for shard in part) for n, part in shards.items()},
        "donor_bytes_read": read,
        "bytes_written": written,
        "tensors_compared_with_donors": copied,
        "peak_rss_bytes": max(peaks),
        "build_bytes_per_second": [round(value) for value in builds],
        "cp_bytes_per_second": [round(value) for value in copies],
        "build_to_cp": round(build / cp, 3),
        "runs_with_equal_hashes": repeats,
        "sha256": hashes[0],
    }


def memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.graft_full_size", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--llm", choices=SIZES, default="8b")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/graft_full_size.json")
    options = parser.parse_args()
    if not Path(TIME).exists():
        parser.error(f"{TIME} is missing; install GNU time")
    with tempfile.TemporaryDirectory(dir=options.work, prefix="graft-") as folder:
        result = measure(options.llm, Path(folder), options.repeats)
    print(f"{'donors, as they look':28}{sum(result['donor_bytes'].values()) / 1e9:8.2f} GB")
    print(f"{'of that read':28}{result['donor_bytes_read'] / 1e9:8.2f} GB")
    print(f"{'hybrid':28}{result['bytes_written'] / 1e9:8.2f} GB")
    print(f"{'peak RSS':28}{result['peak_rss_bytes'] / 1e9:8.2f} GB")
    print(f"{'speed beside cp, median':28}{result['build_to_cp']:8.2f}")
    held = json.loads(options.json.read_text("utf-8")) if options.json.exists() else {}
    write_json(options.json, held | {options.llm: result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
