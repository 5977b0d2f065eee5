#!/usr/bin/env bash
# The GPU figures, ready to run where one is at hand, in pieces of at most nine minutes each; all of them without a number:
#   [ECT=checkout of github.com/locuslab/ect] [EDM=checkout of github.com/NVlabs/edm] bash benchmarks/gpu.sh [1 2 3 4]
# 1: pytest -m gpu. 2: a training step of the 56M CIFAR-10 network at batch 512, and with ECT=, of the original ECT code.
# 3: CUDA graphs, and ours beside others. 4: as work grows.
# TINY="section.key=value ..." shrinks every network and batch, and STEPS the steps timed: how a CPU tries this file.
set -uo pipefail # one failure leaves the others their turn
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${OUT:-benchmarks/results} random="--random 3x${PIXELS:-32}" failed=0
batch="train.batch_size=512" steps="--warmup ${WARMUP:-8} --steps ${STEPS:-20}"
tiny=${TINY:-} minutes=${MINUTES:-9}
mkdir -p "$out"
run() { # what is left of the piece's minutes is all that it may take
  echo "+ $*"
  timeout -k 10 $((end - SECONDS > 1 ? end - SECONDS : 1)) "$@" || { echo "failed ($?): $*" >&2; failed=1; }
}
step() { # name, config, the step or stage, overrides
  local name=$1 cfg=$2; shift 2
  run $python benchmarks/step.py --cfg configs/cifar10_$cfg.yml $random $steps --out $out/step_gpu_$name.json $batch "$@" $tiny
}
for piece in ${*:-1 2 3 4}; do
  end=$((SECONDS + 60 * minutes - 15))
  case $piece in
  1) run $python -m pytest -m gpu ${TESTS:-} ;;
  2)
    step edm edm
    step ect ect --stage 0
    step ect_stage15 ect --stage 15
    step sct sct
    if [ -n "${ECT:-}" ]; then
      for stage in 0 15; do
        run $python benchmarks/original.py "$ECT" --cfg configs/cifar10_ect.yml $random $steps --stage $stage \
          --out $out/original_gpu_stage$stage.json $batch $tiny
      done
    fi
    ;;
  3)
    for name in edm ect sct; do step ${name}_graphs $name train.compile=reduce-overhead; done
    run $python benchmarks/compare.py --cfg configs/cifar10_ect.yml $random --rounds 5 --repeats 5 \
      ${EDM:+--original "$EDM"} --out $out/compare_gpu.json $batch $tiny
    ;;
  4)
    run $python benchmarks/scaling.py --cfg configs/cifar10_ect.yml --batch 64 128 256 512 1024 --resolution 32 64 128 \
      --width 64 128 256 --steps 10 --warmup 5 --out $out/scaling_gpu.json --set train.batch_size=128
    ;;
  *) echo "gpu.sh: there is no piece $piece" >&2; exit 2 ;;
  esac
done
[ -n "${OUT:-}" ] || $python benchmarks/report.py
exit $failed
