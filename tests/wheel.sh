#!/usr/bin/env bash
# Builds the wheel, installs it with its dependencies alone into an empty venv, and uses it there,
# outside the checkout. Usage: tests/wheel.sh PYTHON
set -euo pipefail

python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH

cd "$root"
"$python" -m pip wheel -qq --no-deps --wheel-dir "$work" .
"$python" - "$work"/jaxsparse-*.whl <<'EOF'
import subprocess, sys, zipfile

held = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
packages = ("jaxsparse", "pallas_kernels")
foreign = sorted(name for name in held if name.split("/")[0] not in packages)
tracked = subprocess.run(["git", "ls-files", *packages], capture_output=True, text=True, check=True)
missing = sorted(set(tracked.stdout.split()) - held)
if foreign or missing:
    sys.exit(f"the wheel holds {foreign} beside the two packages and lacks {missing}")
print(f"{sys.argv[1].rsplit('/', 1)[1]}: {len(held)} files")
EOF

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq "$work"/jaxsparse-*.whl
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W error <<'EOF'
import importlib.util, os, sys

import jax

import jaxsparse as jsp
import pallas_kernels

for module in (jsp, pallas_kernels):
    if not os.path.realpath(module.__file__).startswith(os.path.realpath(sys.prefix)):
        sys.exit(f"{module.__name__} came from {module.__file__}, not from the wheel")
for name in ("tyro", "pytest", "chex", "models", "experiments"):
    if importlib.util.find_spec(name):
        sys.exit(f"{name} is importable: this venv does not show what the wheel alone needs")
params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}}
pruned, masks = jsp.prune(params, jsp.uniform(0.75))
kept = int((pruned["dense"]["kernel"] != 0).sum())
if kept != 16:
    sys.exit(f"prune at 75 % kept {kept} of 64 weights, not 16")
print(f"the wheel works alone: Python {sys.version.split()[0]}, jax {jax.__version__}")
EOF
