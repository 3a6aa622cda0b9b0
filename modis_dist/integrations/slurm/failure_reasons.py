"""Fixes for jobs, from Slurm's words: why a job is pending, or how it ended. Pure text."""

import re

HELD = re.compile(r"held|JobHeld(User|Admin)", re.IGNORECASE)
HELD_STATES = ("REQUEUE_HOLD", "SPECIAL_EXIT")
NEVER = (  # reasons that do not end while the queue moves on; limits of what runs at once do
    (r"(QOS|Assoc)MaxWall\w*|PartitionTimeLimit", "time exceeds the limit of one job; lower it in the profile"),
    (
        r"(QOS|Assoc)Max\w+Per(Job|Node)\w*|QOSMin\w+|MaxMemPerLimit|PartitionNodeLimit",
        "one job may not request so much, or so little; change cpus, gpus, memory or nodes in the profile",
    ),
    (
        r"(QOS|Assoc)Grp(?!\w*Run)\w*Minutes\w*|QOSUsageThreshold",
        "the hours of the account are used up; set another account",
    ),
    (r"BadConstraints", "no node has what is requested; change constraint, gpus, memory or cpus in the profile"),
    (
        r"InvalidAccount|InvalidQOS|QOSNotAllowed|AccountNotAllowed",
        "account, qos and partition do not match; change them in the profile",
    ),
    (r"DependencyNeverSatisfied", "an earlier job never ended"),
)
FIXES = {  # by the state that a job ended in
    "OUT_OF_MEMORY": "out of memory: raise memory in the profile",
    "TIMEOUT": "time limit reached before it had saved: raise warning_s, or time, in the profile",
    "DEADLINE": "deadline reached: raise it in options of the profile",
}


def why_never(state: str, reason: str) -> str | None:
    """Return why a pending job will not start without a change, and the fix; None if it may."""
    words = reason.replace("_", " ")
    if state.startswith(HELD_STATES) or HELD.search(words):
        return f"held ({words or state}): fix the cause of a failure, if there was one, then run `scontrol release`"
    for pattern, fix in NEVER:
        if re.fullmatch(pattern, reason):
            return f"{reason}: {fix}"
    return None
