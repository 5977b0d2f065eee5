#!/usr/bin/env bash
# The GPU figures, ready to run where one is at hand, most valuable first; all pieces without a number:
#   bash benchmarks/gpu.sh [1 2 3 4 5 6 7 8 9]
# 1 GPU tests. 2 a training step beside the originals' (ECT, MeanFlow, EDM) in turn. 3 EDM on CIFAR-10, EDM_MINUTES (6).
# 4 ECT from it, ours and the original, ROW_MINUTES (3) each. 5 sCT, MeanFlow, SoFlow from it, likewise. 6 piece 4 again
# at a third of the rate. 7 a step of every method. 8 CUDA graphs, and diffusers. 9 as work grows.
# A call takes MINUTES (9): what does not fit waits for the next, the same command, which goes on in runs/gpu. Three
# calls do 1 to 5: EDM_MINUTES=5 ROW_MINUTES=2 bash benchmarks/gpu.sh 1 2 3 4 5. What is for keeping comes as OUT/gpu.tar.gz:
#   tar -xzf gpu.tar.gz -C benchmarks/results --wildcards '*_gpu*.json' && python benchmarks/report.py
# A machine without a network finds in .gpu what it lacks (mkdir .gpu; echo /.gpu/ >> .git/info/exclude; 30 MB in all):
#   .gpu/cifar10.zip in EDM's format, else torchvision downloads CIFAR-10; or its files as .gpu/cifar10.tar.xz, a third as
#     large: mkdir x; python -m zipfile -e ZIP x; tar -cJf .gpu/cifar10.tar.xz -C x .
#   .gpu/ect, .gpu/edm, .gpu/py-meanflow: checkouts; without one its rows are left out
#   .gpu/whl: wheels of requirements.txt that are not there; beside torch 2.11's usual company those are pydantic,
#     pydantic-core, annotated-types, typing-inspection, torch-fidelity, lpips; and for piece 8
#     diffusers, importlib-metadata, lazy-importer. nbclient, ipykernel, gymnasium, ruff: not needed.
# INCEPTION=FILE, torch-fidelity's Inception weights: 3 to 6 score on it too.
# TINY="section.key=value ..." shrinks every network and batch, STEPS the steps timed, CFG the list of rows: how a CPU
# tries this file (tests/test_gpu_sh.py).
set -uo pipefail # one failure leaves the others their turn
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python || command -v python3)} work=${WORK:-runs/gpu} own=${GPU_FILES:-.gpu}
random="--random 3x${PIXELS:-32}" tiny=${TINY:-} failed=0 end=$((SECONDS + 60 * ${MINUTES:-9}))
mkdir -p "$work"
export PYTHONUNBUFFERED=1
if compgen -G "$own/whl/*.whl" >/dev/null; then
  $python -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$work/site" "$own"/whl/*.whl || exit
  export PYTHONPATH=$PWD/$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
ect=${ECT:-$own/ect} edm=${EDM:-$own/edm} meanflow=${MEANFLOW:-$own/py-meanflow} zip=$own/cifar10.zip
if [ ! -e "$zip" ] && [ -e "$own/cifar10.tar.xz" ]; then
  zip=$work/cifar10.zip
  [ -e "$zip" ] || $python - "$own/cifar10.tar.xz" "$zip" <<'PY' || exit
import os, sys, tarfile, zipfile
with tarfile.open(sys.argv[1]) as tar, zipfile.ZipFile(sys.argv[2] + ".part", "w") as archive:
    for member in filter(tarfile.TarInfo.isfile, tar):
        archive.writestr(member.name.removeprefix("./"), tar.extractfile(member).read())
