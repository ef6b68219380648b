#!/bin/bash
# Two machines with eight GPUs each: sbatch examples/slurm.sh my_recipe.yaml
#SBATCH --job-name=foveate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=B:TERM@300
set -euo pipefail
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
address() { srun --nodes=1 --ntasks=1 -w "$1" hostname --ip-address | awk '{print $1}'; }
head=$(address "${nodes[0]}")

srun --nodes=1 --ntasks=1 -w "${nodes[0]}" foveate cluster up --host "$head" --block &
sleep 20
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 -w "$node" foveate cluster join "$head:6379" --host "$(address "$node")" --block &
done
sleep 20

# In the foreground of the head, so that SIGTERM before the time limit saves the run.
RAY_ADDRESS="$head:6379" foveate rl "$1" cluster.nodes="$SLURM_NNODES" cluster.gpus_per_node=8 &
run=$!
trap 'kill -TERM $run; wait $run' TERM
wait $run
