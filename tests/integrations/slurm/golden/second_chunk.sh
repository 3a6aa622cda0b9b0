#!/bin/bash
# Study toy, packs 1000-1001,1005,1009-1011 of submission/submission.json; written by modis-dist 1.2.3.
#SBATCH --job-name=toy
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --output=logs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --array=0-1,5,9-11%10
umask 077
trap '' USR1  # until Python handles it
touch "status/pack-$((1000 + SLURM_ARRAY_TASK_ID)).starting"
set -e
[ -d "${TMPDIR:-/tmp}" ] || unset TMPDIR  # set by the submitting machine
exec python3 -m modis_dist job array /scratch/me/toy "$((1000 + SLURM_ARRAY_TASK_ID))"
