"""From the rows of a forward pass to the features that are not at rest, and on to the rules.

Latents that did not fire are 0 and cost nothing but the look. A feature is added up latent by
latent in float32, in the order in which `saeguard.features.value` adds them, so that recordings
equal serving to the last bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from saeguard.guard.compiled import compiled
from saeguard.guard.evaluate import advance
from saeguard.guard.scopes import OUTPUT, TEMPLATE
from saeguard.guard.tables import (
    ERROR,
    EVALUATED,
    FEATURES,
    MASSIVE,
    SPECIAL,
    Scratch,
    Tables,
)
from saeguard.guard.watchlist import WatchList

CHUNK = 32
"""Columns that are looked at together: most of them are 0."""
SIGN = 0x7FFFFFFF
"""The bits of a float32 without its sign: those of -0.0 are 0."""


RANGE = np.dtype([("low", "f4"), ("span", "f4"), ("first", "i4"), ("end", "i4")])
"""A feature's calibrated range, and its terms."""
TERM = np.dtype([("column", "i4"), ("weight", "f4")])
NORM = np.dtype([("column", "i4"), ("most", "f4")])
"""The column of a residual's norm, and the norm above which a token is an attention sink."""


class Reads(NamedTuple):
    """Which columns of a forward pass make which features."""

    starts: np.ndarray
    """[columns + 1] int32: where the features of each column begin in `features`."""
    features: np.ndarray
    """[links] int32."""
    ranges: np.ndarray
    """[features] RANGE."""
    terms: np.ndarray
    """[terms] TERM."""
    norms: np.ndarray
    """[bounds] NORM."""


def reads_of(watchlist: WatchList, columns: int) -> Reads:
    """Return which columns of a forward pass make which features of a watch list.

    Args:
        watchlist: the compiled policies.
        columns: of a forward pass.

    Raises:
        ValueError: the rules were compiled for other shares at rest.
    """
    mix, low, span = watchlist.mix, watchlist.low, watchlist.span
    rest = ((np.float32(0) - low) / span).astype(np.float64)
    if not np.array_equal(watchlist.rules.tables.features["rest"], rest):
        raise ValueError("the rules were compiled for other shares at rest than the features have")
    none = np.empty(0, np.intp)
    parts = np.concatenate([none, *(np.arange(len(column)) for column, _ in mix)])
    order = np.argsort(parts, kind="stable")  # feature by feature, its latents in their order
    terms = np.zeros(len(parts), TERM)
    terms["column"] = np.concatenate([none, *(column for column, _ in mix)])[order]
    terms["weight"] = np.concatenate([none, *(weight for _, weight in mix)])[order]
    ends = np.cumsum(np.bincount(parts, minlength=len(low)))
    ranges = np.zeros(len(low), RANGE)
    ranges["low"], ranges["span"], ranges["end"] = low, span, ends
    ranges["first"][1:] = ends[:-1]
    by_column = np.argsort(terms["column"], kind="stable")
    starts = np.searchsorted(terms["column"][by_column], np.arange(columns + 1))
    norms = [(h.norm_column, h.max_norm) for h in watchlist.hooks if h.max_norm < math.inf]
    of_columns = parts[order][by_column].astype(np.int32)
    return Reads(starts.astype(np.int32), of_columns, ranges, terms, np.array(norms, NORM))


