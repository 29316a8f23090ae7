"""An independent float64 NumPy reference of the mathematics, written from the papers' formulas.

Imports nothing of this project. Slow and plain on purpose: loops over steps, groups and rows,
linear systems instead of closed forms. B videos, T denoising steps.
"""

import math

import numpy as np


# Schedules ----------------------------------------------------------------------------------------
def shifted(u, shift):
    return shift * u / (1 + (shift - 1) * u)


def flow_sigmas(num_steps, shift, version="diffusers"):
    """sigmas [T+1] float64 and integer timesteps [T], one sigma at a time."""
    first, last = (1.0, 0.001) if version == "diffusers" else (0.999, 0.0)
    sigmas = [shifted(first + (last - first) * i / num_steps, shift) for i in range(num_steps)]
    if version == "diffusers":
        sigmas[0] -= 1e-6
    return np.array([*sigmas, 0.0]), [int(1000 * s) for s in sigmas]


def euler_sigmas(num_steps, shift):
    """sigmas [T+1] float64; the timesteps are 1000 sigmas."""
    smallest = shifted(0.001, shift)
    grid = (
        [1.0]
        if num_steps == 1
        else [1 + (smallest - 1) * i / (num_steps - 1) for i in range(num_steps)]
    )
    return np.array([*(shifted(u, shift) for u in grid), 0.0])


# Solvers ------------------------------------------------------------------------------------------
def euler(x, velocity, sigmas):
    """All samples of a run [T+1, ...]; velocity(x, i)."""
    xs = [x]
    for i in range(len(sigmas) - 1):
        xs.append(xs[-1] + (sigmas[i + 1] - sigmas[i]) * velocity(xs[-1], i))
    return np.array(xs)


def _log_snr(s):
    return math.inf if s == 0 else math.log(1 - s) - math.log(s)


def _unipc_sum(sigmas, start, end, others, m_start, ms, rhos):
    """The second term of x' = s'/s x - (1 - s') (e^-h - 1) (m_start + sum_k rho_k (m_k - m_start) /
    r_k).
    """
    h = _log_snr(sigmas[end]) - _log_snr(sigmas[start])
    total = m_start
    for index, m, rho in zip(others, ms, rhos):
        r = (_log_snr(sigmas[index]) - _log_snr(sigmas[start])) / h
        total = total + rho * (m - m_start) / r
    return -(1 - sigmas[end]) * math.expm1(-h) * total


def _unic_rhos(sigmas, start, end, others):
    """The weights of all points, the new one (r = 1) included: sum_k rho_k r_k^(n-1) = b_n for each
    n.
    """
    h = _log_snr(sigmas[end]) - _log_snr(sigmas[start])
    r = np.array([(_log_snr(sigmas[k]) - _log_snr(sigmas[start])) / h for k in others])
    k, hh = len(others), -h
    phi = math.expm1(hh) / hh - 1  # hh phi_2(hh); then phi <- phi / hh - 1 / n!
    rows, b = [], []
    for n in range(1, k + 1):
        rows.append(r ** (n - 1))
        b.append(phi * math.factorial(n) / math.expm1(hh))
        phi = phi / hh - 1 / math.factorial(n + 1)
    return np.linalg.solve(np.array(rows), np.array(b))


def unipc(x, velocity, sigmas, order=2):
    """UniPC with data prediction and B(h) = e^h - 1 (arXiv 2302.04867): samples [T+1, ...]."""
    steps = len(sigmas) - 1
    xs, ms, x_last, last_order = [x], [], None, None
    for i in range(steps):
        x = xs[-1]
        m = x - sigmas[i] * velocity(x, i)
        if i > 0:  # corrector over the interval i-1 .. i
            others = [*range(i - last_order, i - 1), i]
            rhos = [0.5] if last_order == 1 else _unic_rhos(sigmas, i - 1, i, others)
            points = [m if k == i else ms[k] for k in others]
            x = sigmas[i] / sigmas[i - 1] * x_last + _unipc_sum(
                sigmas, i - 1, i, others, ms[i - 1], points, rhos
            )
        ms.append(m)
        x_last, last_order = x, min(order, steps - i, i + 1)
        others = [i - 1] if last_order == 2 else []
        xs.append(
            sigmas[i + 1] / sigmas[i] * x
            + _unipc_sum(sigmas, i, i + 1, others, m, [ms[k] for k in others], [0.5])
        )
    return np.array(xs)


