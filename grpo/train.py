"""Trains a Wan model to write what its prompts quote, or whatever else a reward scores.

    python -m grpo.train --config=configs/tiny_ocr.py [--config.train.learning_rate=1e-4 ...]

Flow-GRPO (Liu et al., arXiv 2505.05470), DiffusionNFT and their relatives (`grpo/methods/`). An
epoch, the same on one device and on many hosts:

    1  sample    a group of videos for each of the epoch's prompts, by the behaviour policy
    2  score     every video, by the rewards, while the next ones are sampled
    3  credit    advantages of the videos within their groups
    4  update    the policy, by the method's loss
    5  record    the epoch
    6  save      a checkpoint
    7  evaluate  the moving average on held-out prompts: saved before it is judged

The same command on the same run folder continues after the newest checkpoint, bit for bit: every
random draw is a function of (seed, epoch, sample, step). On several hosts every process runs this
program (docs/hosts.md); each decodes and scores the videos on its own devices, and the first one
writes and prints.
"""

import contextlib
import os
import pathlib
import time

import jax
from absl import flags
from ml_collections import config_flags

from grpo.compiled import offload
from grpo.credit import compute_credit
from grpo.data.prompts import PromptSet, epoch_prompts, load_prompts
from grpo.records import epoch_record, run_log
from grpo.records.clock import Stopwatch
from grpo.report import run_report
from grpo.run import RunSpec
from grpo.sampling import averaged_weights, blanked, sample_epoch
from grpo.scoring import reward_combination
from grpo.scoring.heldout import Evaluation, format_evaluation
from grpo.scoring.scores import for_rewards, gather_scores, open_pool, targets_check
from grpo.settings import agreement, frame_schedule, parse
from grpo.settings.budget import Spent
from grpo.settings.reference import FLAG_HELP
from grpo.setup import Start, evaluation_is_due, prepare, progress_bar, say
from grpo.update import NotFinite, update_epoch
from rewards.ocr.targets import parse_targets
from rewards.pool import RewardPool
from wan_jax.command_line import cli
from wan_jax.distributed import launchers, memory, multihost
from wan_jax.errors import UserError
from wan_jax.models import presets
from wan_jax.models.tokenizer import clean
from wan_jax.storage import folder_lock, model_dir

CONFIG = config_flags.DEFINE_config_file("config", None, FLAG_HELP, lock_config=True)
CLUSTER = flags.DEFINE_enum(
    "cluster",
    "auto",
    launchers.CLUSTERS,
    "where a run on several hosts learns of its processes: "
    "from srun or mpirun where these started more than one (auto), from an indexed Kubernetes "
    "job (k8s), or nowhere (none); see docs/hosts.md",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "in place of --cluster: host:port of process 0, a free port"
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "with --coordinator: how many processes run this command"
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "with --coordinator: this one's number, from 0"
)
JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "seconds in which all processes must have started"
)
HOST_TIMEOUT = flags.DEFINE_integer(
    "host_timeout", 100, "seconds after which a silent process ends the run on the others"
)
STAGE_TIMEOUT = flags.DEFINE_integer(
    "stage_timeout",
    7200,
    "seconds in which some process must get on to another "
    "batch or stage, or the run ends; 0: no limit",
)


def main(_):
    launch = launchers.choose(
        CLUSTER.value, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, os.environ
    )
    with multihost.joined(launch, HOST_TIMEOUT.value, STAGE_TIMEOUT.value, JOIN_TIMEOUT.value):
        ended = train_recipe(CONFIG.value)
    if ended is not None:
        raise cli.AskedToEnd(
            f"ended by SIGTERM after epoch {ended}, which is saved; the same command continues "
            "from it"
        )


def train_recipe(config) -> int | None:
    """Check a recipe's ConfigDict and what it names, and train. Returns what `train` does."""
    recipe = parse.recipe_from_config(config)
    settings = parse.settings_of(recipe)
    prompts, heldout = load_prompt_sets(recipe, settings)
    lock = contextlib.nullcontext()
    if multihost.first():
        lock = folder_lock.locked(recipe.run_dir, "--config.run_dir")
    with lock as held:
        multihost.stage("comparing the processes")
        if jax.process_count() > 1:
            sets = {"prompts.train": prompts, "prompts.heldout": heldout}
            agreement.check(recipe, sets)
        cli.enable_compilation_cache()
        with cli.user_input():
            model = model_dir.open_model(recipe.model.path)
            spec = RunSpec.make(recipe, settings, presets.of_folder(model))
            if recipe.train.offload_optimiser:
                offload.check_device(spec.mesh.local_devices[0])
        with open_pool(recipe.reward, settings.weights) as pool:
            return train(spec, model, prompts, heldout, pool, held)


