"""Peers, run from their packages: each writes its own files and restores the model from them."""

from bench.quality.peers import deltatensors, lossless, mergekit, sparse_llm
from bench.quality.peers.disk import Peer

#: In the order in which they are measured.
PEERS: dict[str, Peer] = {
    peer.label: peer
    for peer in (
        deltatensors.SPARSE,
        deltatensors.ONE_BIT,
        deltatensors.INT4,
        sparse_llm.LOW_RANK,
        sparse_llm.SPARSE,
        sparse_llm.INT8,
        mergekit.DARE,
        *lossless.LOSSLESS,
    )
}

__all__ = ["PEERS", "Peer"]
