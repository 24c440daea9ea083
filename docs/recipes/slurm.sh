#!/bin/bash
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=01:00:00
# A job of Slurm whose machines are a cluster while program.py runs: sbatch slurm.sh
#
# dpool must be installed where all machines find it, and the home directory shared. The program needs no change.
# srun is told the CPUs again: newer ones do not take them from the batch script.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" dpool run -- python program.py