def as_given(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Return an array as `ingest_rows` takes it: contiguous, aligned and read-only.

    numba compiles once for each of these properties. Arrays from another process have others than
    those of this one, and a step does not wait for a compilation.
    """
    array = np.asarray(array, dtype)
    if not (array.flags.c_contiguous and array.flags.aligned):
        array = array.copy()
    array = array.view()
    array.flags.writeable = False
    return array


@compiled
def ingest_rows(
    reads: Reads, rules: Tables, s: Any, x: Scratch,
    slots: np.ndarray, query_start: np.ndarray, valid: np.ndarray, positions: np.ndarray,
    roles: np.ndarray, eligible: np.ndarray, f: np.ndarray, ran: bool,
    hits: np.ndarray,
) -> tuple[int, int, bool]:  # fmt: skip
    """Advance requests by the rows of a forward pass.

    A request whose first row is not its next token is passed over: what it skipped comes first.

    Args:
        reads: which columns make which features.
        rules: the compiled policies.
        s: the state.
        x: scratch memory.
        slots: [requests] of each, -1 for a request to pass over.
        query_start: [requests + 1] first row of each request.
        valid: [requests] leading rows that count.
        positions: [rows] int64.
        roles: [rows] uint8 of the prompts' tokens; empty if no policy needs them.
        eligible: [rows] bool.
        f: [rows, columns] float32.
        ran: whether the taps ran.
        hits: [most, 4] int64, memory for the hits; see `advance`.

    Returns:
        The number of hits, that of the requests that were passed over for a gap, and whether all
        rows were read: if not, the hits fill their memory, and another call goes on from there.
    """
    found, late, most = 0, 0, len(rules.policies) + len(rules.on_error)
    for i in range(len(slots)):
        slot = slots[i]
        if slot < 0 or valid[i] == 0:
            continue
        here = s.requests[slot]
        if positions[query_start[i]] > here["next"]:
            late += 1
            continue
        for row in range(query_start[i], query_start[i] + valid[i]):
            t = positions[row]
            if t < here["next"]:  # computed again
                continue
            if found + most > len(hits):
                return found, late, False
            role = OUTPUT
            if t < here["prompt"]:
                role = int(roles[row]) if len(roles) else TEMPLATE
            fate, touched = SPECIAL, 0
            if eligible[row]:
                fate, touched = read_row(reads, rules, x, f[row]) if ran else (ERROR, 0)
            found = advance(
                rules, s, x, slot, t, role, fate, touched, False, hits, found, i
            )  # fmt: skip
            rest_features(rules, x, touched)
    return found, late, True


@compiled
def read_row(reads: Reads, rules: Tables, x: Scratch, f: np.ndarray) -> tuple[int, int]:
    """List the features that a row moves away from rest.

    Returns:
        What became of the token, and the number of these features.
    """
    n, finite = find_fired(reads, x, f)
    fate = EVALUATED if finite else ERROR
    for i in range(len(reads.norms) if finite else 0):
        if f[reads.norms[i]["column"]] > reads.norms[i]["most"]:
            fate = MASSIVE
    left = 0
    for i in range(n):
        j = x.lists[FEATURES, i]
        x.marked[FEATURES, j] = False
        if fate == EVALUATED:
            share = share_of(reads, f, j)
            if share != rules.features[j]["rest"]:
                x.shares[j] = share
                x.lists[FEATURES, left] = j
                left += 1
    return fate, left


@compiled
def find_fired(reads: Reads, x: Scratch, f: np.ndarray) -> tuple[int, bool]:
    """List the features of the columns that are not 0.

    Returns:
        Their number, and whether all columns are finite.
    """
    bits, n, finite = f.view(np.int32), 0, True
    for start in range(0, len(bits), CHUNK):
        end, fired = min(start + CHUNK, len(bits)), np.int32(0)
        for column in range(start, end):
            fired = np.int32(fired | bits[column])
        if fired & SIGN:
            for column in range(start, end):
                if bits[column] & SIGN:
                    finite = finite and np.isfinite(f[column])
                    n = touch_features(reads, x, column, n)
    return n, finite


@compiled
def touch_features(reads: Reads, x: Scratch, column: int, n: int) -> int:
    """Add the features of a column to the list of `n`."""
    for link in range(reads.starts[column], reads.starts[column + 1]):
        j = reads.features[link]
        if not x.marked[FEATURES, j]:
            x.marked[FEATURES, j] = True
            x.lists[FEATURES, n] = j
            n += 1
    return n


@compiled
def share_of(reads: Reads, f: np.ndarray, j: int) -> float:
    """Return a feature's share of a row; float32 throughout."""
    here = reads.ranges[j]
    term = reads.terms[here["first"]]
    value = f[term["column"]] * term["weight"]
    for i in range(here["first"] + 1, here["end"]):
        term = reads.terms[i]
        value += f[term["column"]] * term["weight"]
    return (value - here["low"]) / here["span"]


@compiled
def rest_features(rules: Tables, x: Scratch, touched: int) -> None:
    """Set the listed features back to rest."""
    for i in range(touched):
        j = x.lists[FEATURES, i]
        x.shares[j] = rules.features[j]["rest"]


@compiled
def advance_text(
    rules: Tables, s: Any, x: Scratch, roles: np.ndarray, fates: np.ndarray,
    shares: np.ndarray, hits: np.ndarray, e: np.ndarray, scores: np.ndarray, values: np.ndarray,
) -> None:  # fmt: skip
    """Advance the request in slot 0 by all of its tokens, whose shares are given.

    Args:
        rules: the compiled policies.
        s: the state.
        x: scratch memory.
        roles: [tokens] uint8.
        fates: [tokens] uint8.
        shares: [tokens, features] float64.
        hits: [most, 4] int64, memory for the hits of a token, which are dropped.
        e: [tokens, P] evidence, to be written; empty if it is not asked for.
        scores: [tokens, P] to be written; empty if they are not asked for.
        values: [tokens, traces] that are compared, to be written; NaN where nothing looks; empty
            if they are not asked for.
    """
    everything = len(e) > 0
    for t in range(len(fates)):
        touched = 0
        for j in range(shares.shape[1]):
            if shares[t, j] != rules.features[j]["rest"]:
                x.shares[j] = shares[t, j]
                x.lists[FEATURES, touched] = j
                touched += 1
        advance(
            rules, s, x, 0, t, int(roles[t]), int(fates[t]), touched, everything, hits, 0, 0
        )  # fmt: skip
        if everything:
            for p in range(len(x.scores)):
                e[t, p] = x.evidence[p]
                scores[t, p] = x.scores[p]
            for trace in range(len(x.compared)):
                values[t, trace] = x.compared[trace]
                x.compared[trace] = np.nan
        rest_features(rules, x, touched)