os.replace(sys.argv[2] + ".part", sys.argv[2])
PY
fi
settings="data.name=$([ -e "$zip" ] && echo "zip data.path=$zip" || echo cifar10) $tiny"
run() { # name, command: unless it is done, in the time that is left
  local name=$1 status; shift
  [ ! -e "$work/$name.done" ] || return 0
  if [ $((end - SECONDS)) -lt 60 ]; then echo "no time for $name: the same command goes on with it"; return; fi
  echo "+ $*" | tee -a "$work/log.txt"
  timeout -k 30 $((end - SECONDS - 40)) "$@" 2>&1 | tee -a "$work/log.txt"
  status=${PIPESTATUS[0]}
  case $status in
  0) touch "$work/$name.done" ;;
  124) echo "$name: stopped by the clock: the same command goes on with it" ;;
  *) echo "$name: failed ($status)" | tee -a "$work/log.txt" >&2; failed=1 ;;
  esac
}
step() { # name, config, the stage and settings
  local name=step_gpu_$1 cfg=configs/cifar10_$2.yml; shift 2
  run $name $python benchmarks/step.py --cfg $cfg $random --warmup ${WARMUP:-8} --steps ${STEPS:-20} \
    --out "$work/$name.json" train.batch_size=512 train.microbatch=auto "$@" $tiny
}
original() { # name, whose, checkout, config, the stage and settings
  local name=original_gpu_$1 code=$2 path=$3 cfg=configs/cifar10_$4.yml; shift 4
  [ -d "$path" ] || return 0
  run $name $python benchmarks/original.py $code "$path" --cfg $cfg $random --rounds 3 --steps ${STEPS:-5} \
    --out "$work/$name.json" train.batch_size=512 train.microbatch=auto "$@" $tiny
}
train() { # row, minutes, options of quality.py
  local name=$1 minutes=$2; shift 2
  set -- $python benchmarks/quality.py "${CFG:-benchmarks/cifar10.yml}" --out "$work/train" --only $name \
    --minutes $minutes "$@" --set $settings
  local as=train_$name$([[ " $* " != *" --original "* ]] || echo -original)
  run $as "$@"
  if [ -n "${INCEPTION:-}" ] && [ -e "$work/$as.done" ]; then
    run $as-inception "$@" metrics.features=inception metrics.weights="$INCEPTION"
  fi
}
both() { # row: ours and the original, as long
  train $1 ${ROW_MINUTES:-3}
  [ ! -d "$ect" ] || train $1 ${ROW_MINUTES:-3} --original "$ect"
}
keep() { # what is small enough to take home
  $python benchmarks/gpu_table.py "$work" || failed=1
  if [ -z "${OUT:-}" ]; then
    cp "$work"/*_gpu*.json benchmarks/results && $python benchmarks/report.py
  else
    (cd "$work" && find . -path ./site -prune -o \( -name '*.json' -o -name '*.jsonl' -o -name '*.md' -o -name '*.png' \
      -o -name log.txt -o -name config.yml \) -print0 | tar -czf "$OUT/gpu.tar.gz" --null -T -)
  fi
}
for piece in ${*:-1 2 3 4 5 6 7 8 9}; do
  case $piece in
  1) run tests $python -m pytest -m gpu -n ${JOBS:-6} --dist load ${TESTS:-$(grep -l '^@pytest.mark.gpu' tests/*.py)} ;;
  2)
    original ect_stage15 ect "$ect" ect --stage 15
    original ect_stage0 ect "$ect" ect --stage 0
    original meanflow py-meanflow "$meanflow" meanflow
    original edm edm "$edm" edm
    original ect_stage15_tf32 ect "$ect" ect --stage 15 --tf32
    ;;
  3) train edm ${EDM_MINUTES:-6} ;;
  4) both edm+ect ;;
  5) for row in edm+sct edm+meanflow edm+soflow meanflow; do train $row ${ROW_MINUTES:-3}; done ;;
  6) both edm+ect-low ;;
  7)
    step edm edm
    step ect ect --stage 0
    step ect_stage15 ect --stage 15
    for name in sct meanflow soflow imf scd tcm ict pd; do step $name $name; done
    for name in ct cd; do step $name $name objective.metric=l2; done
    step cmt cmt objective.metric=pseudo_huber
    ;;
  8)
    for name in edm ect sct; do step ${name}_graphs $name train.compile=reduce-overhead; done
    run compare_gpu $python benchmarks/compare.py --cfg configs/cifar10_ect.yml $random --rounds 5 --repeats ${STEPS:-5} \
      $([ -d "$edm" ] && echo --original "$edm") --out "$work/compare_gpu.json" train.batch_size=512 $tiny
    ;;
  9)
    run scaling_gpu $python benchmarks/scaling.py --cfg configs/cifar10_ect.yml --steps 10 --warmup 5 \
      --batch ${BATCHES-64 128 256 512 1024} --resolution ${RESOLUTIONS-32 64 128} --width ${WIDTHS-64 128 256} \
      --out "$work/scaling_gpu.json" --set train.batch_size=128 $tiny
    ;;
  *) echo "gpu.sh: there is no piece $piece" >&2; exit 2 ;;
  esac
done
keep
exit $failed
