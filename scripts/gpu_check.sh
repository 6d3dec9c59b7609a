#!/bin/sh
# All checks and measurements that need a GPU, in at most nine minutes, then one table. See gpu_check.py.
set -e
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
