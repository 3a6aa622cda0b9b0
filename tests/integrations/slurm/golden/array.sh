#!/bin/bash
# Study toy, packs 0-3,7 of submission/submission.json; written by modis-dist 1.2.3.
#SBATCH --job-name=toy
#SBATCH --partition=gpu_p13
#SBATCH --account=abc@v100
#SBATCH --qos=qos_gpu-t3
#SBATCH --constraint=v100-32g
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=10
#SBATCH --gres=gpu:v100:1,lscratch:100
#SBATCH --mem=40G
#SBATCH --time=1-20:00:00
#SBATCH --hint=nomultithread
#SBATCH --exclude=n[7-9]
#SBATCH --output=logs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --array=0-3,7%4
umask 077
trap '' USR1  # until Python handles it
touch "status/pack-$((0 + SLURM_ARRAY_TASK_ID)).starting"
set -e
module purge
module load python/3.11 cuda
source "$HOME/modis/bin/activate"
export TMPDIR="${JOBSCRATCH:?not set on this node, used by scratch of the profile}/tmp"
mkdir -p "$TMPDIR"
exec python3 -m modis_dist job array /scratch/me/toy "$SLURM_ARRAY_TASK_ID"