def dpm_solver_pp_2m(x, velocity, sigmas):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), first order at both ends: samples [T+1,
    ...].
    """
    steps, xs, m_last = len(sigmas) - 1, [x], None
    for i in range(steps):
        s, s_next, x = sigmas[i], sigmas[i + 1], xs[-1]
        m = d = x - s * velocity(x, i)
        if 0 < i < steps - 1:
            r = (_log_snr(s) - _log_snr(sigmas[i - 1])) / (_log_snr(s_next) - _log_snr(s))
            d = (1 + 1 / (2 * r)) * m - m_last / (2 * r)
        decay = 0.0 if s_next == 0 else math.exp(_log_snr(s) - _log_snr(s_next))  # e^-h
        xs.append(s_next / s * x + (1 - s_next) * (1 - decay) * d)
        m_last = m
    return np.array(xs)


# The stochastic step ------------------------------------------------------------------------------
def diffusion_coefficient(kind, sigmas, noise_level):
    """g of each step [T] (Flow-GRPO, arXiv 2505.05470, and its code for Wan; DanceGRPO; CPS),
    without any bound.
    """
    g = []
    for i, s in enumerate(sigmas[:-1]):
        if kind == "flow_grpo_wan":
            g.append(noise_level * sigmas[1] * s)
        elif kind == "dance":
            g.append(noise_level)
        elif kind == "cps":  # the step's std is sigma_next sin(a pi / 2), and g that over sqrt(-dt)
            g.append(
                sigmas[i + 1] * math.sin(noise_level * math.pi / 2) / math.sqrt(s - sigmas[i + 1])
            )
        else:
            g.append(noise_level * math.sqrt(s / (1 - (sigmas[1] if i == 0 else s))))
    return np.array(g)


def mean_std(x, v, s, s_next, g):
    """One sample, in the form x (1 + g^2/2s dt) + v (1 + g^2 (1-s)/2s) dt of Flow-GRPO."""
    dt = s_next - s
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    return mean, g * math.sqrt(-dt)


def cps_mean_std(x, v, s, s_next, g):
    """One sample of coefficients-preserving sampling (arXiv 2509.05952): predicted and fresh noise
    make up s_next.
    """
    clean, noise, std = x - s * v, x + (1 - s) * v, g * math.sqrt(s - s_next)
    return (1 - s_next) * clean + math.sqrt(s_next**2 - std**2) * noise, std


def log_prob(x_next, mean, std):
    """One sample: the mean over dimensions of the normal log-density; 0 for a deterministic step."""
    if std == 0:
        return 0.0
    density = np.exp(-((x_next - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
    return float(np.mean(np.log(density)))


# Advantages and losses ----------------------------------------------------------------------------
def group_advantages(rewards, groups, valid, std, eps):
    kept = [r for r, ok in zip(rewards, valid) if ok]
    result = []
    for r, group, ok in zip(rewards, groups, valid):
        members = [q for q, other, fine in zip(rewards, groups, valid) if fine and other == group]
        if not ok or len(members) < 2:
            result.append(0.0)
            continue
        every_group = [
            [q for q, other, fine in zip(rewards, groups, valid) if fine and other == g]
            for g in groups
        ]
        spread = {
            "group": np.std(members),
            "global": np.std(kept),
            "none": 1 - eps,
            "max": max(np.std(m) for m in every_group if len(m) > 1),
        }[std]
        result.append((r - np.mean(members)) / (spread + eps))
    return np.array(result)


def step_importance(steps, final, least):
    """[(before, after), ...] of one video's trained steps and its final latents -> their weights, 1
    in the mean.
    """

    def cosine(x):
        return np.vdot(x, final) / np.linalg.norm(x) / np.linalg.norm(final)

    gains = [max(cosine(after) - cosine(before), 0.0) + least for before, after in steps]
    return [gain * len(gains) / sum(gains) for gain in gains]


def clipped_loss(ratio, advantage, low, high):
    """GRPO (arXiv 2402.03300, eq. 3) as a loss: the smaller of the plain and the clipped objective."""
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def policy_loss(
    objective, x_next, mean, mean_old, std, dt, advantage, low, high, divergence, cells=1.0
):
    """(loss, ratio) of one row: GRPO, GRPO-Guard (arXiv 2510.22319), Flow-DPPO, CPS' unscaled
    density. cells: weights of the values, with a mean of 1.
    """

    def squares(a):  # the mean of squares
        return float(np.mean(cells * a**2))

    if objective == "unscaled":  # -|x_next - mean|^2 as log-density
        ratio = math.exp(squares(x_next - mean_old) - squares(x_next - mean))
        return clipped_loss(ratio, advantage, low, high), ratio
    d = (squares(x_next - mean_old) - squares(x_next - mean)) / (2 * std**2)
    apart = squares(mean - mean_old) / (2 * std**2)
    if objective == "guard":
        ratio = math.exp(std * (d + apart))
        return clipped_loss(ratio, advantage, low, high) / -dt, ratio
    ratio = math.exp(d)
    if objective == "clip":
        return clipped_loss(ratio, advantage, low, high), ratio
    out = apart >= divergence and (ratio - 1) * advantage > 0
    return (0.0 if out else -advantage * ratio), ratio


def kl(kind, mean, mean_ref, v, v_ref, std, g):
    if kind == "velocity":
        return float(np.mean((v - v_ref) ** 2))
    divisor = {"flow_grpo": 2 * std**2, "sigma": 2 * g**2, "x": 1.0}[kind]
    return float(np.mean((mean - mean_ref) ** 2)) / divisor


def grpo_objective(
    x,
    x_next,
    v_new,
    v_old,
    v_ref,
    sigma,
    sigma_next,
    g,
    advantages,
    *,
    clip_low,
    clip_high,
    kl_beta,
    kl_kind="flow_grpo",
    mask=None,
):
    """The whole objective of one batch of rows, float64: everything the update should report.

    x, x_next, v_* [B, ...]; sigma, sigma_next, g, advantages [B]; mask [B] bool. loss = mean over
    counted rows of the clipped loss + kl_beta * KL. Returns a dict: loss, its analytic gradient
    with respect to v_new, and per row the log_prob, old_log_prob, ratio, policy_loss, kl and
    clipped.
    """
    x, x_next, v_new, v_old, v_ref = (
        np.asarray(a, np.float64) for a in (x, x_next, v_new, v_old, v_ref)
    )
    rows = len(x)
    mask = np.ones(rows, bool) if mask is None else np.asarray(mask)
    count = mask.sum()
    gradient = np.zeros_like(v_new)
    names = ("log_prob", "old_log_prob", "ratio", "policy_loss", "kl", "clipped")
    out = {name: np.zeros(rows) for name in names}
    for b in range(rows):
        s, s_next, gb, A = (float(a[b]) for a in (sigma, sigma_next, g, advantages))
        mean, std = mean_std(x[b], v_new[b], s, s_next, gb)
        mean_old, _ = mean_std(x[b], v_old[b], s, s_next, gb)
        mean_ref, _ = mean_std(x[b], v_ref[b], s, s_next, gb)
        new, old = log_prob(x_next[b], mean, std), log_prob(x_next[b], mean_old, std)
        ratio = math.exp(new - old)
        out["log_prob"][b], out["old_log_prob"][b], out["ratio"][b] = new, old, ratio
        out["policy_loss"][b] = clipped_loss(ratio, A, clip_low, clip_high)
        out["kl"][b] = kl(kl_kind, mean, mean_ref, v_new[b], v_ref[b], std, gb)
        out["clipped"][b] = ratio > 1 + clip_high or ratio < 1 - clip_low
        if not mask[b]:
            continue
        size = x[b].size
        dmean_dv = (s_next - s) * (1 + gb**2 * (1 - s) / (2 * s))
        binds = (ratio > 1 + clip_high and A > 0) or (ratio < 1 - clip_low and A < 0)
        dloss_dmean = 0.0 if binds else -A * ratio * (x_next[b] - mean) / (std**2 * size)
        gradient[b] = dloss_dmean * dmean_dv
        if kl_kind == "velocity":
            gradient[b] += kl_beta * 2 * (v_new[b] - v_ref[b]) / size
        else:
            divisor = {"flow_grpo": 2 * std**2, "sigma": 2 * gb**2, "x": 1.0}[kl_kind]
            gradient[b] += kl_beta * 2 * (mean - mean_ref) / (size * divisor) * dmean_dv
        gradient[b] /= count
    loss = float(np.sum((out["policy_loss"] + kl_beta * out["kl"])[mask]) / count)
    return {"loss": loss, "gradient": gradient, **out}


# Methods on finished videos -----------------------------------------------------------------------
def nft_loss(x0, noise, s, v, v_old, r, beta, cells=1.0):
    """One video: DiffusionNFT (arXiv 2509.16117) with its adaptive weight, before any scale."""
    x = (1 - s) * x0 + s * noise

    def error(velocity):
        residual = x - s * velocity - x0
        return np.mean(cells * residual**2) / max(np.mean(cells * np.abs(residual)), 1e-5)

    positive, negative = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
    return r * error(positive) / beta + (1 - r) * error(negative) / beta


def dpo_loss(better, worse, beta):
    """One pair, each (x0, noise, v, v_ref, weights of the values): Flow-DPO (arXiv 2501.13918)."""

    def excess(x0, noise, v, v_ref, cells=1.0):
        error, of_reference = (v - (noise - x0)) ** 2, (v_ref - (noise - x0)) ** 2
        return np.mean(cells * error) - np.mean(cells * of_reference)

    margin = excess(*better) - excess(*worse)
    return math.log1p(math.exp(beta / 2 * margin))


def regression_weights(rewards, valid, size, temperature):
    """exp(r / temperature) over its mean among the group's valid videos."""
    result = []
    for i, (r, ok) in enumerate(zip(rewards, valid)):
        group = range(i // size * size, i // size * size + size)
        kept = [math.exp(rewards[j] / temperature) for j in group if valid[j]]
        result.append(math.exp(r / temperature) / (sum(kept) / len(kept)) if ok else 0.0)
    return np.array(result)


def cell_weights(boxes, frames, shape, strength, grown=1):
    """One video: 1 - strength outside of the boxes, 1 + strength (1 / share - 1) inside; cell by cell.

    boxes: {frame: [(left, top, right, bottom)]}. A box lies over the cells that it overlaps, and their
    neighbours.
    """
    depth, height, width = shape
    stride = (frames - 1) // (depth - 1) if depth > 1 else 1
    found = np.zeros(shape)
    for f, h, w in np.ndindex(*shape):
        of_cell = [0] if f == 0 else range((f - 1) * stride + 1, f * stride + 1)
        for frame in of_cell:
            judged = min(boxes, key=lambda j: (abs(j - frame), j), default=None)
            for left, top, right, bottom in boxes.get(judged, ()):
                beside = left * width - grown - 1 < w < right * width + grown
                level = top * height - grown - 1 < h < bottom * height + grown
                found[f, h, w] = found[f, h, w] or (beside and level)
    share = found.mean()
    return np.where(found, 1 + strength * (1 / share - 1), 1 - strength) if share else 1 + found
