#!/bin/bash
# Study toy, all trials, selection, refit and test on the nodes of this job; written by modis-dist 1.2.3.
#SBATCH --job-name=toy
#SBATCH --partition=gpu_p13
#SBATCH --account=abc@v100
#SBATCH --qos=qos_gpu-t3
#SBATCH --constraint=v100-32g
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=10
#SBATCH --gres=gpu:v100:8,lscratch:100
#SBATCH --mem=40G
#SBATCH --time=1-20:00:00
#SBATCH --hint=nomultithread
#SBATCH --exclude=n[7-9]
#SBATCH --output=logs/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
umask 077
trap '' USR1  # until Python handles it
touch "status/allocation.starting"
set -e
module purge
module load python/3.11 cuda
source "$HOME/modis/bin/activate"
export TMPDIR="${JOBSCRATCH:?not set on this node, used by scratch of the profile}/tmp"
mkdir -p "$TMPDIR"
exec singularity exec 'my image.sif' python -m modis_dist job allocation /scratch/me/toy
