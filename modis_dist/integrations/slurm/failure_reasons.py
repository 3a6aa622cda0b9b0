"""What to do about a job, from what Slurm says of it: why it waits, or how it ended. Pure text."""

import re

HELD = re.compile(r"held|JobHeld(User|Admin)", re.IGNORECASE)
HELD_STATES = ("REQUEUE_HOLD", "SPECIAL_EXIT")
# Reasons that do not pass by waiting, whatever else the queue does; a limit of what runs at once does.
FOREVER = (
    (r"(QOS|Assoc)MaxWall\w*|PartitionTimeLimit", "`time` is more than one job may take; lower it in the profile"),
    (
        r"(QOS|Assoc)Max\w+Per(Job|Node)\w*|QOSMin\w+|MaxMemPerLimit|PartitionNodeLimit",
        "one job may not ask for so much, or so little; change cpus, gpus, memory or nodes in the profile",
    ),
    (r"(QOS|Assoc)Grp(?!\w*Run)\w*Minutes\w*|QOSUsageThreshold", "the hours of the account are used up; name another"),
    (r"BadConstraints", "no node has what is asked for; change constraint, gpus, memory or cpus in the profile"),
    (
        r"InvalidAccount|InvalidQOS|QOSNotAllowed|AccountNotAllowed",
        "account, qos and partition do not go together; mend them in the profile",
    ),
    (r"DependencyNeverSatisfied", "a job before it never ended"),
)
ENDED = {
    "OUT_OF_MEMORY": "out of memory: raise `memory` in the profile",
    "TIMEOUT": "it reached the time limit before it had saved: raise `warning_s`, or `time`, in the profile",
    "DEADLINE": "it could not end before its deadline: raise it in `options`",
}


def why_never(state: str, reason: str) -> str | None:
    """Why a job that waits will not start unless somebody does something, and what; None where waiting may do."""
    said = reason.replace("_", " ")
    if state.startswith(HELD_STATES) or HELD.search(said):
        return f"held ({said or state}): mend what failed, if anything did, then `scontrol release` it"
    for pattern, advice in FOREVER:
        if re.fullmatch(pattern, reason):
            return f"{reason}: {advice}"
    return None


def how_ended(state: str) -> str | None:
    """What to do where a job ended in a state; None where it need not be said."""
    return ENDED.get(state)
