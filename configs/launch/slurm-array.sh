#!/bin/bash
# Train the runs of a sweep as an array, one task for each line of COMMANDS.txt:
#   notus sweep CONFIG.yaml --dpo.beta=0.05,0.1,0.3 --print > COMMANDS.txt
#   sbatch --array=1-$(wc -l < COMMANDS.txt) configs/launch/slurm-array.sh COMMANDS.txt
#
# To train each run on N GPUs, print the commands with --nproc-per-node N and request N GPUs. docs/sweeps.md says more.
# Submit it from the folder that the config's paths are relative to, with the Python environment activated.
# Five minutes before the time limit the run saves a checkpoint and exits, and the job is requeued and resumes. Raise
# that margin, and the timeout below it, if a checkpoint of your model takes longer.
#
# Not run on a cluster. tests/test_launch.py runs it with a stand-in for the scheduler.
#SBATCH --job-name=notus-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A-%a.log

export OMP_NUM_THREADS=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270 # seconds that torchrun waits for the checkpoint; torch 2.11 waits for 30

task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # SLURM_JOB_ID of one task is that of the whole array
stopped=0
stop() {
    stopped=1
    scancel --signal=TERM "$task" # reaches the run, not this script
}
trap stop USR1

command=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")
if [[ -z $command ]]; then
    echo "error: $1 has no line $SLURM_ARRAY_TASK_ID" >&2
    exit 1
fi

srun bash -c "exec $command" &
srun_pid=$!
wait "$srun_pid"
code=$?
while kill -0 "$srun_pid" 2> /dev/null; do # a signal ended the wait
    wait "$srun_pid"
    code=$?
done

if ((stopped && code != 0)); then # with code 0 it finished in time
    scontrol requeue "$task"
fi
exit "$code"
