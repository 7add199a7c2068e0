# SPDX-License-Identifier: MIT
"""What a language model has to beat: general compressors, and counting."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
from collections.abc import Callable

import numpy as np
from torch import Tensor


def _xz(data: bytes) -> bytes:
    """Compress at the highest effort, with the smallest dictionary preset that holds it all.

    Presets 6 to 9 differ in nothing else: 8, 16, 32 and 64 MiB; the largest takes half a gigabyte
    of memory whatever the length.
    """
    preset = next((p for p in (6, 7, 8) if len(data) <= 2 ** (p + 17)), 9)
    return lzma.compress(data, preset=preset | lzma.PRESET_EXTREME)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "bzip2": lambda data: bz2.compress(data, 9),
    "xz": _xz,
}
"""At their highest settings."""

NGRAM_ORDER = 6
_LARGEST = 2**62


def compressed_bits(train: str, test: str) -> dict[str, float]:
    """Return for each compressor how many bits the test text adds to the training text.

    That is 8 (len(compress(train + test)) - len(compress(train))), in UTF-8. A compressor sees
    of the training text what its window holds: gzip 32 KiB, bzip2 blocks of 900 kB, xz 64 MiB.

    Args:
        train: what the model learned from.
        test: what it is judged by.
    """
    before, whole = train.encode(), (train + test).encode()
    return {
        name: 8.0 * (len(compress(whole)) - len(compress(before)))
        for name, compress in COMPRESSORS.items()
    }


def ngram_bits(train: Tensor, test: Tensor, size: int, order: int = NGRAM_ORDER) -> list[float]:
    """Return the bits of a text by counting, with up to 0, 1, ... ``order`` tokens of context.

    Each order interpolates with the one below after Witten and Bell: with c occurrences of a
    context, followed by r different tokens, p(x) = (c(x) + r p_below(x)) / (c + r); below order 0
    stands 1 / size. Counts are of the training text alone.

    Args:
        train: (n,) int64 tokens.
        test: (m,) int64 tokens; the first ones have shorter contexts.
        size: number of tokens.
        order: the largest; fewer come back where numbers of contexts would pass 64 bits.

    Returns:
        Total bits of ``test`` for every order from 0.

    Source: Witten and Bell 1991, IEEE Transactions on Information Theory 37(4), method C; as an
    interpolation: Chen and Goodman 1996, arXiv:cmp-lg/9606011.
    """
    order = min(order, int(math.log(_LARGEST, max(size, 2))) - 1)
    learned, judged = train.numpy(), test.numpy()
    p = np.full(len(judged), 1.0 / size)
    found: list[float] = []
    grams, seen = learned.copy(), judged.copy()
    for k in range(order + 1):
        if k:  # codes of the k + 1 tokens that end here
            grams = learned[k:] + size * grams[:-1] if len(grams) > 1 else grams[:0]
            seen = judged[k:] + size * seen[:-1] if len(seen) > 1 else seen[:0]
        codes, counts = np.unique(grams, return_counts=True)
        contexts, first, followers = np.unique(codes // size, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first) if len(first) else counts
        c_x = _look_up(codes, counts, seen)
        c, r = (_look_up(contexts, values, seen // size) for values in (totals, followers))
        below = p[k:]
        p = p.copy()
        p[k:] = np.where(c > 0, (c_x + r * below) / np.maximum(c + r, 1), below)
        found.append(float(-np.log2(p).sum()))
    return found


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the value of each wanted key, 0 where there is none; keys are sorted."""
    if not len(keys):
        return np.zeros(len(wanted))
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0).astype(np.float64)
