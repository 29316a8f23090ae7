"""Sigma lists against executed numbers, the NumPy reference, and live Diffusers schedulers."""

import numpy as np
import pytest

from tests import reference
from wan_jax.diffusion.schedule import euler_sigmas, flow_sigmas

CURRENT = {  # Diffusers >= 0.37, executed: sigmas to 6 digits without the final 0, and timesteps
    (3, 10): (
        ".999999 .964324 .923166 .875156 .818430 .750375 .667222 .563320 .429795 .251872",
        "999 964 923 875 818 750 667 563 429 251",
    ),
    (3, 20): (
        ".999999 .982776 .964324 .944506 .923166 .900120 .875156 .848024 .818430 .786020 .750375 "
        ".710983 .667222 .618321 .563320 .500999 .429795 .347661 .251872 .138715",
        "999 982 964 944 923 900 875 848 818 786 750 710 667 618 563 500 429 347 251 138",
    ),
    (5, 10): (
        ".999999 .978284 .952438 .921156 .882526 .833611 .769674 .682540 .556788 .359433",
        "999 978 952 921 882 833 769 682 556 359",
    ),
    (5, 20): (
        ".999999 .989594 .978284 .965948 .952438 .937578 .921156 .902913 .882526 .859595 .833611 "
        ".803922 .769674 .729730 .682540 .625936 .556788 .470407 .359433 .211622",
        "999 989 978 965 952 937 921 902 882 859 833 803 769 729 682 625 556 470 359 211",
    ),
}
LEGACY = {  # Diffusers <= 0.36 and the official Wan code, executed
    (3, 10): (
        ".999666 .963941 .922722 .874635 .817810 .749625 .666296 .562148 .428265 .249792",
        "999 963 922 874 817 749 666 562 428 249",
    ),
    (3, 20): (
        None,
        "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136",
    ),
    (5, 10): (
        ".999800 .978048 .952154 .920810 .882093 .833055 .768935 .681508 .555247 .356888",
        "999 978 952 920 882 833 768 681 555 356",
    ),
    (5, 20): (
        None,
        "999 989 978 965 952 937 920 902 882 859 833 803 768 728 681 624 555 468 356 208",
    ),
}
EULER = {
    (3, 10): "1 .960129 .913349 .857692 .790368 .707278 .602151 .464876 .278049 .008929",
    (5, 10): "1 .975743 .946273 .909707 .863132 .801786 .717317 .593619 .395095 .024414",
    (
        3,
        20,
    ): "1 .981875 .962386 .941373 .918652 .894003 .867172 .837855 .805689 .770239 .730974 .687244 "
    ".638240 .582948 .520074 .447944 .364352 .266330 .149787 .008929",
    (
        5,
        20,
    ): "1 .989068 .977136 .964061 .949670 .933753 .916055 .896259 .873967 .848677 .819740 .786306 "
    ".747238 .700981 .645349 .577173 .491668 .381266 .233242 .024414",
}
HIGH_NOISE_STEPS = {  # steps with timestep >= 875, (current, legacy)
    (3, 10): (4, 3),
    (3, 20): (7, 6),
    (3, 40): (13, 12),
    (3, 50): (16, 15),
    (5, 10): (5, 5),
    (5, 20): (9, 9),
    (5, 40): (17, 17),
    (5, 50): (21, 21),
    (12, 10): (7, 7),
    (12, 20): (13, 13),
    (12, 40): (26, 26),
    (12, 50): (32, 32),
}
GRID = [(n, k) for n in (1, 2, 3, 10, 20, 40, 50) for k in (1.0, 3.0, 5.0, 7.5, 12.0)]


def numbers(text):
    return np.array([float(word) for word in text.split()])


@pytest.mark.parametrize(("version", "table"), [("diffusers", CURRENT), ("legacy", LEGACY)])
def test_flow_sigmas_executed_numbers(version, table):
    for (shift, steps), (sigmas, timesteps) in table.items():
        schedule = flow_sigmas(steps, shift, version)
        np.testing.assert_array_equal(schedule.timesteps, numbers(timesteps))
        if sigmas:
            np.testing.assert_allclose(schedule.sigmas[:-1], numbers(sigmas), atol=6e-7)
        assert schedule.sigmas[-1] == 0 and schedule.num_steps == steps
        assert schedule.sigmas.dtype == schedule.timesteps.dtype == np.float32


