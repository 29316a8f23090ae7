"""Check of settings that must not contradict each other, for all methods.

`recipe` is a `grpo.settings.schema.Recipe`, or a ConfigDict with the same keys. All checks raise
`UserError` with the keys, the values and a remedy.
"""

import math
import re

from grpo import methods
from grpo.data.labels import LINES
from grpo.learning.method import kl_weight, largest_kl_weight
from grpo.records import trackers
from grpo.scoring.reward_combination import BAD_SIDE
from grpo.scoring.reward_servers import check_settings
from grpo.settings import frame_schedule, video_sizes
from grpo.settings.named import TEXT, own_names, pairs, servers_by_name
from grpo.settings.schema import BUILT_IN, TEXT_AREA, main_reward, measured_rewards
from grpo.settings.sections.data import Data
from rewards.clip import KINDS, check_model
from rewards.own import TARGET
from wan_jax.errors import UserError


def check_together(recipe) -> None:
    """Makes all checks of this module, and those of the recipe's method."""
    check_settings(recipe.reward)
    trackers.check(recipe.log)
    methods.check_variants(recipe)
    check_batches(recipe)
    methods.method_class(recipe.train.method).check(recipe)
    check_updates(recipe)
    check_rewards(recipe)
    check_kl_gate(recipe)
    check_box_kl(recipe)
    check_alarm_kl(recipe)
    check_lora(recipe)
    check_data(recipe)
    check_reward_guidance(recipe)
    check_confidence(recipe)
    check_evaluation(recipe)
    frame_schedule.check(recipe)
    video_sizes.check(recipe)


def videos_of(recipe) -> int:
    """Return the number of videos of an epoch."""
    return recipe.sample.groups * recipe.sample.group_size


def trained_batches(recipe) -> int:
    """Return the number of rollout batches of an epoch that are trained."""
    return (
        (recipe.train.groups or recipe.sample.groups)
        * recipe.sample.group_size
        // recipe.sample.batch_size
    )


def check_batches(recipe) -> None:
    """Check that the videos of an epoch fill its rollout batches."""
    videos, batch = videos_of(recipe), recipe.sample.batch_size
    if videos % batch:
        raise UserError(
            f"config.sample: groups x group_size = {videos} videos do not fill batches of "
            f"batch_size={batch}; choose a divisor of {videos}"
        )


def check_updates(recipe) -> None:
    """Check that the trained batches of an epoch can be divided among its updates. Training on data
    alone has none.
    """
    batches, updates = trained_batches(recipe), recipe.train.updates_per_epoch
    if batches % updates and not recipe.data.only:
        raise UserError(
            f"config.train.updates_per_epoch={updates} does not divide the epoch's {batches} batches"
        )


def check_rewards(recipe) -> None:
    """Check that a reward has a weight, and that each one can be measured."""
    check_own_rewards(recipe)
    weights = measured_rewards(recipe)
    if not any(weights.values()):
        explicit = {name: weights[name] for name in weights if name not in recipe.reward.panel}
        raise UserError(f"config.reward.weights={explicit}: one weight must be above 0")
    text_servers = servers_by_name(recipe.reward.servers).get(TEXT, ())
    boxes = boxes_needed(recipe)
    if boxes and text_servers:
        raise UserError(
            f"{boxes} needs the boxes of the text, which config.reward.servers={text_servers} do not "
            "send: read the text on this machine, without these servers, or leave it out"
        )
    if "ocr" not in weights:
        reads = boxes or (f"config.reward.servers={text_servers}" if text_servers else None)
        if recipe.reward.weights.stability is not None:
            reads = f"config.reward.weights.stability={recipe.reward.weights.stability}"
        if reads:
            raise UserError(
                f"{reads} needs the text that is read, but config.reward.weights.ocr=None: set it "
                "to 0 to read without training on it"
            )
    for name in (kind for kind in KINDS if kind in weights):
        path = recipe.reward[f"{name}_model"]
        if not path or text_servers:
            raise UserError(
                f"config.reward.weights.{name} is scored by the workers here: set "
                f"config.reward.{name}_model={path!r} to the model's folder, and give no "
                f"config.reward.servers={tuple(text_servers)} of the text"
            )
        try:
            check_model(path)
        except ValueError as error:
            raise UserError(f"config.reward.{name}_model: {error}") from None
    quality = {name for name in BAD_SIDE if recipe.reward.weights[name] is not None}
    for key, kind in (("frame_schedule", "length"), ("size_schedule", "size")):
        if recipe.sample[key] and quality:
            raise UserError(
                f"config.reward.weights has {', '.join(sorted(quality))}, which are judged by the base "
                f"model's videos of one {kind}: leave out either them or config.sample.{key}"
            )


