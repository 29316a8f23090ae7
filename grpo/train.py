"""Trains a Wan model to show the text that its prompts quote, or another property that a reward scores.

    python -m grpo.train --config=configs/tiny_ocr.py [--config.train.learning_rate=1e-4 ...]

The methods are Flow-GRPO (Liu et al., arXiv 2505.05470), DiffusionNFT and their relatives
(`grpo/methods/`). An epoch is the same on one device and on many hosts:

    1  sample    a group of videos for each of the epoch's prompts, by the behaviour policy
    2  score     every video, by the rewards, while the next ones are sampled
    3  credit    compute the advantages of the videos within their groups
    4  update    the policy, by the method's loss
    5  record    the epoch
    6  save      a checkpoint
    7  evaluate  the moving average on held-out prompts; the checkpoint was written before

The same command on the same run folder continues after the newest checkpoint, bit for bit, because
every random draw is a function of (seed, epoch, sample, step). On several hosts every process runs
this program (docs/howto/hosts.md). Each decodes and scores the videos on its devices; the first one writes
and prints.
"""

import contextlib
import os
import pathlib
import signal
import time
import traceback
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from grpo.compiled import offload
from grpo.credit import compute_credit
from grpo.data.prompts import PromptSet
from grpo.learning.confidence import measure_confidence
from grpo.learning.head_guidance import HeadState, refit_head
from grpo.records import epoch_record, run_log, run_output
from grpo.records.clock import Stopwatch
from grpo.records.console import print_once
from grpo.records.forecast import forecast_lines
from grpo.records.progress import estimate
from grpo.report import run_report
from grpo.run import RunSpec, open_model
from grpo.sampling import States, sample_epoch, zero_nonfinite
from grpo.scoring.alarms import stop_on_alarm, weight_of_kl
from grpo.scoring.reward_pool import check_groups, open_pool
from grpo.scoring.run_evaluations import evaluate, evaluation_is_due, read_base
from grpo.scoring.scored_prompts import (
    for_rewards,
    fps_of,
    load_prompt_sets,
)
from grpo.scoring.scores import gather_scores
from grpo.settings import agreement, parse, video_sizes
from grpo.settings.budget import Spent
from grpo.settings.reference import FLAG_HELP
from grpo.setup import Start, prepare
from grpo.update import NotFinite, new_warnings, update_epoch, velocity_excess
from rewards.pool_set import Pool
from wan_jax.command_line import cli
from wan_jax.distributed import launchers, memory, multihost
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.errors import UserError
from wan_jax.models import precision, presets
from wan_jax.storage import folder_lock, model_dir

# the first line that a run prints
SIGNALS = (
    "Ctrl-C once: the run ends after its epoch, which is saved; twice, or before the first evaluation: "
    "at once"
)


def main(_):
    FLAGS = flags.FLAGS
    launch = launchers.choose(
        FLAGS.cluster, FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, os.environ
    )
    with multihost.joined(launch, FLAGS.host_timeout, FLAGS.stage_timeout, FLAGS.join_timeout):
        ended = train_recipe(FLAGS.config)
    if ended is not None:
        raise cli.AskedToEnd(format_end(ended))


def format_end(epoch: int) -> str:
    """Return the last line of a run that a signal ended after an epoch."""
    return (
        f"ended by {cli.asked_by()} after epoch {epoch}, which is saved; the same command continues "
        "after it"
    )


def train_recipe(config, own: Mapping[str, Any] | None = None) -> int | None:
    """Check a recipe's ConfigDict, its prompts and its model, and train. Returns the number of the
    last finished epoch if Ctrl-C or SIGTERM ended the run early, else None. Raises `UserError`.

    own: as in `grpo.scoring.reward_pool.open_pool`.
    """
    recipe = parse.recipe_from_config(config)
    settings = parse.settings_of(recipe)
    prompts, heldout, more = load_prompt_sets(recipe, settings)
    folder = copied = contextlib.nullcontext()
    if multihost.first():
        folder = folder_lock.locked(recipe.run_dir, "--config.run_dir")
        copied = run_output.recorded(pathlib.Path(recipe.run_dir, run_log.CONFIG))
    with folder as lock, copied as output:
        if signal.getsignal(signal.SIGINT) is cli.interrupt:  # not in a program of the user's
            print_once(SIGNALS)
        multihost.stage("comparing the processes")
        if jax.process_count() > 1:
            sets = {"prompts.train": prompts, "prompts.heldout": heldout}
            sets |= {f"eval.more_prompts {name}": each for name, each in more.items()}
            agreement.check(recipe, sets)
        cli.enable_compilation_cache()
        precision.use(recipe.model.matmul_precision)
        with cli.user_input():
            model = open_model(recipe)
            spec = RunSpec.make(recipe, settings, presets.of_folder(model))
            if recipe.train.offload_optimiser:
                offload.check_device(spec.mesh.local_devices[0])
        prompts, heldout = (
            for_rewards(each, settings.weights, fps_of(spec.preset)) for each in (prompts, heldout)
        )
        more = {
            name: for_rewards(each, settings.weights, fps_of(spec.preset))
            for name, each in more.items()
        }
        boxes = recipe.train.box_credit > 0
        with open_pool(recipe.reward, settings.weights, own, boxes=boxes) as pool:
            sharding = sharding_lib.batch_sharding(spec.mesh)
            check_groups(pool, recipe, multihost.my_rows(sharding, recipe.sample.batch_size))
            ended = train(spec, model, prompts, heldout, pool, lock, more)
        if output is not None and ended is not None:
            output.add(format_end(ended))
        return ended


