"""The reward of a run whose videos are scored elsewhere: by reward servers, or by a vision model as
the judge.
"""

import functools
import os
from collections.abc import Callable

from grpo.settings.choices import JUDGE, JUDGE_QUESTIONS
from rewards.base import Reward
from rewards.judge import JudgeReward, Transcriber, VisionEndpoint
from rewards.ocr.rules import OCRReward, even_frames
from rewards.remote.client import RemoteReward
from rewards.remote.connections import check_url
from rewards.remote.endpoints import log
from wan_jax.errors import UserError


def check_settings(c) -> None:
    """Checks the settings of `config.reward` that concern servers. Raises UserError naming the key,
    value and fix.
    """
    if not c.servers:
        if c.engine == JUDGE:
            raise UserError(
                "config.reward.engine='judge' asks a vision model, but config.reward.servers=() "
                "names none: give its URLs, --config.reward.servers=http://host:8000"
            )
        return
    if (
        c.engine == JUDGE
        and c.judge_question != JUDGE_QUESTIONS[0]
        and c.weights.stability is not None
    ):
        raise UserError(
            f"config.reward.weights.stability={c.weights.stability} compares the texts of frames, "
            f"which config.reward.judge_question={c.judge_question!r} does not read: use "
            "'transcribe', or None"
        )
    for url in c.servers:
        try:
            check_url(url)
        except ValueError as error:
            raise UserError(f"config.reward.servers: {error}") from None
    if c.workers < 1:
        raise UserError(
            f"config.reward.workers={c.workers} with config.reward.servers: it is the number of "
            "videos in flight; set it to at least the workers of all servers together"
        )
    if not c.timeout > 0:
        raise UserError(f"config.reward.timeout={c.timeout} must be above 0 seconds")
    if not c.token_env.isidentifier():  # not repeated, as it may be the token itself
        raise UserError(
            "config.reward.token_env must be the name of an environment variable that holds the "
            "token, such as REWARD_TOKEN, never the token itself"
        )


def connect(c) -> Callable[[], Reward]:
    """A factory that gives every thread of a pool the same reward, a client of all servers.

    c: `config.reward`, checked. Raises RewardError or ValueError when no server can be used.
    """
    options = {
        "token": os.environ.get(c.token_env, "").strip(),
        "timeout": c.timeout,
        "retries": c.retries,
        "patience": c.patience,
    }
    if c.engine == JUDGE:
        judge = VisionEndpoint(c.servers, c.judge_model, **options)
        reward = (
            OCRReward(c.rule, Transcriber(judge), max_frames=c.max_frames)
            if c.judge_question == "transcribe"
            else JudgeReward(judge, c.judge_question, max_frames=c.max_frames)
        )
    else:
        # `spelling` chooses the same frames among those sent, so the others can stay here
        select = (
            functools.partial(even_frames, max_frames=c.max_frames)
            if c.rule == "spelling"
            else None
        )
        reward = RemoteReward(
            c.servers,
            select=select,
            bounds=(0.0, 1.0),
            expect={"name": "ocr", "rule": c.rule, "engine": c.engine, "max_frames": c.max_frames},
            **options,
        )
        if reward.workers > c.workers:
            log.warning(
                "the reward servers have %d workers, but config.reward.workers=%d videos in "
                "flight keep at most as many busy: raise it",
                reward.workers,
                c.workers,
            )
    return lambda: reward