def boxes_needed(recipe) -> str | None:
    """Return the first setting that needs the boxes of the text that is read, with its value; None
    without any.
    """
    if recipe.train.box_credit:
        return f"config.train.box_credit={recipe.train.box_credit}"
    if (weight := recipe.reward.weights[TEXT_AREA]) is not None:
        return f"config.reward.weights.{TEXT_AREA}={weight}"
    if TEXT_AREA in recipe.reward.panel:
        return f"config.reward.panel={tuple(recipe.reward.panel)}"
    return None


def check_kl_gate(recipe) -> None:
    """Check that train.kl_gate has a KL in the loss, and rewards to compare the main one with."""
    train, method = recipe.train, methods.method_class(recipe.train.method)
    if train.kl_gate is None or "train.kl_gate" not in method.reads:
        return
    weight, measured = kl_weight(method, recipe), measured_rewards(recipe)
    main = main_reward(measured)
    if not weight or train.kl_as != "loss":
        raise UserError(
            f"config.train.kl_gate={train.kl_gate} chooses the videos of the KL in the loss: it needs "
            f"train.kl_weight={weight} above 0 and train.kl_as={train.kl_as} to be loss"
        )
    if not any(not value and name != main for name, value in measured.items()):
        raise UserError(
            f"config.train.kl_gate={train.kl_gate} compares {main} with rewards that are measured "
            "without a weight, and there are none: give a weight of 0, or measures in "
            f"config.reward.panel={tuple(recipe.reward.panel)}"
        )


def check_box_kl(recipe) -> None:
    """Check that train.box_kl has boxes, and a KL in the loss."""
    train, method = recipe.train, methods.method_class(recipe.train.method)
    if not train.box_kl:
        return
    if not train.box_credit:
        raise UserError(
            f"config.train.box_kl={train.box_kl} holds what lies outside of the boxes of train.box_credit="
            f"{train.box_credit}: give that a value above 0, or leave box_kl out"
        )
    weight = largest_kl_weight(method, recipe)
    if "train.kl_weight" not in method.reads or not weight or train.kl_as != "loss":
        raise UserError(
            f"config.train.box_kl={train.box_kl} is about the KL in the loss: it needs train.kl_weight="
            f"{weight} above 0, train.kl_as={train.kl_as} to be loss, and a method with a KL, which "
            f"train.method={train.method} may not be"
        )


def check_alarm_kl(recipe) -> None:
    """Check that with train.on_alarm=kl there is a KL in the loss whose weight the guard can raise."""
    train, method = recipe.train, methods.method_class(recipe.train.method)
    if train.on_alarm != "kl":
        return
    if "train.kl_weight" not in method.reads:
        raise UserError(
            f"config.train.on_alarm=kl raises the weight of the KL, and train.method={train.method} has "
            "none: set train.on_alarm to log or stop, or choose another method"
        )
    if train.kl_as != "loss" or train.kl_target is not None:
        raise UserError(
            "config.train.on_alarm=kl raises the constant weight of a KL in the loss: it needs "
            f"train.kl_as={train.kl_as} to be loss, and train.kl_target={train.kl_target} to be None"
        )
    weight = kl_weight(method, recipe)
    if not weight < train.alarm_kl < math.inf:
        raise UserError(
            f"config.train.alarm_kl={train.alarm_kl} is the raised weight of the KL: it must be finite "
            f"and above train.kl_weight={weight}"
        )


def check_own_rewards(recipe) -> None:
    """Check the names, modules and weights of the user's own rewards and of named servers."""
    reward = recipe.reward
    own, weights = dict(pairs(reward.own, str)), dict(pairs(reward.own_weights, float))
    names = own_names(reward.own, reward.servers)
    for name in names:
        if name in BUILT_IN or names.count(name) > 1 or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(
                f"config.reward.own={own} and config.reward.servers={tuple(reward.servers)} name a "
                f"reward {name!r}: a name has letters, digits and _, is given once, and is none of "
                f"{', '.join(BUILT_IN)}"
            )
    for name, target in own.items():
        if not TARGET.fullmatch(target):
            raise UserError(
                f"config.reward.own has {name}={target!r}: give MODULE:FACTORY, such as "
                "redness:Redness for the class Redness in redness.py"
            )
    for name, weight in weights.items():
        known, _, part = name.partition(".")
        if known not in names or (part and not part.isidentifier()) or not 0 <= weight < math.inf:
            raise UserError(
                f"config.reward.own_weights has {name}={weight}: give a number of at least 0 for a "
                f"reward of config.reward.own or config.reward.servers, or for a part of one, "
                f"NAME.PART; they are {', '.join(names) or 'none'}"
            )
    if own and reward.workers < 1:
        raise UserError(
            f"config.reward.own={own} with config.reward.workers={reward.workers}: your own rewards "
            "run in scoring processes, never in the training process; set workers to 1 or more"
        )


