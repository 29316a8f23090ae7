"""Frames per second of the OCR reward: worker processes here, and the same number behind a reward
server.

    python -m benchmarks.rewards [--workers 1,2,8] [--where local] [--videos 32] [--frames 9]
    [--height 256 --width 256]

The server runs on this machine, so that the network is not the limit and every core is used by both
ways alike; what it adds is HTTP, JSON and two copies of the pixels. All pools are built beforehand
and take turns, round by round, so that what else the machine does falls on all of them. The median
round counts; `to local` is the median of the ratios of each round's two times with the same number
of workers, `submit` the milliseconds that the trainer is held up.
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
from rewards.remote.client import RemoteReward
from rewards.workers import RewardPool

WORDS = "OPEN EXIT COFFEE HARBOUR TICKETS GARDEN MUSEUM BAKERY".split()
TOKEN = "benchmark"


def draw_videos(
    count: int, frames: int, height: int, width: int
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """(uint8 [B, T, H, W, 3], B targets): one word a video, with noise that differs on every frame."""
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
    """The URL of `python -m rewards.server` on this machine."""
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
        try:
            yield process.stdout.readline().split()[3]
        finally:
            process.terminate()


@contextlib.contextmanager
def remote_pool(workers: int, max_frames: int):
    """Two more videos in flight than workers: one is sent while others are read."""
    with server(workers, max_frames) as url:
        reward = RemoteReward(
            [url], token=TOKEN, select=functools.partial(even_frames, max_frames=max_frames)
        )
        with RewardPool(lambda: reward, workers + 2, "thread") as pool:
            yield pool


def measure(
    pool: RewardPool, videos: np.ndarray, targets: list
) -> tuple[float, float, list[float]]:
    """(seconds from submit to the last score, seconds that submit took, values)."""
    start = time.perf_counter()
    pending = pool.submit(videos, targets)
    held_up = time.perf_counter() - start
    scores = pending.result()
    return scores.seconds, held_up, scores.values.tolist()


def main(_):
    f = flags.FLAGS
    videos, targets = draw_videos(f.videos, f.frames, f.height, f.width)
    frames = f.videos * len(even_frames(f.frames, f.max_frames))
    print(
        f"{f.videos} videos of {f.frames} frames, {frames} frames read, {f.height}x{f.width}; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before"
    )
    with contextlib.ExitStack() as stack:
        pools = {}
        for workers in map(int, f.workers):
            reward = functools.partial(OCRReward, max_frames=f.max_frames)
            pools["local", workers] = stack.enter_context(RewardPool(reward, workers))
            if "remote" in f.where:
                pools["remote", workers] = stack.enter_context(remote_pool(workers, f.max_frames))
        for pool in pools.values():
            measure(pool, videos[:4], targets[:4])
        rounds = {key: [] for key in pools}
        for _ in range(f.rounds):
            for key, pool in pools.items():
                rounds[key].append(measure(pool, videos, targets))
    if len({tuple(values) for found in rounds.values() for _, _, values in found}) != 1:
        raise AssertionError("the pools do not agree on the scores")
    print("| where | workers | frames/s | to local | submit, ms |\n|---|---|---|---|---|")
    for (where, workers), found in rounds.items():
        seconds = statistics.median(each[0] for each in found)
        ratio = statistics.median(
            here[0] / each[0] for here, each in zip(rounds["local", workers], found)
        )
        held_up = 1000 * statistics.median(each[1] for each in found)
        print(f"| {where} | {workers} | {frames / seconds:.1f} | {ratio:.2f} | {held_up:.1f} |")


if __name__ == "__main__":
    flags.DEFINE_list(
        "workers", ["1", "2", str(max(4, os.cpu_count() or 1))], "numbers of processes"
    )
    flags.DEFINE_multi_enum(
        "where", ["local", "remote"], ["local", "remote"], "local alone needs no server's packages"
    )
    flags.DEFINE_integer("videos", 32, "B", lower_bound=4)
    flags.DEFINE_integer("frames", 9, "T of each video", lower_bound=1)
    flags.DEFINE_integer("max_frames", 9, "frames read of a video", lower_bound=2)
    flags.DEFINE_integer("height", 256, "pixels", lower_bound=16)
    flags.DEFINE_integer("width", 256, "pixels", lower_bound=16)
    flags.DEFINE_integer("rounds", 5, "of which the median counts", lower_bound=1)
    app.run(main)
