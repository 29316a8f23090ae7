"""The rewards of a run that are computed on other machines: by reward servers, or by a vision model
as the judge.
"""

import functools
import os
from collections.abc import Callable

from grpo.settings.choices import JUDGE, JUDGE_QUESTIONS
from grpo.settings.named import TEXT, servers_by_name
from rewards.base import Reward
from rewards.judge import JudgeReward, Transcriber, VisionEndpoint
from rewards.ocr.rules import RULES, OCRReward, even_frames
from rewards.remote.client import RemoteReward
from rewards.remote.connections import check_url
from rewards.remote.endpoints import log
from wan_jax.errors import UserError


def check_settings(config) -> None:
    """Check the settings of servers. config: `config.reward`. Raises `UserError` that names the
    key, the value and the fix.
    """
    if config.engine == JUDGE and TEXT not in servers_by_name(config.servers):
        raise UserError(
            f"config.reward.engine='judge' asks a vision model, but config.reward.servers="
            f"{tuple(config.servers)} names none: give its URLs, "
            "--config.reward.servers=http://host:8000"
        )
    if config.reader_two and config.reader_two == config.engine:
        raise UserError(
            f"config.reward.reader_two={config.reader_two!r} is also config.reward.engine: choose "
            "another engine, or leave it empty"
        )
    if config.reader_two and config.engine == JUDGE:
        raise UserError(
            f"config.reward.reader_two={config.reader_two!r} is for two OCR engines, but "
            "config.reward.engine='judge': leave one of them out"
        )
    if not config.servers:
        return
    if (
        config.engine == JUDGE
        and config.judge_question != JUDGE_QUESTIONS[0]
        and config.weights.stability is not None
    ):
        raise UserError(
            f"config.reward.weights.stability={config.weights.stability} compares the texts of frames, "
            f"which config.reward.judge_question={config.judge_question!r} does not read: use "
            "'transcribe', or None"
        )
    for urls in servers_by_name(config.servers).values():
        for url in urls:
            try:
                check_url(url)
            except ValueError as error:
                raise UserError(f"config.reward.servers: {error}") from None
    if config.workers < 1:
        raise UserError(
            f"config.reward.workers={config.workers} with config.reward.servers: it is the number of "
            "videos in flight; set it to at least the workers of all servers together"
        )
    if not config.timeout > 0:
        raise UserError(f"config.reward.timeout={config.timeout} must be above 0 seconds")
    if not config.token_env.isidentifier():  # the message omits it: it may be the token itself
        raise UserError(
            "config.reward.token_env must be the name of an environment variable that holds the "
            "token, such as REWARD_TOKEN, never the token itself"
        )


def connect(config, name: str = TEXT) -> Callable[[], Reward]:
    """Connect to the servers of a reward, and return a factory that gives every thread of a pool the
    same reward, a client of all of them.

    config: `config.reward`, checked. Raises `RewardError` or `ValueError` if no server can be used.
    """
    options = {
        "token": os.environ.get(config.token_env, "").strip(),
        "timeout": config.timeout,
        "retries": config.retries,
        "patience": config.patience,
    }
    urls = servers_by_name(config.servers)[name]
    if name != TEXT:
        reward = RemoteReward(urls, expect={"name": name}, **options)
        _warn_of_idle(reward, config)
    elif config.engine == JUDGE:
        judge = VisionEndpoint(urls, config.judge_model, **options)
        if config.judge_question == "transcribe":
            reward = OCRReward(config.rule, Transcriber(judge), max_frames=config.max_frames)
        else:
            reward = JudgeReward(judge, config.judge_question, max_frames=config.max_frames)
    else:
        # `even_frames` chooses the same frames among those that are sent: no others need to be
        select = (
            functools.partial(even_frames, max_frames=config.max_frames)
            if RULES[config.rule].choose_frames is even_frames
            else None
        )
        reward = RemoteReward(
            urls,
            select=select,
            bounds=(0.0, 1.0),
            expect={
                "name": "ocr",
                "rule": config.rule,
                "engine": config.engine,
                "max_frames": config.max_frames,
                "reader_two": config.reader_two or None,
            },
            **options,
        )
        _warn_of_idle(reward, config)
    return lambda: reward


def warn_of_readers(config) -> None:
    """Warn where training also sees the reader that judges.

    config: `config.reward` of a recipe that trains the spelling.
    """
    trained = [engine for engine in (config.engine, config.reader_two) if engine]
    if config.second_engine in trained:
        log.warning(
            "config.reward.second_engine=%s also scores in training: it cannot show that the reward "
            "is fooled; choose another engine",
            config.second_engine,
        )
    elif config.reader_two and not config.second_engine:
        log.warning(
            "training sees both readers, %s: letters that fool both look right in all values; "
            "choose a third one as config.reward.second_engine",
            " and ".join(trained),
        )


def _warn_of_idle(reward: RemoteReward, config) -> None:
    if reward.workers > config.workers:
        log.warning(
            "the reward servers have %d workers, but config.reward.workers=%d videos in "
            "flight keep at most as many busy: raise it",
            reward.workers,
            config.workers,
        )
