#!/usr/bin/env bash
# Set-up check, then every table and figure into results/: on the embedded data, or on yours with
# --data DIR. --quick is a smoke test of it all, written to runs/quick/.
set -euo pipefail
cd "$(dirname "$0")"

python - <<'PYTHON'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"expected Python 3.11 or later, found {sys.version.split()[0]}")
try:
    import numpy, scipy, torch
except ImportError as error:
    sys.exit(f"{error}; expected `pip install .` in this environment first")
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, numpy {numpy.__version__}, "
      f"scipy {scipy.__version__}, {torch.get_num_threads()} threads, CUDA {torch.cuda.is_available()}")
PYTHON

python -m experiments all "$@"
