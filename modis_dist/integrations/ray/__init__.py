"""Ray: private or existing clusters, packs on Ray Tune, one training on several workers by Ray Train.

Which packs exist and what a pack does is decided in `study` and `execution`. Start with `tune.py`; `private_cluster.py`
starts a loopback-only Ray, `existing_cluster.py` joins a running one.
"""
