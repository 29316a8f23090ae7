"""Checkpoints of a run: the weights, optimiser, moving average and number of updates of each trained
expert, and the copies of earlier weights that the method keeps.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax

from grpo.data.latent_folder import LatentData
from grpo.data.prompts import PromptSet
from grpo.learning.head_guidance import HeadState
from grpo.learning.kl import KLControl
from grpo.learning.optimiser import TrainState
from grpo.settings import parse
from grpo.settings.budget import Spent
from rewards.base import PromptRecord
from wan_jax.distributed import replicas
from wan_jax.errors import UserError
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage.checkpoint import Checkpoints, join_experts, split_experts
from wan_jax.storage.model_dir import ModelDir

HEAD = "reward_head"  # the reward head in a checkpoint's state


def state_tree(states: dict[str, TrainState], head: HeadState | None = None) -> dict:
    """Return the arrays of the experts' states, and of a reward head, as a checkpoint stores them: 'ema'
    as the weights to sample with, the others as the state. Without an average 'ema' are the trained weights, which
    are stored once.
    """

    def joined(part: Callable[[TrainState], dict]) -> dict:
        return join_experts({name: part(state) for name, state in states.items()})

    def optimiser(state: TrainState) -> dict:
        return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt))}

    def counters(state: TrainState) -> dict:
        return {"updates": state.updates} | (vars(state.kl) if state.kl else {})

    tree = {
        "ema": joined(lambda state: state.averaged),
        "opt": joined(optimiser),
        "counters": joined(counters),
    }
    first = next(iter(states.values()))
    if first.ema:
        tree["trainable"] = joined(lambda state: state.trainable)
    for name in first.lagged:
        tree[name] = joined(lambda state, name=name: state.lagged[name])
    return tree if head is None else tree | {HEAD: head.tree()}


def origin(model: ModelDir, prompts: PromptSet, data: LatentData | None = None) -> dict[str, Any]:
    """Return digests of the model, of the training prompts with their targets, of the data and of
    their labels, and the LoRAs merged into the model, with which a run must continue. Digests do not depend on paths.
    The model's is None for folders of earlier versions.
    """
    targets = [
        ([t.targets, t.metadata] if t.metadata else t.targets) if isinstance(t, PromptRecord) else t
        for t in prompts.targets
    ]
    text = json.dumps([prompts.prompts, targets])
    return {
        "model_digest": model.fingerprint,
        "prompts_digest": hashlib.sha256(text.encode()).hexdigest(),
        "loras": [lora.record for lora in model.loras],
        "data_digest": None if data is None else data.digest,
        "labels_digest": None if data is None or data.labels is None else data.labels.digest,
    }


def check_resume(
    meta: dict, checkpoint, config: dict, model: ModelDir, belongs: dict
) -> tuple[str, ...]:
    """Return the settings that the run changes when it continues, as `parse.check_resume` does. Raise
    `UserError` where a run cannot continue after its checkpoint with these settings, this model and
    these prompts and this data.

    meta: of the checkpoint. checkpoint: its path. config: the settings as nested dicts. belongs:
    `origin` of the model, the prompts and the data. prompts.train is compared by content; by path
    only where the checkpoint is of an earlier version, which has no digest. So are data.path and
    data.labels, and model.loras by content and scale.
    """
    saved, now = _with_loras(meta["config"], meta), _with_loras(config, belongs)
    before, after = meta.get("prompts_digest"), belongs["prompts_digest"]
    if before == after:
        now = _with_path(now, "prompts", "train", saved["prompts"]["train"])
    elif before is not None:
        saved = _with_digest(saved, "prompts", "train", before)
        now = _with_digest(now, "prompts", "train", after)
    for key, digest in (("path", "data_digest"), ("labels", "labels_digest")):
        before, after = meta.get(digest), belongs.get(digest)
        if before == after and "data" in saved:
            now = _with_path(now, "data", key, saved["data"].get(key, ""))
        elif before != after:
            saved = _with_digest(saved, "data", key, before)
            now = _with_digest(now, "data", key, after)
    changed = parse.check_resume(saved, now, str(checkpoint), meta["epoch"])
    model.check_same(meta.get("model_digest"), meta["model"], str(checkpoint), "config.model.path")
    return changed


def _with_loras(config: dict, belongs: dict) -> dict:
    """Return settings with digests and scales instead of the files in model.loras."""
    loras = [f"{lora['digest'][:12]}:{lora['scale']:g}" for lora in belongs.get("loras") or ()]
    return config | {"model": config["model"] | {"loras": loras}}


def _with_path(config: dict, section: str, key: str, path: str) -> dict:
    """Return settings with another path in a section."""
    return config | {section: config.get(section, {}) | {key: path}}


def _with_digest(config: dict, section: str, key: str, digest: str | None) -> dict:
    """Return settings with a digest behind a path, so that equal paths differ."""
    path = config.get(section, {}).get(key, "")
    return _with_path(config, section, key, f"{path} ({str(digest)[:12]})")


def save(
    checkpoints: Checkpoints,
    epoch: int,
    states: dict[str, TrainState],
    config: dict,
    lora: LoRAConfig | None,
    spent: Spent,
    belongs: dict | None = None,
    head: HeadState | None = None,
):
    """Write a checkpoint: the states, the weights to sample with (`TrainState.averaged`), and the
    settings that are needed to read them. All processes call this together. Raises `UserError`, and
    writes nothing, where their weights differ.

    config: the settings as nested dicts. lora: None for full fine-tuning. spent: by the run so far.
    belongs: the run's `origin`. head: that guides the rollout.
    """
    tree = state_tree(states, head)
    replicas.check_same(tree, f"epoch {epoch}: the trained weights")
    ema = tree.pop("ema")
    adapters = None
    if lora is not None:
        adapters = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
    checkpoints.save(
        epoch,
        tree,
        ema,
        {
            "config": config,
            "model": config["model"]["path"],
            "experts": list(states),
            "spent": dataclasses.asdict(spent),
            "lora": adapters,
            **(belongs or {}),
        },
    )


def spent_by(checkpoints: Checkpoints, epoch: int) -> Spent:
    """Return what the run had spent at a checkpoint; nothing where the checkpoint is of a version that
    did not count. Raises `UserError` where the checkpoint is damaged.
    """
    try:
        return Spent(**checkpoints.meta(epoch).get("spent", {}))
    except TypeError:
        raise UserError(
            f"{checkpoints.path(epoch)} is damaged: its meta has no valid 'spent'"
        ) from None


def restore(
    checkpoints: Checkpoints, epoch: int, like: dict[str, TrainState]
) -> dict[str, TrainState]:
    """Return the experts' states of a checkpoint, with the structure and the shardings of `like`."""
    return restore_all(checkpoints, epoch, like, None)[0]


def restore_all(
    checkpoints: Checkpoints, epoch: int, like: dict[str, TrainState], head: HeadState | None
) -> tuple[dict[str, TrainState], HeadState | None]:
    """Return (`restore`, the reward head of a checkpoint as `head`, None where that is None)."""
    tree, ema = checkpoints.restore_state(epoch, state_tree(like, head))
    if head is not None:
        head = head.of_tree(tree.pop(HEAD))
    tree["ema"] = ema
    by_expert = {key: split_experts(value, list(like)) for key, value in tree.items()}
    states = {}
    for name, state in like.items():
        leaves, structure = jax.tree.flatten(state.opt)
        opt = by_expert["opt"][name]
        counters = dict(by_expert["counters"][name])
        states[name] = TrainState(
            trainable=by_expert["trainable" if state.ema else "ema"][name],
            opt=jax.tree.unflatten(structure, [opt[str(i)] for i in range(len(leaves))]),
            ema=by_expert["ema"][name] if state.ema else {},
            updates=counters.pop("updates"),
            kl=KLControl(**counters) if counters else None,
            lagged={copy: by_expert[copy][name] for copy in state.lagged},
        )
    return states, head
