"""Choosing by keyed hash: which ids come first is decided by the ids alone, never by the order of rows.

Counts chosen this way are exact and nest: the first 10 % are among the first 50 %. Knows nothing of splits,
scenarios or modalities; what a choice is for is told by its key.
"""

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from modis_dist.data.store.index import Strings


def key_of(*parts: str | int | None) -> str:
    """One key from several parts; different parts never give the same key."""
    return json.dumps(parts)


def ranks(ids: Strings, *, key: str) -> NDArray[np.int64]:
    """Rank 0..n-1 of each id among the given ids, shape [n], by a BLAKE2b hash of the id keyed with ``key``.

    The hash is a pure function of (id, key). So the order of the ids does not matter, and leaving some out never
    changes the order of the others. Equal ids get consecutive ranks, in their order.
    """
    # BLAKE2b takes keys of at most 64 bytes, class names may be longer.
    secret = hashlib.blake2b(key.encode()).digest()
    digests = (hashlib.blake2b(str(one).encode(), key=secret, digest_size=8).digest() for one in ids)
    hashes = np.fromiter((int.from_bytes(digest) for digest in digests), dtype=np.uint64, count=len(ids))
    rank = np.empty(len(ids), dtype=np.int64)
    rank[np.argsort(hashes, kind="stable")] = np.arange(len(ids))
    return rank
