"""The reward pool of a recipe."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

from grpo.scoring import reward_servers
from grpo.scoring.reward_combination import MAIN
from grpo.settings.named import TEXT, pairs, servers_by_name
from grpo.settings.schema import BUILT_IN, SECOND_READER, TEXT_AREA, Recipe, main_reward
from rewards.base import Reward, RewardError, last_line
from rewards.clip import KINDS, ClipReward
from rewards.composite import DERIVED, CompositeReward
from rewards.ocr.rules import OCRReward
from rewards.ocr.two_readers import TwoReaderReward
from rewards.own import OwnReward, adapted
from rewards.pool import RewardPool
from rewards.pool_set import BUILT_IN_POOL, IN_PROCESS_POOL, OWN_POOL, Pool, PoolSet
from rewards.quality import QualityReward
from wan_jax.distributed import multihost
from wan_jax.errors import UserError

Factory = Callable[[], Reward]


def open_pool(
    config,
    weights: dict[str, float],
    objects: Mapping[str, Any] | None = None,
    *,
    boxes: bool = False,
) -> Pool:
    """Build the pools that score videos: worker processes on this machine, and threads that send
    requests to servers.

    config: `config.reward`. weights: of the rewards by name, measured ones included. objects: those
    of `config.own` that are objects of this process, by name (`rewards.own.adapted`); one thread of
    it scores by them. boxes: whether the scores have the boxes of the text, which the measure
    `text_area` also needs. Raises `UserError` when a reward cannot be built, e.g. because of a
    missing package.
    """
    servers, main = servers_by_name(config.servers), main_reward(weights)
    if weights.get(MAIN):
        reward_servers.warn_of_readers(config)
    boxes = boxes or TEXT_AREA in weights
    folders = module_folders()
    here: dict[str, Factory | None] = {
        name: functools.partial(adapted, name, reward) for name, reward in (objects or {}).items()
    }
    own: dict[str, Factory | None] = {
        name: functools.partial(OwnReward, name, target, folders)
        for name, target in pairs(config.own, str)
        if name not in here
    }
    try:
        with contextlib.ExitStack() as opened:
            # 1. Rewards of this package, with the users' own unless they are in threads.
            built_in = {n: _factory(config, n, boxes) for n in weights if n in BUILT_IN}
            composites: dict[str, tuple[dict[str, Factory | None], str]] = {}
            if TEXT in servers and own:
                composites = {BUILT_IN_POOL: (built_in, "thread"), OWN_POOL: (own, "process")}
            elif built_in or own:
                mode = "thread" if TEXT in servers else "process"
                composites = {BUILT_IN_POOL: (built_in | own, mode)}
            if here:
                composites[IN_PROCESS_POOL] = here, "thread"
            pools, owner = {}, main.partition(".")[0]
            named = [name for name in servers if name != TEXT]
            for pool, (factories, mode) in composites.items():
                required = None
                if owner in factories:
                    factories, required = {owner: factories[owner]} | factories, main
                alone = len(factories) == 1 and MAIN in factories and not config.reader_two
                if alone and not (named or own or here):
                    reward = factories[MAIN]  # the spelling alone has no parts
                else:
                    reward = functools.partial(CompositeReward, factories, required)
                assert reward is not None  # none of `DERIVED` is alone
                workers = min(config.workers, 1) if pool == IN_PROCESS_POOL else config.workers
                pools[pool] = opened.enter_context(RewardPool(reward, workers=workers, mode=mode))
                owner = pool if required else owner
            # 2. Rewards of named servers.
            for name in named:
                make = reward_servers.connect(config, name)
                pools[name] = opened.enter_context(RewardPool(make, config.workers, "thread"))
            opened.pop_all()
        return pools[owner] if len(pools) == 1 and composites else PoolSet(pools, main, owner)
    except (RewardError, ImportError, ValueError) as error:
        raise UserError(f"the reward cannot be built: {last_line(str(error))}") from error


def _factory(config, name: str, boxes: bool) -> Factory | None:
    """Return the factory of a reward of this package; None for a derived value. boxes: whether the
    reader keeps those of the text.
    """
    if name == MAIN:
        if TEXT in servers_by_name(config.servers):
            return reward_servers.connect(config)
        options = {"rule": config.rule, "engine": config.engine, "max_frames": config.max_frames}
        if config.reader_two:
            options["reader_two"] = config.reader_two
        reader = TwoReaderReward if config.reader_two else OCRReward
        return functools.partial(reader, boxes=boxes, **options)
    if name in DERIVED:
        return None
    if name in KINDS:
        return functools.partial(ClipReward, config[f"{name}_model"], name, config.max_frames)
    if name == SECOND_READER:
        return functools.partial(
            OCRReward, rule=config.rule, engine=config.second_engine, max_frames=config.max_frames
        )
    return functools.partial(QualityReward, name)


def module_folders() -> tuple[str, ...]:
    """Return the folders in which the modules of `reward.own` are looked for first: that of the
    recipe which the command was given as --config, and the working directory.
    """
    folders = [os.getcwd()]
    if "config" in flags.FLAGS and flags.FLAGS.is_parsed():
        with contextlib.suppress(TypeError, flags.Error):  # no recipe
            recipe = config_flags.get_config_filename(flags.FLAGS["config"])
            folders.insert(0, str(pathlib.Path(recipe.partition(":")[0]).resolve().parent))
    return tuple(dict.fromkeys(folders))


def check_groups(pool: Pool, recipe: Recipe, rows: np.ndarray) -> None:
    """Raise `UserError`, the same on every process, where the groups of a groupwise reward would be
    split over processes. All processes must call this together.

    rows: int, the videos of each rollout batch that this process scores, from 0.
    """
    size, batch = recipe.sample.group_size, recipe.sample.batch_size
    numbers = np.add.outer(np.arange(0, recipe.sample.groups * size, batch), rows)
    _, counts = np.unique(numbers // size, return_counts=True)
    split = pool.traits.groupwise and bool((counts % size).any())
    if any(multihost.gather(split)):
        raise UserError(
            f"a reward compares the videos of a group, but groups of config.sample.group_size={size} "
            f"would be split over processes with config.sample.batch_size={batch}: make it a "
            "multiple of the number of processes times the group's size"
        )
