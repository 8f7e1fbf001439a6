"""Affinity without shared state: weighted rendezvous hashing with bounded loads."""

from __future__ import annotations

import random

import numpy as np

from blaze.routing.columns import Columns, Floats, Hashes, Places
from blaze.routing.least import LeastConnections
from blaze.routing.strategy import Ask, Pick

BALANCE = 1.25  # of a replica's fair share of what is in flight


class IPHash:
    """A key's replica is the one with the largest ``weight / -ln(hash(key, replica))`` that has room.

    Every router gives the same answer, and a replica that leaves moves its own keys alone (Thaler &
    Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998; weights after Schindelhauer &
    Schomaker, 2005). Room: less in flight than 1.25 times its share, rounded up (Mirrokni, Thorup &
    Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2018), so that a popular key spills over to the
    next one in its order; of this router's requests, for those of others are known too late. Slow start is
    not for it, or keys would move while a replica warms up. A request without a key goes where the fewest
    are in flight.
    """

    name = "ip_hash"
    wants_credit = False
    binds_late = False

    def __init__(self, rng: random.Random, *, routers: int = 1) -> None:
        self._without_key = LeastConnections(rng, routers=routers)

    def choose(self, columns: Columns, eligible: Places, ask: Ask) -> Pick | None:
        if ask.key is None or not len(eligible):
            return self._without_key.choose(columns, eligible, ask)
        weight, in_flight = columns.weight[eligible], columns.in_flight_here[eligible]
        scores = weight / -np.log(unit(mixed(columns.hashes[eligible], ask.key)))
        room = np.ceil(BALANCE * (in_flight.sum() + 1) * weight / weight.sum())
        scores[in_flight >= room] = 0.0  # somebody always has room: the rooms add up to more than there is
        return Pick(columns.ids[eligible[scores.argmax()]])


def mixed(hashes: Hashes, key: int) -> Hashes:
    """64 bits for each pair: the finalizer of SplitMix64 (Steele, Lea & Flood, 2014)."""
    x = (hashes ^ np.uint64(key)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def unit(hashes: Hashes) -> Floats:
    """Numbers between 0 and 1, neither of them included."""
    high = (hashes >> np.uint64(12)).astype(np.float64)
    return (high + 0.5) * 2.0**-52  # exact: 53 bits in all
