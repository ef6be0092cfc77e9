#!/bin/bash
# Trains one model on two machines with four GPUs each:
#
#     sbatch examples/slurm.sh data/mosi runs/mosi
#
# DATA and OUT lie on a file system that both machines see. If a process dies, torchrun restarts all of them, and the
# run goes on from its last checkpoint. If Slurm stops the job (--requeue), the same script goes on, too.
#SBATCH --job-name=engine
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120

set -euo pipefail

DATA=${1:?the data, such as data/mosi}
OUT=${2:?the run folder, such as runs/mosi}
shift 2

GPUS_PER_NODE=4
# The first machine of the job is where all processes meet.
MEET=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))

export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / GPUS_PER_NODE))

# --resume begins a run in an empty folder, and goes on with one after a restart.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="$GPUS_PER_NODE" \
    --max-restarts=3 \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$MEET:$PORT" \
    --rdzv-id="$SLURM_JOB_ID" \
    -m engine train --preset mosi --data "$DATA" --out "$OUT" --resume batch_size=256 "$@"
