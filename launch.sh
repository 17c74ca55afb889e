#!/usr/bin/env bash
# Set-up and launching.
#
#   bash launch.sh demo                            the whole job on a phantom: about 8 minutes on 2 CPU cores
#   bash launch.sh test                            lint and the test suite
#   bash launch.sh pretrain CONFIG [key=value ...] train_moco.py on what this machine has
#   bash launch.sh evaluate CONFIG [key=value ...] eval_seg.py, likewise
#
# pretrain and evaluate use plain Python on a CPU or one GPU and torchrun on several GPUs. Several nodes: the
# same command on each, with NNODES, NODE_RANK (0 ... NNODES-1) and MASTER_ADDR (a name or address of node 0)
# set, and MASTER_PORT if 29500 is taken. GPUS=n uses n processes per node instead of one per GPU.
#
# The current Python is used if it has what requirements.txt names; else .venv is made here, once. PYTHON=...
# names another one to begin with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# A pair that fits together and runs on CPU and GPU.
TORCH="torch==2.14.1 torchvision==0.29.1"

python_with() { # module ...: print a Python that can import them all, or fail
    local candidate
    for candidate in "${PYTHON:-python3}" .venv/bin/python; do
        if command -v "$candidate" >/dev/null && "$candidate" - "$@" 2>/dev/null <<'PY'
import sys, importlib.util
sys.exit(sys.version_info < (3, 11) or not all(map(importlib.util.find_spec, sys.argv[1:])))
PY
        then
            echo "$candidate"
            return
        fi
    done
    return 1
}

set_up() { # [extra]: sets PY to a Python with the run-time (and development) dependencies
    local modules="torch torchvision numpy PIL tqdm yaml"
    [ "${1:-}" = extra ] && modules="$modules nibabel matplotlib tensorboard pytest ruff"
    # shellcheck disable=SC2086
    if ! PY=$(python_with $modules); then
        if [ ! -x .venv/bin/python ]; then
            echo "making .venv"
            "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
                { echo "error: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 2; }
            "${PYTHON:-python3}" -m venv .venv
        fi
        echo "installing requirements into .venv (about a minute)"
        # shellcheck disable=SC2086
        .venv/bin/python -m pip install --quiet $TORCH -r requirements.txt
        [ "${1:-}" = extra ] && .venv/bin/python -m pip install --quiet -r requirements-extra.txt
        PY=.venv/bin/python
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$("$PY" -c 'import os; print(max(1, (os.cpu_count() or 1) // int(os.environ.get("GPUS") or 1)))')}
}

launch() { # SCRIPT CONFIG [arguments]: one process, or torchrun
    local script=$1 config=${2:-}
    [ -n "$config" ] || { echo "error: which config? bash launch.sh pretrain configs/NAME.yaml" >&2; exit 2; }
    shift 2
    local gpus=${GPUS:-$("$PY" -c 'import torch; print(torch.cuda.device_count())')}
    if [ "$gpus" -le 1 ] && [ "${NNODES:-1}" -le 1 ]; then
        exec "$PY" "$script" --config "$config" "$@"
    fi
    if [ "${NNODES:-1}" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        echo "error: NNODES=$NNODES needs MASTER_ADDR, the address of node 0" >&2
        exit 2
    fi
    exec "$PY" -m torch.distributed.run --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
        --nproc_per_node="$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 1)" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" \
        "$script" --config "$config" "$@"
}

demo() { # data, pretraining, four evaluations, one table
    local out=runs/demo encoder name mode
    "$PY" data.py phantom --out data/phantom --cases 40 --slices 24 --size 96 --seed 0
    "$PY" train_moco.py --config configs/phantom.yaml run.out=$out/pretrain
    for mode in linear finetune; do
        for name in random pretrained; do
            encoder=random
            [ $name = pretrained ] && encoder=$out/pretrain/encoder.pth
            echo "== $mode evaluation of the $name encoder"
            "$PY" eval_seg.py --config configs/$mode.yaml encoder=$encoder model.arch=resnet18 run.out=$out/$name-$mode
        done
    done
    "$PY" eval_seg.py --compare $out/random-linear $out/random-finetune $out/pretrained-linear $out/pretrained-finetune
}

case "${1:-}" in
demo)
    set_up
    demo
    ;;
test)
    set_up extra
    "$PY" -m ruff check .
    "$PY" -m ruff format --check .
    "$PY" -m pytest "${@:2}"
    ;;
pretrain)
    set_up
    launch train_moco.py "${@:2}"
    ;;
evaluate)
    set_up
    launch eval_seg.py "${@:2}"
    ;;
*)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' launch.sh
    exit 2
    ;;
esac