def test_first_sigma_stays_below_one():
    assert flow_sigmas(20, 3.0).sigmas[0] == np.float32(1 - 1e-6)


def test_euler_sigmas_executed_numbers():
    for (shift, steps), sigmas in EULER.items():
        schedule = euler_sigmas(steps, shift)
        np.testing.assert_allclose(schedule.sigmas[:-1], numbers(sigmas), atol=6e-7)
        np.testing.assert_allclose(schedule.timesteps, 1000 * schedule.sigmas[:-1], rtol=1e-6)
        assert schedule.sigmas[-1] == 0


def test_expert_split():
    for (shift, steps), counts in HIGH_NOISE_STEPS.items():
        for version, count in zip(("diffusers", "legacy"), counts):
            timesteps = flow_sigmas(steps, shift, version).timesteps
            assert np.sum(timesteps >= 875) == count, (shift, steps, version)


@pytest.mark.parametrize("version", ["diffusers", "legacy"])
def test_flow_sigmas_equal_reference(version):
    for steps, shift in GRID:
        schedule = flow_sigmas(steps, shift, version)
        sigmas, timesteps = reference.flow_sigmas(steps, shift, version)
        np.testing.assert_allclose(schedule.sigmas, sigmas, rtol=1e-7)
        # Whole numbers are left out: float64 may hold 666 or 665.9999999999999, which truncation
        # tells apart.
        clear = np.abs(1000 * sigmas[:-1] - np.round(1000 * sigmas[:-1])) > 1e-9
        np.testing.assert_array_equal(schedule.timesteps[clear], np.array(timesteps)[clear])
        assert np.all(np.diff(schedule.sigmas) < 0)


def test_euler_sigmas_equal_reference():
    for steps, shift in GRID:
        ours = euler_sigmas(steps, shift).sigmas
        np.testing.assert_allclose(ours, reference.euler_sigmas(steps, shift), rtol=2e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3.0), "num_steps=0.*1 step"),
        ((1001, 3.0), "num_steps=1001.*1000"),
        ((-4, 3.0), "num_steps=-4"),
        ((10, 0.0), "shift=0.0.*positive"),
        ((10, float("nan")), "shift=nan"),
        ((10, float("inf")), "shift=inf"),
        ((1000, 1e6), r"shift=1000000\.0.*lower"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        flow_sigmas(*arguments)
    if arguments[0] != 1000:
        with pytest.raises(ValueError, match=message):
            euler_sigmas(*arguments)


def test_equal_sigmas_are_refused():
    """Of the legacy list, which has no lowered first sigma that another one could exceed."""
    with pytest.raises(ValueError, match=r"num_steps=1000 .*shift=1000000\.0"):
        flow_sigmas(1000, 1e6, "legacy")


def test_unknown_version():
    with pytest.raises(ValueError, match=r"'old'.*diffusers, legacy"):
        flow_sigmas(10, 3.0, "old")


@pytest.mark.parity
def test_unipc_schedule_is_diffusers():
    from diffusers import UniPCMultistepScheduler

    for steps, shift in GRID:
        peer = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        peer.set_timesteps(steps)
        ours = flow_sigmas(steps, shift)
        # two roundings of float32
        np.testing.assert_allclose(ours.sigmas, peer.sigmas.numpy(), rtol=2e-7)
        np.testing.assert_array_equal(ours.timesteps, peer.timesteps.numpy())


@pytest.mark.parity
def test_euler_schedule_is_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for steps, shift in GRID:
        peer = FlowMatchEulerDiscreteScheduler(shift=shift)
        peer.set_timesteps(steps)
        ours = euler_sigmas(steps, shift)
        # two roundings of float32
        np.testing.assert_allclose(ours.sigmas, peer.sigmas.numpy(), rtol=2e-7)
        np.testing.assert_allclose(ours.timesteps, peer.timesteps.numpy(), rtol=2e-7)