def check_lora(recipe) -> None:
    """Check that adapters have layers, and that a file of adapters is only given with adapters."""
    lora = recipe.lora
    if lora.rank and not lora.targets:
        raise UserError(
            "config.lora.targets is empty: name the layers to adapt, or train all weights with "
            "lora.rank=0"
        )
    if not lora.rank and recipe.model.weights != "dtype":
        raise UserError(
            f"config.model.weights={recipe.model.weights} stores frozen weights, but lora.rank=0 "
            "trains all of them: set model.weights=dtype, or a rank of adapters"
        )
    if lora.init and not lora.rank:
        raise UserError(
            f"config.lora.init={lora.init} needs adapters to start from: set config.lora.rank as "
            "in the file"
        )


def check_data(recipe) -> None:
    """Check that training on data alone has data, a method that can, and the labels that it needs."""
    data, train = recipe.data, recipe.train
    alone = {m.name: m.of_data for m in methods.all_methods() if m.of_data}
    needs = alone.get(train.method)
    if data.only and not data.path:
        raise UserError(
            "config.data.only=True trains on data alone, and config.data.path='' names none: give a "
            "folder that python -m grpo.encode_clips wrote"
        )
    if data.weight not in (0.0, Data().weight) and not data.path:
        raise UserError(
            f"config.data.weight={data.weight:g} is that of data, and config.data.path='' names none: give "
            "a folder that python -m grpo.encode_clips wrote, or leave the weight out"
        )
    if data.labels and not (data.only and needs in LINES):
        able = ", ".join(name for name, kind in alone.items() if kind in LINES)
        raise UserError(
            f"config.data.labels={data.labels} is read with config.data.only=True and train.method in "
            f"({able}), and this run has data.only={data.only} and train.method={train.method}: set both, or "
            "leave the labels out"
        )
    if data.only and needs is None:
        known = ", ".join(f"{name} ({kind})" for name, kind in alone.items())
        raise UserError(
            f"config.data.only=True with train.method={train.method}, which trains on videos of its own: "
            f"set --config.train.method to one of {known}, or data.only=False for an anchor"
        )
    if data.only and needs in LINES and not data.labels:
        raise UserError(
            f"config.data.labels='' with config.data.only=True: train.method={train.method} trains on "
            f"given {needs}; name a file with a line {LINES[needs]} each"
        )
    if data.only and recipe.budget.evaluations is not None:
        raise UserError(
            f"config.budget.evaluations={recipe.budget.evaluations} with config.data.only=True: training "
            "on data samples nothing, so the run would never spend it; limit epochs or budget.seconds "
            "(grpo.compare: --budget=epochs:N or seconds:N)"
        )
    for key, kind in (("frame_schedule", "length"), ("size_schedule", "size")):
        if data.noise == "rollout" and recipe.sample[key]:
            raise UserError(
                f"config.data.noise=rollout needs videos of one {kind}, and config.sample.{key}="
                f"{tuple(recipe.sample[key])} has several: leave out either"
            )
    if data.only and train.guided:
        raise UserError(
            "config.data.only=True trains the velocity without guidance, and train.guided=True is "
            "about the guided one: set it to False"
        )


def check_reward_guidance(recipe) -> None:
    """Check that guidance in the rollout has a head, and a method that learns from any videos."""
    sample, method = recipe.sample, methods.method_class(recipe.train.method)
    if not sample.reward_guidance:
        return
    if not sample.reward_head:
        raise UserError(
            f"config.sample.reward_guidance={sample.reward_guidance} follows a head, and "
            "config.sample.reward_head='' names none: give a file of python -m grpo.reward_head"
        )
    if sample.size_schedule:
        raise UserError(
            f"config.sample.reward_guidance={sample.reward_guidance}, config.sample.size_schedule="
            f"{sample.size_schedule}: a reward head knows videos of one size; leave one of them out"
        )
    if method.has_ratio:
        raise UserError(
            f"config.sample.reward_guidance={sample.reward_guidance}: train.method={method.name} compares "
            "the policy with the one that sampled, by an importance ratio, and a guided rollout is of "
            "neither: choose a method without a ratio, as nft, or reward_guidance=0"
        )


def check_confidence(recipe) -> None:
    """Check that the method keeps the finished videos that reward.confidence probes."""
    weight, method = recipe.reward.confidence, methods.method_class(recipe.train.method)
    if weight and method.keeps_steps:
        raise UserError(
            f"config.reward.confidence={weight} probes finished videos, and train.method={method.name} "
            "keeps steps instead: choose a method on finished videos, or set it to 0"
        )


def check_evaluation(recipe) -> None:
    """Check the names of further prompts, and that evaluations without guidance are only made where
    the others have guidance.
    """
    for name, path in pairs(recipe.eval.more_prompts, str):
        if not re.fullmatch(r"[A-Za-z]\w*", name) or not path:
            raise UserError(
                f"config.eval.more_prompts has {name}={path!r}: give NAME=FILE, where the name begins "
                "with a letter and has letters, digits and _"
            )
    if recipe.eval.also_unguided and recipe.eval.guidance <= 1:
        raise UserError(
            f"config.eval.also_unguided=True: with eval.guidance={recipe.eval.guidance} there is no "
            "guidance to leave out; set it above 1, or also_unguided=False"
        )