def train(
    spec: RunSpec,
    model: model_dir.ModelDir,
    prompts: PromptSet,
    heldout: PromptSet,
    pool: Pool,
    lock: folder_lock.Lock | None = None,
    more: Mapping[str, PromptSet] | None = None,
) -> int | None:
    """Train a run. Returns the number of the last finished epoch if Ctrl-C or SIGTERM ended it early,
    else None.

    prompts, heldout: of training and of evaluations. pool: the processes that score. lock: of the
    run's folder, in process 0. more: prompts of further evaluations by name.
    """
    recipe, settings = spec.recipe, spec.settings
    start = prepare(spec, model, prompts, heldout, pool, lock, more)
    session, states, spent = start.session, start.states, start.spent
    head = start.head
    folder, log, done = start.folder, start.log, start.resumed or 0

    # ---- before the first epoch: a checkpoint, an evaluation ---------------------------------
    cli.end_well_on_signals()
    if start.resumed is None:
        count = sum(v.size for state in states.values() for v in jax.tree.leaves(state.trainable))
        seen = "data alone" if recipe.data.only else f"{settings.videos} videos an epoch"
        print_once(f"{count:,} trained parameters, {seen}")
        multihost.stage("epoch 0: saving")
        folder.save(0, states, spent, head)
    elif start.epochs or start.unevaluated:
        print_once(f"continuing {recipe.run_dir} after epoch {done}")
    else:
        print_once(
            f"{recipe.run_dir} is finished: epoch {done} was its last one. To train on, raise "
            "--config.epochs, or the budget that ended it"
        )
    if start.unevaluated:
        evaluate(start, states, done, start.unevaluated)
        write_report(recipe.run_dir)
    base, kl_weight = {}, None
    if start.epochs:
        folder.check_space(states, head)
        stop_on_alarm(start, states, done, spent, head)
        newest = multihost.from_first(lambda: [*log.epochs][-1:])
        stop_on_distance(start, states, newest[0] if newest else {}, spent, head)
        kl_weight = weight_of_kl(start, done, None)
        base = multihost.from_first(lambda: read_base(recipe.run_dir, settings.weights))
        for line in forecast_lines(spec, log):
            print_once(line)

    epoch = done
    last = False  # whether the epoch is the last one
    save_seconds = 0.0  # of the previous epoch
    warned: set[str] = set()  # kinds of warnings, which are printed once
    updated: set[video_sizes.Size] = set()  # sizes of epochs with updates, which compile no more
    for epoch in start.epochs:
        start.compiled.clear()
        clock = Stopwatch()
        session = start.session.of_epoch(epoch)

        rollout = scores = credit = None
        logged: dict[str, float] = {}
        if not recipe.data.only:  # training on data alone samples and scores nothing
            # ---- 1 sample --------------------------------------------------------------------
            rollout, pending = sample_epoch(session, states, epoch, clock, head)

            # ---- 2 score ---------------------------------------------------------------------
            multihost.stage(f"epoch {epoch}: scores")
            scores = gather_scores(pending, settings.videos, settings.main)
            clock("score_wait")
            rollout = zero_nonfinite(rollout, scores.finite, spec.mesh)

            # ---- 3 credit --------------------------------------------------------------------
            sure, logged = measure_confidence(session, states, rollout, scores.valid)
            clock("sample")  # the model's work, not a wait for scores
            credit = compute_credit(session.spec, scores, rollout.prompt_of, base, sure)
            if not credit.valid.any():
                folder.save(epoch - 1, states, spent, head)  # finished epochs, despite save.every
                raise UserError(
                    f"epoch {epoch}: not one of {settings.videos} videos could be scored; "
                    f"{scores.why()}. Epoch {epoch - 1} is saved: once this is fixed, the same "
                    "command continues after it"
                )

        # ---- 4 update ------------------------------------------------------------------------
        multihost.stage(f"epoch {epoch}: update")
        try:
            states, losses = update_epoch(session, states, epoch, rollout, credit, kl_weight)
        except NotFinite as error:
            newest = folder.checkpoints.latest()
            checkpoint = "none" if newest is None else folder.checkpoints.path(newest)
            raise UserError(
                f"{error}. The epoch was not saved; the last good checkpoint is {checkpoint}. Lower "
                "--config.train.learning_rate, or raise --config.train.kl_weight, in a new run_dir"
            ) from None
        if head is not None and rollout is not None and credit is not None:
            head = refit_head(session.functions, head, rollout, credit)
        clock("update", [state.trainable for state in states.values()])

        # ---- 5 record ------------------------------------------------------------------------
        nonfinite = scores is not None and scores.nonfinite
        size = video_sizes.at(epoch, recipe.sample)
        if size in updated and not nonfinite:
            recompiled = start.compiled.warning(epoch)
            if recompiled:
                print_once(recompiled)
        if losses["updates"]:
            updated.add(size)
        for warning in new_warnings(spec, losses, warned):
            print_once(warning)
        seconds = clock.seconds | {"save": save_seconds, "total": clock.total}
        # of process 0, without compilation
        working = max(0.0, multihost.gather(clock.total - start.compiled.seconds)[0])
        spent += Spent(0 if rollout is None else rollout.evaluations, working)
        last = epoch == recipe.epochs or settings.budget.reached(spent)
        if rollout is None or scores is None or credit is None:
            record = epoch_record.make_of_data(epoch, losses, spent, seconds)
        else:
            losses |= logged
            record = epoch_record.make(spec, epoch, rollout, scores, credit, losses, spent, seconds)
        del rollout
        folder.check_held()
        log.epoch(record)
        progress = estimate([*log.epochs], [*log.evaluations], recipe.to_dict())
        print_once(epoch_record.line(record, recipe.epochs, progress))

        # ---- 6 save: before the evaluation, so that its failure does not cost the epoch --------
        saving = time.monotonic()
        multihost.stage(f"epoch {epoch}: saving")
        ending = asked_to_end()
        due = evaluation_is_due(spec, epoch, spent)
        if epoch % recipe.save.every == 0 or last or ending or (due and recipe.save.best):
            folder.save(epoch, states, spent, head)
        save_seconds = time.monotonic() - saving  # logged with the next epoch

        # ---- 7 evaluate: an interrupted evaluation is made when the run continues --------------
        if due and (last or not ending):
            evaluate(start, states, epoch, spec.evaluations)
            if not last:
                write_report(recipe.run_dir)
                stop_on_alarm(start, states, epoch, spent, head)
                kl_weight = weight_of_kl(start, epoch, kl_weight)
            ending = asked_to_end()
            if ending:
                folder.save(epoch, states, spent, head)
        if not last:
            stop_on_distance(start, states, record, spent, head)
        if last or ending:
            break

    # ---- after the last epoch: the report ----------------------------------------------------
    log.close()
    print_once(memory.peaks())
    write_report(recipe.run_dir, last=True)
    if multihost.first():
        print_once(*run_report.summary_lines(pathlib.Path(recipe.run_dir)))
    return epoch if start.epochs and not last else None