def load_prompt_sets(recipe, settings: parse.Settings) -> tuple[PromptSet, PromptSet]:
    """Return the prompts of training and of evaluation. Raises `UserError` where they overlap, or
    cannot be scored.
    """
    check = targets_check(recipe.reward)
    prompts = load_prompts(recipe.prompts.train, parse_targets, check=check)
    heldout = load_prompts(
        recipe.prompts.heldout, parse_targets, limit=recipe.eval.num_prompts, check=check
    )
    epoch_prompts(recipe.seed, 0, len(prompts), recipe.sample.groups)  # raises where too few
    if overlap := set(map(clean, prompts.prompts)) & set(map(clean, heldout.prompts)):
        raise UserError(
            f"{len(overlap)} held-out prompts are training prompts too, e.g. {min(overlap)!r}"
        )
    return for_rewards(prompts, settings.weights), for_rewards(heldout, settings.weights)


def train(
    spec: RunSpec,
    model: model_dir.ModelDir,
    prompts: PromptSet,
    heldout: PromptSet,
    pool: RewardPool,
    lock: folder_lock.Lock | None = None,
) -> int | None:
    """Train. Returns the last epoch where SIGTERM ends the run early. lock: of the run's folder, in
    process 0.
    """
    recipe, settings = spec.recipe, spec.settings
    start = prepare(spec, model, prompts, heldout, pool, lock)
    session, states, spent = start.session, start.states, start.spent
    folder, log, done = start.folder, start.log, start.resumed or 0

    cli.end_well_on_sigterm()
    if start.resumed is None:
        count = sum(v.size for state in states.values() for v in jax.tree.leaves(state.trainable))
        say(f"{count:,} trained parameters, {settings.videos} videos an epoch")
        multihost.stage("epoch 0: saving")
        folder.save(0, states, spent)
    elif start.epochs or start.unevaluated:
        say(f"continuing {recipe.run_dir} after epoch {done}")
    if start.unevaluated:
        evaluate(start, states, done, start.unevaluated)
    base = {}
    if start.epochs:
        base = multihost.from_first(lambda: read_base(recipe.run_dir, settings.weights))

    last, warned, save_seconds = False, None, 0.0
    for epoch in start.epochs:
        start.compiled.clear()
        clock = Stopwatch()

        # ---- 1 sample ------------------------------------------------------------------------
        rollout, pending = sample_epoch(session, states, epoch, clock)

        # ---- 2 score -------------------------------------------------------------------------
        multihost.stage(f"epoch {epoch}: scores")
        scores = gather_scores(pending, settings.videos)
        clock("score_wait")
        rollout = blanked(rollout, scores.finite, spec.mesh)

        # ---- 3 credit ------------------------------------------------------------------------
        credit = compute_credit(spec, scores, rollout.prompt_of, base)
        if not credit.valid.any():
            folder.save(epoch - 1, states, spent)  # what is finished stays, whatever save.every is
            raise UserError(
                f"epoch {epoch}: not one of {settings.videos} videos could be scored; "
                f"{scores.why()}. Epoch {epoch - 1} is saved: the same command continues after it, "
                "once that is mended"
            )

        # ---- 4 update ------------------------------------------------------------------------
        multihost.stage(f"epoch {epoch}: update")
        try:
            states, losses = update_epoch(session, states, epoch, rollout, credit)
        except NotFinite as error:
            good = folder.checkpoints.path(folder.checkpoints.latest())
            raise UserError(
                f"{error}. Nothing was saved; the last good checkpoint is {good}. Lower "
                "--config.train.learning_rate, or raise --config.train.kl_weight, in a new run_dir"
            ) from None
        clock("update", [state.trainable for state in states.values()])

        # ---- 5 record ------------------------------------------------------------------------
        if epoch > done + 1 and same_length(recipe, epoch) and not scores.nonfinite:
            if warning := start.compiled.warning(epoch):
                say(warning)
        if not warned and (warned := spec.method.warning(losses)):
            say(warned)
        seconds = clock.seconds | {"save": save_seconds, "total": clock.total}
        working = max(0.0, multihost.gather(clock.total - start.compiled.seconds)[0])
        spent += Spent(rollout.evaluations, working)
        last = epoch == recipe.epochs or settings.budget.reached(spent)
        record = epoch_record.make(spec, epoch, rollout, scores, credit, losses, spent, seconds)
        del rollout
        folder.check_held()
        log.epoch(record)
        say(epoch_record.line(record, recipe.epochs))

        # ---- 6 save: before it is judged, so that no evaluation costs an epoch ----------------
        saving = time.monotonic()
        multihost.stage(f"epoch {epoch}: saving")
        ending = asked_to_end()
        if epoch % recipe.save.every == 0 or last or ending:
            folder.save(epoch, states, spent)
        save_seconds = time.monotonic() - saving  # logged with the next epoch

        # ---- 7 evaluate: one that is cut off is made when the run goes on ----------------------
        if evaluation_is_due(spec, epoch, spent) and (last or not ending):
            evaluate(start, states, epoch, spec.evaluated_frames)
            if ending := asked_to_end():
                folder.save(epoch, states, spent)
        if last or ending:
            break
    log.close()
    say(memory.peaks())
    if multihost.first():
        path = run_report.write_report(pathlib.Path(recipe.run_dir))
        say(*run_report.summary_lines(pathlib.Path(recipe.run_dir)) or [f"report: {path}"])
    return epoch if start.epochs and not last else None


