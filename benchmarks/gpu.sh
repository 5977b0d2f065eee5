#!/usr/bin/env bash
# The GPU figures, ready to run where one is at hand (one H200 was in mind; about 25 minutes, compiling included):
#   bash benchmarks/gpu.sh [PATH of a checkout of github.com/NVlabs/edm]
set -uo pipefail # one failure leaves the others their turn
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=benchmarks/results random="--random 3x32"
$python -m pytest -m gpu
for name in edm ect sct; do # the published networks, batch 512
  $python benchmarks/step.py --cfg configs/cifar10_$name.yml $random --warmup 8 --steps 20 \
    --out $out/step_gpu_$name.json train.batch_size=512
  $python benchmarks/step.py --cfg configs/cifar10_$name.yml $random --warmup 8 --steps 20 \
    --out $out/step_gpu_${name}_graphs.json train.batch_size=512 train.compile=reduce-overhead
done
$python benchmarks/compare.py --cfg configs/cifar10_ect.yml $random --rounds 5 --repeats 5 ${1:+--original "$1"} \
  --out $out/compare_gpu.json train.batch_size=512
$python benchmarks/scaling.py --cfg configs/cifar10_ect.yml --batch 64 128 256 512 1024 --resolution 32 64 128 \
  --width 64 128 256 --steps 10 --warmup 5 --out $out/scaling_gpu.json --set train.batch_size=128
$python benchmarks/report.py
