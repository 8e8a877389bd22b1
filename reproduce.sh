#!/usr/bin/env bash
# Set-up check, then the main job on the embedded data (or on yours: --data DIR), then its figures
# into results/<dataset>/. Arguments go to promptmm.py; --quick makes it a smoke test.
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

python promptmm.py "$@" --out runs/reproduce --force
case " $* " in *" --quick "*) echo "quick: nothing recorded"; exit 0 ;; esac
python experiments.py record runs/reproduce
