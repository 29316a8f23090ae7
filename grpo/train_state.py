"""What a checkpoint holds of a run: each trained expert's weights, optimiser, moving average and
update count, and the copies of earlier weights that its method keeps.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable

import jax

from grpo.data.prompts import PromptSet
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


def state_tree(states: dict[str, TrainState]) -> dict:
    """What a checkpoint stores of the experts' states; 'ema' as the weights to sample with, the
    rest as the state.
    """

    def joined(part: Callable[[TrainState], dict]) -> dict:
        return join_experts({name: part(state) for name, state in states.items()})

    tree = {
        "trainable": joined(lambda state: state.trainable),
        "ema": joined(lambda state: state.ema),
        "opt": joined(
            lambda state: {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt))}
        ),
        "counters": joined(
            lambda state: {"updates": state.updates} | (vars(state.kl) if state.kl else {})
        ),
    }
    names = next(iter(states.values())).lagged
    return tree | {name: joined(lambda state, n=name: state.lagged[n]) for name in names}


def origin(model: ModelDir, prompts: PromptSet) -> dict[str, str | None]:
    """Digests of what a run must go on with: its model and its training prompts with their targets,
    wherever the files are. A model folder of an earlier version has none.
    """
    asked = [t.targets if isinstance(t, PromptRecord) else t for t in prompts.targets]
    text = json.dumps([prompts.prompts, asked])
    return {
        "model_digest": model.fingerprint,
        "prompts_digest": hashlib.sha256(text.encode()).hexdigest(),
    }


def check_resume(meta: dict, checkpoint, config: dict, model: ModelDir, belongs: dict) -> None:
    """Raises `UserError` unless a checkpoint's run can go on with these settings, this model and
    these prompts.

    meta: the checkpoint's; belongs: `origin` of the model and the prompts that are given now. The
    content of prompts.train counts, not its name, unless the checkpoint is of an earlier version
    and knows the name only.
    """
    saved, now, before, after = (
        meta["config"],
        config,
        meta.get("prompts_digest"),
        belongs["prompts_digest"],
    )
    if before == after:
        now = _with_training_prompts(now, saved["prompts"]["train"])
    elif before is not None:
        saved, now = (
            _with_training_prompts(values, f"{values['prompts']['train']} ({digest[:12]})")
            for values, digest in ((saved, before), (now, after))
        )
    parse.check_resume(saved, now, str(checkpoint))
    model.check_same(meta.get("model_digest"), meta["model"], str(checkpoint), "config.model.path")


def _with_training_prompts(config: dict, name: str) -> dict:
    return config | {"prompts": config["prompts"] | {"train": name}}


def save(
    checkpoints: Checkpoints,
    epoch: int,
    states: dict[str, TrainState],
    config: dict,
    lora: LoRAConfig | None,
    spent: Spent,
    belongs: dict | None = None,
):
    """One checkpoint: the whole state, the weights to sample with (EMA), and what is needed to read
    them. belongs: the run's `origin`.

    All processes write it together. Raises `UserError`, and writes nothing, when their weights
    differ.
    """
    tree = state_tree(states)
    replicas.check_same(tree, f"epoch {epoch}: the trained weights")
    ema = tree.pop("ema")
    checkpoints.save(
        epoch,
        tree,
        ema,
        {
            "config": config,
            "model": config["model"]["path"],
            "experts": list(states),
            "spent": dataclasses.asdict(spent),
            "lora": lora
            and {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)},
            **(belongs or {}),
        },
    )


def spent_by(checkpoints: Checkpoints, epoch: int) -> Spent:
    """What the run had spent; nothing where the checkpoint is older than the count. Raises
    `UserError`.
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
    """The experts' states, on the shardings of `like`."""
    tree, ema = checkpoints.restore_state(epoch, state_tree(like))
    tree["ema"] = ema
    parts = {key: split_experts(value, list(like)) for key, value in tree.items()}
    states = {}
    for name, state in like.items():
        leaves, structure = jax.tree.flatten(state.opt)
        opt = jax.tree.unflatten(
            structure, [parts["opt"][name][str(i)] for i in range(len(leaves))]
        )
        counters = dict(parts["counters"][name])
        states[name] = TrainState(
            trainable=parts["trainable"][name],
            opt=opt,
            ema=parts["ema"][name],
            updates=counters.pop("updates"),
            kl=KLControl(**counters) if counters else None,
            lagged={copy: parts[copy][name] for copy in state.lagged},
        )
    return states
