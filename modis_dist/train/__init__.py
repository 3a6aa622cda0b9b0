"""Training in one process: preparation, loop, checkpoints, evaluation, prediction. Knows no ray, mlflow or submitit."""
