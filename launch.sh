#!/usr/bin/env bash
# Set-up and launching.
#
#   bash launch.sh demo                            the whole job on a phantom: 10 minutes on 2 CPU cores
#   bash launch.sh test [-m long]                  lint and the test suite; with -m long its long part
#   bash launch.sh pretrain CONFIG [key=value ...] train_moco.py on what this machine has
#   bash launch.sh evaluate CONFIG [key=value ...] eval_seg.py, likewise
#   bash launch.sh classify CONFIG [key=value ...] eval_cls.py, likewise (needs scikit-learn)
#   bash launch.sh detect CONFIG [key=value ...]   eval_det.py, likewise (needs pycocotools and scipy)
#   bash launch.sh benchmark CONFIG ENCODER ...    all of these of each encoder, in one table; resumes any time
#   bash launch.sh compare [--only METHOD ...]     all methods on all benchmarks, hours on 2 cores, resumes any time
#   bash launch.sh ablation [--only METHOD ...]    the parts of the method, likewise
#
# pretrain, evaluate, classify and detect use plain Python on a CPU or one GPU and torchrun on several GPUs. GPUS=n uses n
# processes per node instead of one per GPU; MAX_RESTARTS=n starts them anew up to n times after one has died.
#
# Several nodes: the same command on each, with NNODES, NODE_RANK (0 ... NNODES-1) and MASTER_ADDR (a name or
# address of node 0) set, MASTER_PORT if 29500 is taken, and NODE_ADDR on a node that the others do not know by
# its host name. In a SLURM job (sbatch, salloc, srun with one task per node) all of that is found:
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=1 --signal=B:USR1@180 --requeue --open-mode=append \
#       launch.sh pretrain configs/abdomen1k.yaml
#
# SIGTERM, SIGUSR1 and Ctrl-C end pretraining after the step under way; it saves, the exit code is 75, and the
# same command resumes the run. After SIGUSR1 a SLURM job also goes back into the queue. A second Ctrl-C: at once.
#
# From any folder: bash PROJECT/launch.sh ...; paths are relative to where you stand, also those in a config.
# demo and test stay in the project's folder.
#
# The current Python is used if it has what requirements.txt names; else .venv is made beside this file, once.
# PYTHON=... names another one to begin with.
set -euo pipefail

fail() { # MESSAGE: what the user can mend, in one line
    echo "error: $1" >&2
    exit 2
}

HERE=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd) # the project's folder
if [ ! -f "$HERE/train_moco.py" ]; then # sbatch runs a copy of this file in a folder of its own
    HERE=$(cd "${SLURM_SUBMIT_DIR:-.}" && pwd)
    [ -f "$HERE/train_moco.py" ] ||
        fail "submit launch.sh from the project's folder: there is no train_moco.py in $HERE"
fi

# A pair that fits together and runs on CPU and GPU.
TORCH="torch==2.14.1 torchvision==0.29.1"

python_with() { # module ...: print a Python that can import them all, or fail
    local candidate
    for candidate in "${PYTHON:-python3}" "$HERE/.venv/bin/python"; do
        if command -v "$candidate" >/dev/null && "$candidate" -P - "$@" 2>/dev/null <<'PY'
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
    [ "${1:-}" = extra ] && modules="$modules nibabel SimpleITK h5py matplotlib tensorboard sklearn scipy pycocotools pytest ruff"
    # shellcheck disable=SC2086
    if ! PY=$(python_with $modules); then
        if [ ! -x "$HERE/.venv/bin/python" ]; then
            echo "making $HERE/.venv"
            "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
                fail "Python 3.11 or newer is needed; name one with PYTHON=..."
            "${PYTHON:-python3}" -m venv "$HERE/.venv"
        fi
        PY=$HERE/.venv/bin/python
        echo "installing requirements into $HERE/.venv (about a minute)"
        # shellcheck disable=SC2086
        "$PY" -m pip install --quiet $TORCH -r "$HERE/requirements.txt"
        [ "${1:-}" != extra ] || "$PY" -m pip install --quiet -r "$HERE/requirements-extra.txt"
    fi
}

share_cores() { # PROCESSES: threads for each of this node's processes
    local cores=${SLURM_CPUS_ON_NODE:-$("$PY" -c 'import os; print(os.cpu_count() or 1)')}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
}

# ---------------------------------------------------------------------------------------------------------
# pretrain and evaluate: one process, or torchrun, or srun and this script on every node of a SLURM job
# ---------------------------------------------------------------------------------------------------------

KIND=  # of the child: python, torchrun or srun
CHILD= # its process id
CODE=0 # its exit code
STOP=  # the first signal that came, as in SIGTERM
IDLE=  # set if a signal came while nothing was being trained

