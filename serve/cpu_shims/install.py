"""Makes this folder part of the Python environment that runs this script (README.md here)."""

import subprocess
import sys
import sysconfig
from pathlib import Path

BUILT_FOR_CUDA = ("torchaudio", "torchcodec")


def main() -> None:
    folder = Path(__file__).resolve().parent
    path_file = Path(sysconfig.get_path("purelib")) / "graftvl_cpu.pth"
    path_file.write_text(f"{folder}\nimport torchvision_operators\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "uninstall", "--quiet"]
    subprocess.run([*pip, "--yes", *BUILT_FOR_CUDA], check=True)


if __name__ == "__main__":
    main()
