#!/usr/bin/env bash
# The CPU figures of docs/performance.md, on two quiet cores, in about ten minutes:
#   bash benchmarks/measure_cpu.sh [PATH of a checkout of github.com/NVlabs/edm]
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=2
python=${PYTHON:-python} out=benchmarks/results case="--cfg benchmarks/cpu.yml --threads 2"
$python benchmarks/step.py $case --random 3x32 --steps 15 --out $out/step_cpu.json
$python benchmarks/compare.py $case --random 3x32 --rounds 7 ${1:+--original "$1"} --out $out/compare_cpu.json
$python benchmarks/compare.py $case --random 3x32 --rounds 7 ${1:+--original "$1"} --out $out/compare_cpu_dropout.json \
  network.dropout=0.1
$python benchmarks/loading.py --out $out/loading_cpu.json
$python benchmarks/scaling.py $case --out $out/scaling_cpu.json
$python benchmarks/report.py