launch() { # pretrain|evaluate|classify|detect CONFIG [arguments]
    local script=$HERE/train_moco.py gpus out
    [ "$1" != evaluate ] || script=$HERE/eval_seg.py
    [ "$1" != classify ] || script=$HERE/eval_cls.py
    [ "$1" != detect ] || script=$HERE/eval_det.py
    [ -n "${2:-}" ] || fail "which config? bash launch.sh $1 configs/NAME.yaml"
    trap 'stop SIGTERM' TERM HUP
    trap 'stop SIGUSR1' USR1
    set_up
    trap 'stop SIGINT' INT # until here Ctrl-C ends at once, an installation for instance
    find_nodes

    if [ "$KIND" = srun ]; then
        out=$(folder "$script" "${@:2}") || leave $?
        # Without SLURM_CPUS_PER_TASK the one task of a node has all of the job's cores there.
        run env -u SLURM_CPUS_PER_TASK -u SRUN_CPUS_PER_TASK LAUNCHED_BY="$SLURM_JOB_ID" \
            srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
            bash "$HERE/launch.sh" "$@"
        leave "$CODE" "$out"
    fi

    gpus=${GPUS:-$("$PY" -P -c 'import torch; print(torch.cuda.device_count())')} || leave $?
    [ "$gpus" -gt 0 ] || gpus=1
    share_cores "$gpus"
    if [ "$gpus" -eq 1 ] && [ "$NNODES" -eq 1 ]; then
        KIND=python
        run "$PY" "$script" --config "${@:2}"
        leave "$CODE"
    fi

    KIND=torchrun
    out=$(folder "$script" "${@:2}") || leave $?
    [ "$NODE_RANK" -gt 0 ] || rm -f "$out/stopped.json" # of an earlier stop
    # c10d is the rendezvous that can start the processes of several nodes anew. It has no --node_rank: ranks
    # follow the order of the nodes' addresses, so rank 0 need not be on node 0, which hosts the rendezvous.
    # Restarted processes must not read what their predecessors left in torchrun's store (pytorch issue 135712).
    [ "${MAX_RESTARTS:-0}" -eq 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    export STOPPED_CODE=0 # of training that has saved: the marker tells, and torchrun prints no page of errors
    # torchrun would die of a SIGUSR1 that is sent to every process of a job. A handler prevents that and,
    # unlike an ignored signal, is not inherited by the training processes.
    run "$PY" -P -c 'import runpy, signal
signal.signal(signal.SIGUSR1, lambda *_: None)
runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)' \
        --nnodes="$NNODES" --nproc-per-node="$gpus" --max-restarts="${MAX_RESTARTS:-0}" \
        --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="moco-${SLURM_JOB_ID:-0}" \
        --rdzv-conf="is_host=$((NODE_RANK == 0))" ${NODE_ADDR:+--local-addr="$NODE_ADDR"} \
        "$script" --config "${@:2}"
    leave "$CODE" "$out"
}

find_nodes() { # sets NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NODE_ADDR; or KIND=srun if that is to do it
    if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${NNODES:-}" ]; then
        NNODES=${SLURM_NNODES:-1}
        # In a step of srun's both numbers agree. They may differ after sbatch from inside another job's step.
        if [ "${SLURM_STEP_NUM_NODES:-}" = "$NNODES" ]; then
            [ "$SLURM_STEP_NUM_TASKS" -eq "$NNODES" ] ||
                fail "srun runs launch.sh $SLURM_STEP_NUM_TASKS times on $NNODES nodes; give it --ntasks-per-node=1"
            NODE_RANK=$SLURM_NODEID
            if [ "$NNODES" -gt 1 ]; then
                MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | sed -n 1p)}
                MASTER_PORT=${MASTER_PORT:-$((10000 + (SLURM_JOB_ID + SLURM_STEP_ID) % 20000))}
                NODE_ADDR=${NODE_ADDR:-$SLURMD_NODENAME}
            fi
        elif [ "$NNODES" -gt 1 ] || [ -z "${SLURMD_NODENAME:-}" ]; then # no name: salloc's shell on a login node
            KIND=srun
        fi
    fi
    NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
    if [ "$NNODES" -eq 1 ]; then # port 0 is a free one, so that two runs on a machine do not meet
        MASTER_ADDR=localhost MASTER_PORT=${MASTER_PORT:-0} NODE_ADDR=localhost
    elif [ "$KIND" != srun ]; then
        [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES needs MASTER_ADDR, the address of node 0"
        MASTER_PORT=${MASTER_PORT:-29500}
        [ "$NODE_RANK" -gt 0 ] || NODE_ADDR=${NODE_ADDR:-$MASTER_ADDR}
    fi
}

