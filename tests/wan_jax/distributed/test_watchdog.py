"""What the watch concludes from heartbeats, with the time given by the test."""

from wan_jax.distributed import watchdog


def peers(**changes):
    """Three processes heard of at second 100; `changes` are of process 1."""
    known = {p: watchdog.Peer(1, 100.0, f"node{p}", "sampling", 5, 1.0) for p in range(3)}
    for name, value in changes.items():
        setattr(known[1], name, value)
    return known


def verdict(known, answered=100.0, stage_timeout=50.0):
    return watchdog.verdict(known, answered, 109.0, 10.0, stage_timeout)


def test_silence():
    assert verdict(peers()) is None
    found = verdict(peers(at=98.0))
    assert "process 1 on node1" in found and "11 s" in found and "'sampling'" in found
    assert "process 0 on node0" in verdict(peers(at=98.0), answered=98.0)


def test_no_progress():
    stuck = peers(count=4, stage="scores")
    assert verdict(stuck) is None
    for peer in stuck.values():
        peer.seconds = 51.0
    found = verdict(stuck)
    assert "process 1 on node1" in found and "'scores'" in found and "50 s" in found
    assert verdict(stuck, stage_timeout=0) is None


def test_verdicts_of_the_watch():
    assert verdict(peers()) is None
    assert "process 1 on node1" in verdict(peers(at=98.0)) and "'sampling'" in verdict(
        peers(at=98.0)
    )
    assert "process 0 on node0, the coordinator" in verdict(peers(at=98.0), answered=98.0)
    stuck = peers(count=4, stage="scores")
    assert verdict(stuck) is None
    for peer in stuck.values():
        peer.seconds = 51.0
    assert "process 1 on node1 is furthest behind, in 'scores'" in verdict(stuck)
    assert verdict(stuck, stage_timeout=0) is None
