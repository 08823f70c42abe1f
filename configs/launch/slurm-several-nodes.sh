#!/bin/bash
# Train on all GPUs of several nodes:
#   sbatch --nodes=2 configs/launch/slurm-several-nodes.sh dpo configs/notus-7b-v1/dpo-full-8xa100-40gb.yaml \
#     --training.sharding=hybrid [--section.key=value ...]
#
# training.output_dir must be on a disk that all nodes share; docs/several-machines.md says more.
# Submit it from the folder that the config's paths are relative to, with the Python environment activated.
# Five minutes before the time limit the run saves a checkpoint and exits, and the job is requeued and resumes. Raise
# that margin, and the timeout below it, if a checkpoint of your model takes longer.
#
# Not run on a cluster. tests/test_launch.py runs it with a stand-in for the scheduler.
#SBATCH --job-name=notus
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

export OMP_NUM_THREADS=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270 # seconds that torchrun waits for the checkpoint; torch 2.11 waits for 30

stopped=0
stop() {
    stopped=1
    scancel --signal=TERM "$SLURM_JOB_ID" # reaches torchrun, not this script
}
trap stop USR1

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a node whose processes were lost can join again (torch 2.13)
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node get different ones

srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$head_node:$port" --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-conf=join_timeout=3600 -m notus "$@" &
srun_pid=$!
wait "$srun_pid"
code=$?
while kill -0 "$srun_pid" 2> /dev/null; do # a signal ended the wait
    wait "$srun_pid"
    code=$?
done

if ((stopped && code != 0)); then # with code 0 it finished in time
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