folder() { # SCRIPT CONFIG [arguments]: check the settings, print run.out
    "$PY" "$1" --config "${@:2}" --folder
}

run() { # COMMAND ...: start it as the child and wait for its end; sets CODE
    [ -z "$IDLE" ] || leave 75
    # A process group of its own (set -m): what goes to a whole group, as Ctrl-C does, reaches this script only.
    set -m
    "$@" </dev/null &
    CHILD=$!
    set +m
    [ -z "$IDLE" ] || kill "$CHILD" 2>/dev/null || true # a signal between the lines above
    while kill -0 "$CHILD" 2>/dev/null; do
        wait "$CHILD" || true # returns early when a signal has come
    done
    wait "$CHILD" || CODE=$?
}

stop() { # SIGNAL: pass it on to the training, or without any end what was about to start it
    local signal=$1 whom=$CHILD
    case $KIND in
    srun) # passes SIGUSR1 on, but answers SIGTERM by killing all, and one SIGINT by a report
        signal=SIGUSR1
        [ "$1$STOP" != SIGINTSIGINT ] || signal=SIGTERM
        ;;
    torchrun) # would kill the training 30 s after a SIGTERM or SIGINT of its own
        whom=""
        find_workers
        [ -n "$whom" ] || signal=SIGTERM whom=$CHILD IDLE=1
        ;;
    esac
    STOP=${STOP:-$1}
    # shellcheck disable=SC2086
    if [ -n "$CHILD" ]; then kill -s "$signal" $whom 2>/dev/null || true; else IDLE=1; fi
}

find_workers() { # adds to stop's $whom the children of torchrun that lead process groups, unlike tools it calls
    local list pids pid group
    if [ ! -e "/proc/$$/task/$$/children" ]; then
        whom=$(ps -A -o pid=,ppid=,pgid= | awk -v parent="$CHILD" '$2 == parent && $1 == $3 { print $1 }') || true
        return
    fi
    # By `read` alone: a signal to every process of a job would hit a subshell, too.
    for list in "/proc/$CHILD/task/"*/children; do
        pids=""
        read -r pids 2>/dev/null <"$list" || true
        for pid in $pids; do
            read -r _ _ _ _ group _ 2>/dev/null <"/proc/$pid/stat" || continue
            [ "$group" != "$pid" ] || whom="$whom $pid"
        done
    done
}

leave() { # CODE [FOLDER]: exit as the run has ended; one that has stopped and saved leaves a marker in FOLDER
    local code=$1 marker=${2:+$2/stopped.json} reason=$STOP line="" text=""
    if [ -n "$IDLE" ] && [ "$code" -ne 0 ]; then
        code=75 line="stopped by $STOP while nothing was being trained"
    elif [ -f "$marker" ]; then
        read -r text <"$marker" || true
        text=${text#*'"reason": "'}
        code=75 reason=${STOP:-${text%%'"'*}}
        line="stopped ($reason) and saved; the same command resumes the run"
    elif [ "$code" -ne 0 ] && [ -n "$CHILD" ] && [ "$KIND" != python ]; then
        line="error: training has ended with exit code $code, the lines above say why;"
        line="$line the same command resumes from the last checkpoint"
    fi
    # Of a job's many launch.sh that of the batch script speaks and acts.
    [ "${LAUNCHED_BY:-}" != "${SLURM_JOB_ID:-none}" ] || exit "$code"
    [ -z "$line" ] || echo "$line" >&2
    if [ "$reason" = SIGUSR1 ] && [ "$code" -ne 0 ] && [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_NODEID:-0}" -eq 0 ]; then
        scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID cannot be requeued; submit it again" >&2
    fi
    exit "$code"
}

# ---------------------------------------------------------------------------------------------------------

case "${1:-}" in
demo)
    cd "$HERE"
    set_up # it shares the cores out itself, like ablation
    PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH} exec "$PY" -P -m experiments.demo "${@:2}"
    ;;
test)
    cd "$HERE"
    set_up extra
    "$PY" -m ruff check .
    "$PY" -m ruff format --check .
    "$PY" -m pytest "${@:2}"
    ;;
ablation | benchmark)
    set_up
    # -P, or modules in the user's folder would come before the project's. It divides the cores itself.
    PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH} exec "$PY" -P -m "experiments.$1" "${@:2}"
    ;;
compare)
    set_up extra # for its probes and boxes
    PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH} exec "$PY" -P -m experiments.ablation \
        --protocol "$HERE/experiments/configs/compare.yaml" --out runs/compare "${@:2}"
    ;;
pretrain | evaluate | classify | detect)
    launch "$@"
    ;;
*)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$HERE/launch.sh"
    exit 2
    ;;
esac
