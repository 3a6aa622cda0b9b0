"""Selection of ids by the rank of a keyed hash, independent of the order of rows.

Selections are exact and nested: the first 10 % are among the first 50 %. A key identifies the purpose of a selection.
"""

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from modis_dist.data.store.index import Strings


def key_of(*parts: str | int | None) -> str:
    """Combine several parts into one key; different parts give different keys."""
    return json.dumps(parts)


def ranks(ids: Strings, *, key: str) -> NDArray[np.int64]:
    """Return the rank 0..n-1 of each id, shape [n], by its BLAKE2b hash with ``key``.

    The hash depends on (id, key) only: the order of the ids does not matter, and leaving some out does not change the
    order of the others. Equal ids get consecutive ranks, in their order.
    """
    # BLAKE2b keys have at most 64 bytes; class names may be longer.
    secret = hashlib.blake2b(key.encode()).digest()
    digests = (hashlib.blake2b(str(name).encode(), key=secret, digest_size=8).digest() for name in ids)
    hashes = np.fromiter((int.from_bytes(digest) for digest in digests), dtype=np.uint64, count=len(ids))
    rank = np.empty(len(ids), dtype=np.int64)
    rank[np.argsort(hashes, kind="stable")] = np.arange(len(ids))
    return rank
