"""The folder of a submission inside an output folder. Imported by commands that start without torch."""

from pathlib import Path

FOLDER = "submission"
RECORD, PROFILE, STUDY = "submission.json", "cluster.yaml", "study.yaml"  # as submitted


def folder_of(out: Path) -> Path:
    """Return the folder of the submission inside an output folder."""
    return out / FOLDER


def is_submitted(out: Path) -> bool:
    """Return whether a study was submitted from an output folder."""
    return (folder_of(out) / RECORD).exists()
