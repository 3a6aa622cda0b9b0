"""Ray: private or existing clusters, packs on Ray Tune, one training on several workers with Ray Train.

Packs are defined by `study` and trained by `execution`. Start with `tune.py`; `private_cluster.py` starts a
loopback-only Ray, `existing_cluster.py` connects to a running one.
"""
