"""Random streams: distinct, and the draws of earlier versions, by which runs resume."""

import itertools
import types

import jax
import numpy as np

from grpo.data.prompts import epoch_prompts
from grpo.learning.finished_batch import LEAST_LEVEL
from grpo.learning.sde_windows import group_steps, sde_window
from grpo.methods.nft import NFT
from grpo.random_streams import LARGEST, Stream
from grpo.rollout import initial_noise
from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.schedule import flow_sigmas

SEED, EPOCH = 3, 7


def test_streams_are_distinct():
    """No two with one number at one place, and no first draws alike."""
    assert len(Stream) == len(Stream.__members__)  # an equal value would be an alias
    host = [stream for stream in Stream if stream.value[0] == "host"]
    keys = [stream for stream in Stream if stream.value[0] != "host"]
    for a, b in itertools.combinations(host, 2):
        draws = [stream.generator(SEED, EPOCH).integers(2**63, size=4) for stream in (a, b)]
        assert not np.intersect1d(*draws).size, (a, b)
    root = jax.random.key(SEED)
    by_place = {}
    for stream in keys:
        bits = tuple(jax.random.bits(stream.key(root), 4).tolist())
        assert bits not in by_place.setdefault(stream.value[0], {}), stream
        by_place[stream.value[0]][bits] = stream
    # of a host stream: epochs, further numbers and the whole run
    numbers = [(None,), (EPOCH,), (EPOCH + 1,), (EPOCH, 1), (EPOCH, 2)]
    firsts = {int(Stream.SDE_WINDOW.generator(SEED, *n).integers(2**63)) for n in numbers}
    assert len(firsts) == len(numbers)


def test_reserved_indices_are_above_all_steps_and_videos():
    """They are folded in where denoising steps and numbers of videos are, int32 both."""
    assert Stream.INITIAL_NOISE.index == Stream.RENOISING.index == LARGEST == np.iinfo(np.int32).max
    assert Stream.PROBES.index == LARGEST - 1


def test_host_draws_are_those_of_earlier_versions():
    def generator(*numbers):
        return np.random.default_rng([SEED, *numbers])

    order = [epoch_prompts(SEED, epoch, 10, 5) for epoch in range(4)]
    for turn in range(2):
        wanted = generator(turn, 0x960).permutation(10)
        np.testing.assert_array_equal(np.concatenate(order[2 * turn : 2 * turn + 2]), wanted)

    wanted = generator(EPOCH, 0x5DE).choice(np.arange(2, 12), 4, replace=False)
    np.testing.assert_array_equal(sde_window(SEED, EPOCH, 4, 2, 12), np.sort(wanted))
    wanted = generator(EPOCH, 0x5DE, 1).choice(np.arange(2, 12), 4, replace=False)
    np.testing.assert_array_equal(sde_window(SEED, EPOCH, 4, 2, 12, 1), np.sort(wanted))

    rng = generator(EPOCH, 0x150)
    at = ((np.arange(6) + rng.random()) * 8 / 6).astype(int)
    np.testing.assert_array_equal(
        group_steps(SEED, EPOCH, [6], [range(4, 12)]), rng.permutation(4 + at)
    )

    schedule = flow_sigmas(20, 3.0)
    spec = types.SimpleNamespace(
        recipe=types.SimpleNamespace(seed=SEED),
        settings=types.SimpleNamespace(videos=5),
        windows=types.SimpleNamespace(quotas=(4,)),
        segments=(Segment(0, range(20)),),
        schedule=schedule,
    )
    levels = NFT().noise_levels(spec, EPOCH, 0)
    share = (np.arange(4) + generator(EPOCH, 0xF0A, 0).random((5, 4))) / 4
    np.testing.assert_array_equal(levels.sigma, schedule.sigmas[(share * 20).astype(int)])
    assert LEAST_LEVEL == 1e-3

    wanted = np.random.default_rng([SEED, 0x4EAD]).permutation(9)
    np.testing.assert_array_equal(Stream.REWARD_HEAD.generator(SEED).permutation(9), wanted)

    for stream, number in ((Stream.DATA_ORDER, 0xDA7A), (Stream.DATA_LEVEL, 0xDA1E)):
        found = stream.generator(SEED, EPOCH, 1).random(4)
        np.testing.assert_array_equal(found, generator(EPOCH, number, 1).random(4))


def test_keys_are_those_of_earlier_versions():
    def same(a, b):
        np.testing.assert_array_equal(*(jax.random.key_data(key) for key in (a, b)))

    root, fold = jax.random.key(SEED), jax.random.fold_in
    streams = ("ADAPTERS", "ROLLOUT", "SECOND_ADAPTERS", "DATA_NOISE", "HEAD_REFIT")
    for number, name in enumerate(streams):
        same(Stream[name].key(root), fold(root, number))
    epoch = fold(fold(root, 1), EPOCH)
    same(Stream.RENOISING.key(epoch), fold(epoch, 2**31 - 1))
    same(Stream.PROBES.key(epoch), fold(epoch, 2**31 - 2))
    noise = initial_noise(epoch, np.arange(2, dtype=np.int32), (1, 2, 2, 3))
    for video in range(2):
        key = fold(fold(epoch, video), 2**31 - 1)
        np.testing.assert_array_equal(noise[video], jax.random.normal(key, (1, 2, 2, 3)))
