"""The surgery at full size: peak memory and speed beside `cp`, and the same bytes twice.

    python -m bench.graft_full_size                 # Qwen2.5-VL-7B + Qwen3-8B: 40 GB of disk
    python -m bench.graft_full_size --llm 0.6b

Makes donors in the hub's layout (flat configs, weights of the real shapes in five or fewer files
with an index, the test model's tokenizer moved to the real ids), builds from them in a process of
its own, in turn with `cp` of the files that the build reads, and removes all it made. Weights are
normal numbers from a pool of 32 Mi; files that give no tensor, the old language model's, are
holes. Donors leave the page cache before each run; both sides end with their bytes on the disk.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import vlm.shards
from bench.common import (
    GOLDEN_MODEL,
    ROOT,
    arguments,
    print_table,
    ratios,
    seconds,
    summary,
    write_result,
)
from vlm.checkpoint import TensorReader, write_json
from vlm.graft.report import REPORT
from vlm.hf_config import parse_config, parse_text_config, read_json
from vlm.model import LanguageModel, VisionLanguageModel
from vlm.shards import Entry, Shard, plan_shards

TIME = "/usr/bin/time"
FIRST_SPECIAL = 151643
"""The id of `<|endoftext|>` in both donors; the other special tokens follow in the same order."""
# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, tied
SIZES = {
    "tiny": (256, 2, 2, 1, 512, False),  # for --quick, with a tower as small
    "0.6b": (1024, 28, 16, 8, 3072, True),
    "1.7b": (2048, 28, 16, 8, 6144, True),
    "4b": (2560, 36, 32, 8, 9728, True),
    "8b": (4096, 36, 32, 8, 12288, False),
    "14b": (5120, 40, 40, 8, 17408, False),
}


def vision_config(tiny: bool) -> dict:
    """Qwen2.5-VL-7B-Instruct's `config.json`; all but the vocabulary small where `tiny`."""
    raw = read_json(GOLDEN_MODEL / "config.json")
    raw |= {key: raw[key] + FIRST_SPECIAL - 4000 for key in raw if key.endswith("token_id")}
    raw.pop("head_dim")
    raw |= {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
    raw |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    raw |= {"max_window_layers": 28, "tie_word_embeddings": False}
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    tower = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
    tower |= {"out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]}
    if tiny:
        raw |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        raw |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        tower |= {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128}
        tower |= {"out_hidden_size": 256, "fullatt_block_indexes": [1]}
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
        shutil.copyfile(GOLDEN_MODEL / name, folder / name)
    tokenizer = read_json(GOLDEN_MODEL / "tokenizer.json")
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
    done = []

    def build() -> None:
        command_line = [TIME, "-v", *command]
        done.append(subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True))

    taken, result = seconds(build), done[0]
    peak = re.search(r"Maximum resident set size \(kbytes\): (\d+)", result.stderr)
    if result.returncode or not peak:
        sys.exit(f"{shlex.join(command)} failed: {result.stderr}")
    return taken, int(peak[1]) * 1024


def copy(files: list[Path], folder: Path) -> float:
    """Seconds that `cp` takes, and `sync` of its copies."""
    folder.mkdir()
    names = [str(path) for path in files]
    copies = [str(folder / f"{number}") for number in range(len(files))]

    def work() -> None:
        for source, target in zip(names, copies, strict=True):
            subprocess.run(["cp", "--reflink=never", source, target], check=True)
        subprocess.run(["sync", *copies], check=True)

    taken = seconds(work)
    shutil.rmtree(folder)
    return taken


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


def measure(size: str, work: Path, rounds: int) -> dict:
    count = 1 << (20 if size == "tiny" else 25)
    pool = (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    configs = {"vision": vision_config(size == "tiny"), "llm": llm_config(size)}
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
    builds, peaks, copies, hashes, copied = [], [], [], [], 0
    for number in range(rounds):
        forget(files)
        taken, peak = run(command)
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        builds.append(written / taken)
        peaks.append(peak)
        hashes.append({path.name: sha256(path) for path in sorted(out.glob("*.safetensors"))})
        copied = copied or count_copied(out, donors)
        shutil.rmtree(out)
        forget(files)
        copies.append(read / copy(files, work / "copy"))
        print(
            f"run {number + 1}: build {taken:.1f} s, {builds[-1] / 1e6:.0f} MB/s, peak "
            f"{peak / 1e6:.0f} MB; cp {copies[-1] / 1e6:.0f} MB/s",
            flush=True,
        )
    if any(held != hashes[0] for held in hashes):
        sys.exit("two builds with one seed differ")
    return {
        "llm": size,
        "build": shlex.join([TIME, "-v", "python", *command[1:]]).replace(str(work), "WORK"),
        "donor_bytes": {n: sum(shard.size for shard in part) for n, part in shards.items()},
        "donor_bytes_read": read,
        "bytes_written": written,
        "tensors_compared_with_donors": copied,
        "peak_rss_bytes": max(peaks),
        "build_bytes_per_second": summary(builds, 0),
        "cp_bytes_per_second": summary(copies, 0),
        "build_to_cp": ratios(builds, copies),
        "runs_with_equal_hashes": rounds,
        "sha256": hashes[0],
    }


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments("graft_full_size", __doc__)
    parser.add_argument("--llm", choices=SIZES, default="8b")
    parser.add_argument("--rounds", type=int, default=3, help="of a build and a copy each")
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure")
    options = parser.parse_args(given)
    if options.quick:
        options.llm, options.rounds = "tiny", 1
    if not Path(TIME).exists():
        parser.error(f"{TIME} is missing; install GNU time")
    with tempfile.TemporaryDirectory(dir=options.work, prefix="graft-") as folder:
        found = measure(options.llm, Path(folder), options.rounds)
    shown = {
        "donors, as they look, GB": sum(found["donor_bytes"].values()) / 1e9,
        "of that read, GB": found["donor_bytes_read"] / 1e9,
        "hybrid, GB": found["bytes_written"] / 1e9,
        "peak RSS, GB": found["peak_rss_bytes"] / 1e9,
        "speed beside cp": found["build_to_cp"],
    }
    print_table([{options.llm: name, "": value} for name, value in shown.items()])
    write_result(
        "graft_full_size",
        options,
        what=f"peak resident memory of the graft of donors of full size ({options.llm}), and its "
        "speed / that of cp of the files it reads",
        target={"peak RSS": "< 2 GB", "speed": "that of the disk"},
        figures=found,
        spread=f"least and most of {options.rounds} rounds of a build and a copy; the peak is the "
        "largest of all builds",
        refuted_by="python -m bench.graft_full_size: /usr/bin/time tells a larger peak, or two "
        "builds differ",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
