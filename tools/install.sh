#!/usr/bin/env bash
# Creates .venv and installs everything that the tests and the demo need. `make install` runs it.
# With the argument `vlmevalkit` it creates .venv-vlmevalkit, where eval/vlmevalkit.py works, and
# with `swift` .venv-swift, where the peers of bench/peers do.
#
#   PYTHON=python3.12   the interpreter to use (default: the first of python3, python3.13,
#                       python3.12, python3.11 that is new enough)
#   TORCH_INDEX=URL     the package index to take torch from, e.g. for another CUDA version
#
# Both are remembered as long as the environment exists. Does nothing when it already holds what
# the files below and the two variables ask for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

inputs=(requirements.txt tools/install.sh serve/cpu_shims/install.py)
case "${1:-}" in
    "")
        readonly VENV=.venv REQUIREMENTS=requirements.txt
        inputs+=(requirements-cpu.txt requirements-gpu.txt setup.py pyproject.toml)
        ;;
    vlmevalkit | swift)
        readonly VENV=.venv-$1 REQUIREMENTS=requirements-$1.txt
        inputs+=("$REQUIREMENTS")
        ;;
    *)
        echo "install: error: there is no environment $1; there are vlmevalkit and swift." >&2
        exit 1
        ;;
esac
readonly STAMP=$VENV/installed
readonly REMEMBERED_INDEX=$VENV/torch-index
readonly CPU_INDEX=https://download.pytorch.org/whl/cpu
pinned() { grep -o "^$1==[^ ;]*" "$2"; }
torch=$(pinned torch "$REQUIREMENTS")
setuptools=$(pinned setuptools requirements.txt)
readonly torch setuptools

say() { printf 'install: %s\n' "$*"; }
stop() {
    printf 'install: error: %s\n' "$*" >&2
    exit 1
}

is_new_enough() {
    command -v "$1" >/dev/null &&
        "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null ||
            stop "PYTHON=$PYTHON is not a command here; name a Python 3.11 or newer."
        is_new_enough "$PYTHON" ||
            stop "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1), but Python 3.11 or newer is" \
                "needed; name one, e.g. make PYTHON=python3.12."
        python=$PYTHON
    else
        for candidate in "$(readlink -f "$VENV/bin/python")" python3 python3.13 python3.12 python3.11; do
            if is_new_enough "$candidate"; then
                python=$candidate
                break
            fi
        done
        [ -n "${python:-}" ] ||
            stop "no Python 3.11 or newer was found; install one, or name it with" \
                "make PYTHON=/path/to/python."
    fi
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        stop "$python cannot make virtual environments; install its venv module (on Debian or" \
            "Ubuntu: apt install python3-venv) or name another Python with PYTHON=."
}

has_gpu() { [[ "$(nvidia-smi -L 2>/dev/null)" == GPU* ]]; }

# What is installed depends on exactly this; it holds absolute paths, hence the folder.
fingerprint() {
    {
        cat "${inputs[@]}"
        echo "$device $torch_index $PWD"
        "$python" -c 'import sys; print(sys.version, sys.base_prefix)'
    } | cksum
}

pip_install() { "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }

# --no-deps: an index of torch builds need not hold the rest, which comes with requirements.txt.
pip_torch() { pip_install --no-deps --retries 2 "$@"; }

# A plain torch from PyPI brings several GB of CUDA, and so does any package that asks for torch
# where there is none. So torch comes first, in the build that fits this machine.
install_torch() {
    local log=$VENV/torch-download.log
    if [ -n "$torch_index" ]; then
        say "installing $torch from $torch_index"
        pip_torch --index-url "$torch_index" "$torch" ||
            stop "$torch could not be installed from TORCH_INDEX=$torch_index (pip's reason is" \
                "above); check the address, or leave TORCH_INDEX out."
    elif [ "$device" = cuda ]; then
        say "installing $torch with CUDA, for the NVIDIA GPU that nvidia-smi lists"
        pip_torch "$torch" ||
            stop "$torch could not be downloaded (pip's reason is above); check the network," \
                "or name an index that has it with TORCH_INDEX=."
    else
        say "installing $torch for the CPU"
        pip_torch "$torch+cpu" >"$log" 2>&1 ||
            pip_torch --index-url "$CPU_INDEX" "$torch" >>"$log" 2>&1 || {
            cat "$log" >&2
            stop "a CPU build of $torch could not be downloaded (pip's reasons are above); check" \
                "that $CPU_INDEX can be reached, or name another index with TORCH_INDEX=."
        }
    fi
}

check_torch() {
    local build
    build=$("$VENV/bin/python" -c 'import torch; print(torch.__version__, torch.version.cuda)') ||
        stop "the installed torch cannot be imported (its reason is above); remove $VENV and" \
            "run this again."
    if [ "$device" = cuda ] && [ "${build##* }" = None ]; then
        stop "nvidia-smi lists a GPU, but torch ${build%% *} was built without CUDA; name an" \
            "index with a CUDA build, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cu130."
    fi
    say "done: torch ${build%% *} in $VENV"
}

# Everything but torch, for .venv.
install_graftvl() {
    local vllm_requirements=requirements-gpu.txt
    if [ "$device" = cpu ]; then vllm_requirements=requirements-cpu.txt; fi
    say "installing the other packages of requirements.txt and $vllm_requirements"
    # DeepSpeed comes as source and looks at the installed torch while it builds; its compiled
    # operations are not used, so none is built.
    DS_BUILD_OPS=0 pip_install --no-build-isolation -r requirements.txt -r "$vllm_requirements" ||
        stop "the packages of requirements.txt and $vllm_requirements could not be installed" \
            "(pip's reason is above); check the network and run this again."
    if [ "$device" = cpu ]; then "$VENV/bin/python" serve/cpu_shims/install.py; fi
    pip_install --no-deps --no-build-isolation --editable . ||
        stop "graftvl itself could not be installed (pip's reason is above)."
}

# Everything but torch, for .venv-vlmevalkit or .venv-swift.
install_other() {
    say "installing the other packages of $REQUIREMENTS"
    pip_install -r "$REQUIREMENTS" ||
        stop "the packages of $REQUIREMENTS could not be installed (pip's reason is above); check" \
            "the network and run this again."
    if [ "$VENV" = .venv-vlmevalkit ]; then
        # Both builds of OpenCV own the same files.
        "$VENV/bin/python" -m pip uninstall --quiet --yes opencv-python
        pip_install --no-deps --force-reinstall "$(pinned opencv-python-headless "$REQUIREMENTS")" ||
            stop "OpenCV without a desktop could not be installed (pip's reason is above)."
    fi
    "$VENV/bin/python" serve/cpu_shims/install.py
}

python=
find_python
torch_index=${TORCH_INDEX:-$(cat "$REMEMBERED_INDEX" 2>/dev/null || true)}
device=cpu
if [ "$VENV" = .venv ] && has_gpu; then device=cuda; fi
wanted=$(fingerprint)
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ]; then
    say "$VENV is up to date"
    exit 0
fi

say "making $VENV with $("$python" --version 2>&1) ($(command -v "$python")); takes minutes"
"$python" -m venv --clear "$VENV"
pip_install "$setuptools" ||
    stop "$setuptools could not be downloaded (pip's reason is above); check the network."
install_torch
if [ "$VENV" = .venv ]; then install_graftvl; else install_other; fi
check_torch
printf '%s\n' "$torch_index" >"$REMEMBERED_INDEX"
printf '%s\n' "$wanted" >"$STAMP"
