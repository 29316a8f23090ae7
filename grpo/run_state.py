"""What a checkpoint holds of a run: each trained expert's weights, optimiser, moving average and update count, and the
old weights of methods that keep them."""

import dataclasses
from collections.abc import Callable

import jax

from grpo.budget import Spent
from grpo.losses import KLControl
from grpo.update import TrainState
from wan_jax import hosts
from wan_jax.checkpoint import Checkpoints, join_experts, split_experts
from wan_jax.cli import UserError
from wan_jax.lora import LoRAConfig


def state_tree(states: dict[str, TrainState]) -> dict:
    """What a checkpoint stores of the experts' states; 'ema' as the weights to sample with, the rest as the state."""
    def joined(part: Callable[[TrainState], dict]) -> dict:
        return join_experts({name: part(state) for name, state in states.items()})

    tree = {"trainable": joined(lambda state: state.trainable), "ema": joined(lambda state: state.ema),
            "opt": joined(lambda state: {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt))}),
            "counters": joined(lambda state: {"updates": state.updates} | (vars(state.kl) if state.kl else {}))}
    if any(state.old for state in states.values()):
        tree["old"] = joined(lambda state: state.old)
    return tree


def save(checkpoints: Checkpoints, epoch: int, states: dict[str, TrainState], config: dict, lora: LoRAConfig | None,
         spent: Spent):
    """One checkpoint: the whole state, the weights to sample with (EMA), and what is needed to read them.

    All processes write it together. Raises `UserError`, and writes nothing, when their weights differ.
    """
    tree = state_tree(states)
    hosts.check_same(tree, f"epoch {epoch}: the trained weights")
    ema = tree.pop("ema")
    checkpoints.save(epoch, tree, ema, {
        "config": config, "model": config["model"]["path"], "experts": list(states), "spent": dataclasses.asdict(spent),
        "lora": lora and {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}})


def spent_by(checkpoints: Checkpoints, epoch: int) -> Spent:
    """What the run had spent; nothing where the checkpoint is older than the count. Raises `UserError`."""
    try:
        return Spent(**checkpoints.meta(epoch).get("spent", {}))
    except TypeError:
        raise UserError(f"{checkpoints.path(epoch)} is damaged: its meta has no valid 'spent'") from None


def restore(checkpoints: Checkpoints, epoch: int, like: dict[str, TrainState]) -> dict[str, TrainState]:
    """The experts' states, on the shardings of `like`."""
    tree, ema = checkpoints.restore_state(epoch, state_tree(like))
    tree["ema"] = ema
    parts = {key: split_experts(value, list(like)) for key, value in tree.items()}
    states = {}
    for name, state in like.items():
        leaves, structure = jax.tree.flatten(state.opt)
        opt = jax.tree.unflatten(structure, [parts["opt"][name][str(i)] for i in range(len(leaves))])
        counters = dict(parts["counters"][name])
        states[name] = TrainState(parts["trainable"][name], opt, parts["ema"][name], counters.pop("updates"),
                                  KLControl(**counters) if counters else None,
                                  parts["old"][name] if state.old else None)
    return states
