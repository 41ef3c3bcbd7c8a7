#!/usr/bin/env bash
# A training run on Slurm: a Ray cluster in the allocation, one node of Ray on each machine, and a job submitted to it.
#
#   sbatch infra/slurm/train.sh
#
# The cluster ends with the job. When the time limit or a preemption is near, the training is stopped while its machines
# are still there, keeps a last checkpoint, and the job goes into the queue again: the same script goes on from there,
# because the run's name is the same.
#SBATCH --job-name=tmad-places
#SBATCH --nodes=2                      # CHANGE ME: machines; training takes GPUS_PER_NODE on each
#SBATCH --ntasks-per-node=1            # one `ray start` on each
#SBATCH --cpus-per-task=16             # CHANGE ME: processors of a machine
#SBATCH --gpus-per-task=2              # CHANGE ME: GPUs of a machine, as GPUS_PER_NODE below
#SBATCH --mem=64G                      # CHANGE ME: 30 % of it become Ray's object store
#SBATCH --time=24:00:00
#SBATCH --requeue                      # after a preemption or a lost machine; the time limit is this script's business
#SBATCH --open-mode=append             # one log, however often it goes on
#SBATCH --signal=B:TERM@180            # three minutes before the end, to this script alone: a step, a last checkpoint
#SBATCH --output=%x-%j.log
set -euo pipefail

# ── everything else that depends on you ──────────────────────────────────────────────────────────────────────
VENV=${VENV:-$PWD/.venv}               # CHANGE ME: made with `make setup` in a folder that all machines see
GPUS_PER_NODE=2                        # CHANGE ME: as --gpus-per-task
RUNS=${RUNS:-$PWD/runs}                # CHANGE ME: a folder that all machines see, or s3://...
TRAIN=${TRAIN:-$PWD/data/places/train} # CHANGE ME: the prepared sets, likewise
VAL=${VAL:-$PWD/data/places/val}
JOB=(python jobs/train_places.py --preset places --name places --runs "$RUNS"
     --data.train "$TRAIN" --data.val "$VAL" --workers.num-workers "$((SLURM_JOB_NUM_NODES * GPUS_PER_NODE))")
# Storage and tracking (AWS_*, MLFLOW_TRACKING_URI) come from the environment that sbatch was called in.

# shellcheck source=/dev/null
source "$VENV/bin/activate"
# Each allocation has a token and ports of its own: other jobs may share the machines.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0
# What `ray job stop` gives a training for its last checkpoint, three seconds otherwise; longer than workers.stop_grace_s.
export RAY_JOB_STOP_WAIT_TIME_S=120
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
PORT=$((20000 + SLURM_JOB_ID % 10000))
DASHBOARD=$((PORT + 10000))
API=http://127.0.0.1:$DASHBOARD
ID=tmad-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${HOSTS[0]}
ADDRESS=$(srun --nodes=1 --ntasks=1 --nodelist="$HEAD" hostname --ip-address | awk '{print $1}')

STEPS=()
SUBMISSION=""
finish() {
    trap - EXIT TERM INT
    # Our own steps, by their ids; `ray stop` would end every Ray on the machines.
    [ ${#STEPS[@]} -eq 0 ] || kill -TERM "${STEPS[@]}" 2>/dev/null || true
    wait || true
}
again() {  # into the queue, once the training has ended in order
    trap '' TERM
    if [ -n "$SUBMISSION" ]; then
        ray job stop --address "$API" "$ID" || true
        wait "$SUBMISSION" || true
    fi
    scontrol requeue "$SLURM_JOB_ID"
    exit 143
}
trap finish EXIT
trap again TERM
trap 'exit 130' INT

node() {  # node HOST ARGUMENT...: one node of Ray, in the background
    local host=$1
    shift
    # A step does not take --cpus-per-task over from the job.
    srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodelist="$host" --overlap \
        ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$GPUS_PER_NODE" "$@" &
    STEPS+=($!)
}

node "$HEAD" --head --node-ip-address="$ADDRESS" --port="$PORT" --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD"
for host in "${HOSTS[@]:1}"; do
    node "$host" --address="$ADDRESS:$PORT"
done

# The job waits for the machines that are still coming (workers.start_timeout_s). This script runs on the first machine.
for attempt in $(seq 60); do
    ray job list --address "$API" >/dev/null 2>&1 && break
    [ "$attempt" -lt 60 ] || { echo "no answer from Ray at $API; its lines are above" >&2; exit 1; }
    sleep 2
done
ray job submit --address "$API" --submission-id "$ID" --working-dir . -- "${JOB[@]}" &
SUBMISSION=$!
wait "$SUBMISSION"
