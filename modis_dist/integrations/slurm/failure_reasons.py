"""Fixes for jobs, by Slurm's reason for a pending job or the state in which a job ended."""

import re

HELD = re.compile(r"held|JobHeld(User|Admin)", re.IGNORECASE)
HELD_STATES = ("REQUEUE_HOLD", "SPECIAL_EXIT")
NEVER = (  # permanent reasons, unlike limits on the number of running jobs
    (r"(QOS|Assoc)MaxWall\w*|PartitionTimeLimit", "time exceeds the limit of one job; lower it in the profile"),
    (
        r"(QOS|Assoc)Max\w+Per(Job|Node)\w*|QOSMin\w+|MaxMemPerLimit|PartitionNodeLimit",
        "the request of one job is above or below a limit; change cpus, gpus, memory or nodes in the profile",
    ),
    (
        r"(QOS|Assoc)Grp(?!\w*Run)\w*Minutes\w*|QOSUsageThreshold",
        "the budget of the account is used up; set another account",
    ),
    (r"BadConstraints", "no node satisfies the request; change constraint, gpus, memory or cpus in the profile"),
    (
        r"InvalidAccount|InvalidQOS|QOSNotAllowed|AccountNotAllowed",
        "account, qos and partition do not match; change them in the profile",
    ),
    (r"DependencyNeverSatisfied", "the job that it depends on cannot complete"),
)
FIXES = {  # by the state that a job ended in
    "OUT_OF_MEMORY": "out of memory: raise memory in the profile",
    "TIMEOUT": "time limit reached before a checkpoint was saved: raise warning_s, or time, in the profile",
    "DEADLINE": "deadline reached: raise it in options of the profile",
}


def why_never(state: str, reason: str) -> str | None:
    """Return the reason a pending job will never start unchanged, and the fix; None if it may start."""
    words = reason.replace("_", " ")
    if state.startswith(HELD_STATES) or HELD.search(words):
        return f"held ({words or state}): fix the cause of a failure, if there was one, then run `scontrol release`"
    for pattern, fix in NEVER:
        if re.fullmatch(pattern, reason):
            return f"{reason}: {fix}"
    return None
