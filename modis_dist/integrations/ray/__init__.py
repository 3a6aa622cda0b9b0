"""Ray: private or existing clusters, packs on Ray Tune, one training on several workers with Ray Train.

Which packs exist and what a pack does is decided in `study` and `execution`. Start with `tune.py`; `private_cluster.py`
starts a loopback-only Ray, `existing_cluster.py` connects to a running one.
"""
