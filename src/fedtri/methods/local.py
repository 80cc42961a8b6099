"""Local: every client trains alone and nothing travels; the floor a federation has to beat."""

from fedtri.method import AdapterSpec, Method, Paper, Plan

PAPER = Paper("Local only")
ADAPTER = AdapterSpec(bases=("kaiming", "orthonormal", "weights"))


def local() -> Method:
    """Learns A, B and H; sends and receives nothing."""
    return Method("local", PAPER, lambda _: Plan.of(train="ABH"), lambda state, replies: state, adapter=ADAPTER)
