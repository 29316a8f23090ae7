"""Measures the OCR reward's frames per second, in local worker processes and behind a reward server.

    python -m benchmarks.rewards [--workers 1,2,8] [--where local] [--videos 32] [--frames 9] [--height 256 --width 256]

The server runs on this machine, so that the network is not the limit and both ways use the same
cores. So the difference is HTTP, JSON and two copies of the pixels. All pools are built beforehand
and take turns, round by round, so that other load on the machine affects all of them. The figures
are medians over the rounds. `to local` is the median ratio of a round's time in local workers to its
time in the row's pool, with the same number of workers; `submit` is how long `submit` blocks the
trainer.
"""

import contextlib
import functools
import os
import statistics
import subprocess
import sys
import time

import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw, ImageFont

from rewards.ocr.rules import OCRReward, even_frames
from rewards.pool import RewardPool
from rewards.remote.client import RemoteReward

WORDS = "OPEN EXIT COFFEE HARBOUR TICKETS GARDEN MUSEUM BAKERY".split()
TOKEN = "benchmark"


def draw_videos(
    count: int, frames: int, height: int, width: int
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Return (videos uint8 [B, T, H, W, 3], B targets), with one word per video and noise that
    differs between frames.
    """
    rng, words = np.random.default_rng(0), [WORDS[i % len(WORDS)] for i in range(count)]
    font = ImageFont.load_default(size=max(12, width // 8))
    videos = np.empty((count, frames, height, width, 3), np.uint8)
    for i, word in enumerate(words):
        image = Image.new("RGB", (width, height), tuple(rng.integers(140, 256, 3).tolist()))
        ImageDraw.Draw(image).text((width / 2, height / 2), word, (20, 20, 20), font, anchor="mm")
        noise = rng.normal(0, 8, (frames, height, width, 1))
        videos[i] = (np.asarray(image) + noise).clip(0, 255)
    return videos, [(word,) for word in words]


@contextlib.contextmanager
def server(workers: int, max_frames: int):
    """Run `python -m rewards.server` on this machine; gives its URL."""
    command = [
        sys.executable,
        "-m",
        "rewards.server",
        "--port=0",
        f"--workers={workers}",
        f"--max_frames={max_frames}",
    ]
    environment = os.environ | {"REWARD_TOKEN": TOKEN}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None  # it is a pipe
        try:
            yield process.stdout.readline().split()[3]
        finally:
            process.terminate()


@contextlib.contextmanager
def remote_pool(workers: int, max_frames: int):
    """Give a pool in front of a server. It has two more threads than the server has workers, so that
    videos are sent while others are scored.
    """
    with server(workers, max_frames) as url:
        reward = RemoteReward(
            [url], token=TOKEN, select=functools.partial(even_frames, max_frames=max_frames)
        )
        with RewardPool(lambda: reward, workers + 2, "thread") as pool:
            yield pool


def measure(
    pool: RewardPool, videos: np.ndarray, targets: list
) -> tuple[float, float, list[float]]:
    """Return (seconds from submit to the last score, seconds that submit blocks, values)."""
    start = time.perf_counter()
    pending = pool.submit(videos, targets)
    blocked = time.perf_counter() - start
    scores = pending.result()
    return scores.seconds, blocked, scores.values.tolist()


def main(_):
    options = flags.FLAGS
    videos, targets = draw_videos(options.videos, options.frames, options.height, options.width)
    frames = options.videos * len(even_frames(options.frames, options.max_frames))
    print(
        f"{options.videos} videos of {options.frames} frames, {frames} frames read, "
        f"{options.height}x{options.width}; {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f} before"
    )
    with contextlib.ExitStack() as stack:
        pools = {}
        for workers in map(int, options.workers):
            reward = functools.partial(OCRReward, max_frames=options.max_frames)
            pools["local", workers] = stack.enter_context(RewardPool(reward, workers))
            if "remote" in options.where:
                pool = remote_pool(workers, options.max_frames)
                pools["remote", workers] = stack.enter_context(pool)
        for pool in pools.values():
            measure(pool, videos[:4], targets[:4])
        rounds = {key: [] for key in pools}
        for _ in range(options.rounds):
            for key, pool in pools.items():
                rounds[key].append(measure(pool, videos, targets))
    if len({tuple(values) for row in rounds.values() for _, _, values in row}) != 1:
        raise AssertionError("the pools do not agree on the scores")
    print("| where | workers | frames/s | to local | submit, ms |\n|---|---|---|---|---|")
    for (where, workers), row in rounds.items():
        seconds = statistics.median(each[0] for each in row)
        ratio = statistics.median(
            local[0] / each[0] for local, each in zip(rounds["local", workers], row)
        )
        blocked = 1000 * statistics.median(each[1] for each in row)
        print(f"| {where} | {workers} | {frames / seconds:.1f} | {ratio:.2f} | {blocked:.1f} |")


if __name__ == "__main__":
    flags.DEFINE_list(
        "workers",
        ["1", "2", str(max(4, os.cpu_count() or 1))],
        "numbers of worker processes to measure",
    )
    flags.DEFINE_multi_enum(
        "where",
        ["local", "remote"],
        ["local", "remote"],
        "pools to measure; remote needs the extra [server]",
    )
    flags.DEFINE_integer("videos", 32, "number of videos", lower_bound=4)
    flags.DEFINE_integer("frames", 9, "frames per video", lower_bound=1)
    flags.DEFINE_integer("max_frames", 9, "frames per video that are read", lower_bound=2)
    flags.DEFINE_integer("height", 256, "height of a frame, pixels", lower_bound=16)
    flags.DEFINE_integer("width", 256, "width of a frame, pixels", lower_bound=16)
    flags.DEFINE_integer("rounds", 5, "rounds, whose median is reported", lower_bound=1)
    app.run(main)