def evaluate(start: Start, states, epoch: int, lengths: tuple[int, ...]) -> None:
    """Evaluate the moving average at some lengths of videos, and record it."""
    session, spec = start.session, start.session.spec
    for frames in lengths:
        result = start.evaluators[frames](
            lambda expert: averaged_weights(session, states, expert),
            epoch,
            lambda batches, **options: progress_bar(batches, desc="evaluation", **options),
        )
        further = frames != spec.evaluated_frames[0]
        start.folder.check_held()
        if epoch == 0 and not further:
            check_base(result, spec.settings.weights)
        start.log.evaluation(result.record, result.videos, frames if further else None)
        several = f", {frames} frames" if len(start.evaluators) > 1 else ""
        say(f"epoch {epoch}: held-out {format_evaluation(result.record)}{several}")
        if result.warning:
            say(result.warning)


def same_length(recipe, epoch: int) -> bool:
    """Return whether an epoch's videos have the length of those before: nothing is compiled then."""
    sample = recipe.sample
    before, now = (
        frame_schedule.at(n, sample.frames, sample.frame_schedule) for n in (epoch - 1, epoch)
    )
    return before == now


def asked_to_end() -> bool:
    """Return whether SIGTERM reached any process; all must ask."""
    return any(multihost.gather(cli.asked_to_end.is_set()))


def check_base(result: Evaluation, weights: dict[str, float]) -> None:
    """Raises `UserError` where the first evaluation could not measure by what later videos are
    judged. It is not recorded then, so the same command makes it again.
    """
    if missing := reward_combination.without_base(weights, result.record.get("measures", {})):
        raise UserError(
            f"epoch 0: the evaluation of the starting model measured {', '.join(missing)} for "
            "fewer than two videos, and the quality of later videos is judged by it; "
            f"{result.why}. The same command measures it again; without "
            f"config.reward.weights.{missing[0]} a new run does not need it"
        )


def read_base(run_dir: str, weights: dict[str, float]) -> reward_combination.Base:
    """The measures of the first evaluation. Raises `UserError` where the run's folder has lost
    them.
    """
    first = run_log.read_evaluations(run_dir)[:1]
    measures = first[0].get("measures", {}) if first and first[0]["epoch"] == 0 else {}
    if missing := reward_combination.without_base(weights, measures):
        raise UserError(
            f"{run_dir}/{run_log.EVALUATIONS} has no evaluation of epoch 0 with "
            f"{', '.join(missing)}, by which the quality of later videos is judged; start a new "
            "run with another --config.run_dir"
        )
    return measures


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
