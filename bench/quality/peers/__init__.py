"""Peers, run from their packages: each writes its own files and restores the model from them."""

from bench.quality.peers.deltatensors import INT4, ONE_BIT, SPARSE
from bench.quality.peers.disk import Peer

PEERS: dict[str, Peer] = {peer.label: peer for peer in (SPARSE, ONE_BIT, INT4)}

__all__ = ["PEERS", "Peer"]