def write_report(run_dir: str, last: bool = False) -> None:
    """Write report.html from what is recorded so far, in the first process. last: with the files that
    show both ends of the run side by side.
    """
    if not multihost.first():
        return
    try:
        run_report.write_report(pathlib.Path(run_dir), pairs=last)
    except OSError as error:
        print_once(f"warning: the report was not written: {error}")
    # Broad, because a page must not cost the training of a run, whatever is wrong with it.
    except Exception:
        print_once(f"warning: the report was not written:\n{traceback.format_exc()}")


def stop_on_distance(
    start: Start,
    states: States,
    record: Mapping[str, Any],
    spent: Spent,
    head: HeadState | None,
) -> None:
    """Raise `UserError` where the velocity in an epoch's record is further from that of earlier weights
    than train.max_velocity_distance. Everything is saved before. head: that guides the rollout.
    """
    spec, epoch = start.session.spec, record.get("epoch", 0)
    excess = velocity_excess(spec, record)
    if excess is not None:
        start.folder.save(epoch, states, spent, head)
        write_report(spec.recipe.run_dir)
        has_kl = "train.kl_weight" in spec.method.reads
        raise UserError(
            f"epoch {epoch}: {excess}, so the run stops. Epoch {epoch} is saved. To continue "
            "anyway, raise the bound; in a new run_dir lower --config.train.learning_rate"
            + (" or raise --config.train.kl_weight" if has_kl else "")
        )


def asked_to_end() -> bool:
    """Return whether Ctrl-C or SIGTERM reached any process. All processes must call this together."""
    return any(multihost.gather(cli.asked_to_end.is_set()))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, FLAG_HELP, lock_config=True)
    flags.DEFINE_enum(
        "cluster",
        "auto",
        launchers.CLUSTERS,
        "source of the list of processes on several hosts: srun or mpirun where these started more than "
        "one process (auto), an indexed Kubernetes job (k8s), or no source (none); see docs/howto/hosts.md",
    )
    flags.DEFINE_string(
        "coordinator", None, "instead of --cluster: host:port of process 0, with a free port"
    )
    flags.DEFINE_integer(
        "num_processes", None, "with --coordinator: number of processes that run this command"
    )
    flags.DEFINE_integer("process_id", None, "with --coordinator: number of this process, from 0")
    flags.DEFINE_integer(
        "join_timeout", 300, "seconds within which all processes must have started"
    )
    flags.DEFINE_integer(
        "host_timeout",
        100,
        "seconds without a signal of a process after which the others end the run",
    )
    flags.DEFINE_integer(
        "stage_timeout",
        7200,
        "seconds without progress to another batch or stage in any process after which the run ends; "
        "0: no limit",
    )
    flags.mark_flag_as_required("config")
    cli.run(main)
