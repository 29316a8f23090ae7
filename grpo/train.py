"""Trains a Wan model to write what its prompts quote: Flow-GRPO (Liu et al., arXiv 2505.05470) with
an OCR reward, or one of its relatives that train on the finished videos
(`grpo.methods.flow_matching`).

    python -m grpo.train --config=configs/tiny_ocr.py [--config.train.learning_rate=1e-4 ...]

One linear program: settings, prompts, model, policy, restore; then, epoch by epoch, sample, score,
update (`grpo.learner`), log, save, evaluate. The same command on the same run folder continues
after the newest checkpoint, bit for bit: every random draw is a function of (seed, epoch, sample,
step). On several hosts every process runs this program (docs/hosts.md); each decodes and scores the
videos on its own devices, and the first one writes and prints.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import time

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from convert.lora import initial_adapters
from grpo import train_state
from grpo.compiled import compile, placement
from grpo.compiled import offload as optimiser_offload
from grpo.compiled.functions import Run
from grpo.data.prompts import PromptSet, epoch_prompts, examples, load_prompts
from grpo.learner import Learner, Stopwatch, clip_warning
from grpo.policy import make_policy
from grpo.records import run_log
from grpo.records.run_log import RunLog, SilentLog
from grpo.report import run_report
from grpo.scoring import reward_combination
from grpo.scoring.heldout import Evaluation, Evaluator, said
from grpo.scoring.reward_combination import MAIN
from grpo.scoring.scores import for_rewards, format_failures, open_pool, targets_check
from grpo.sde_windows import Windows
from grpo.settings import agreement, frame_schedule, parse
from grpo.settings.budget import Spent
from grpo.settings.unused import changed_in_vain
from grpo.update import init_state
from rewards.ocr.targets import parse_targets
from rewards.workers import RewardPool
from wan_jax.command_line import cli
from wan_jax.diffusion.experts import Weights, segments
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.diffusion.solvers import make_solver
from wan_jax.distributed import memory, multihost
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.models import presets
from wan_jax.models.attention import choose_backend, platform_of
from wan_jax.models.tokenizer import clean
from wan_jax.storage import folder_lock, media, model_dir
from wan_jax.storage.checkpoint import Checkpoints

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "recipe, e.g. configs/tiny_ocr.py", lock_config=True
)
CLUSTER = flags.DEFINE_enum(
    "cluster",
    "auto",
    multihost.CLUSTERS,
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
    launch = multihost.choose(
        CLUSTER.value, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, os.environ
    )
    with multihost.joined(launch, HOST_TIMEOUT.value, STAGE_TIMEOUT.value, JOIN_TIMEOUT.value):
        ended = train_recipe(CONFIG.value)
    if ended is not None:
        raise cli.AskedToEnd(
            f"ended by SIGTERM after epoch {ended}, which is saved; the same command continues "
            "from it"
        )


def train_recipe(c) -> int | None:
    """Checks the recipe `c` and what it names, and trains. Returns what `train` does."""
    s = parse.from_config(c)
    check = targets_check(c.reward)
    train_prompts = load_prompts(c.prompts.train, parse_targets, check=check)
    heldout = load_prompts(c.prompts.heldout, parse_targets, limit=c.eval.num_prompts, check=check)
    epoch_prompts(c.seed, 0, len(train_prompts), c.sample.groups)
    if overlap := set(map(clean, train_prompts.prompts)) & set(map(clean, heldout.prompts)):
        raise UserError(
            f"{len(overlap)} held-out prompts are training prompts too, e.g. {min(overlap)!r}"
        )
    train_prompts, heldout = (
        for_rewards(prompts, s.weights) for prompts in (train_prompts, heldout)
    )
    with (
        folder_lock.locked(c.run_dir, "--config.run_dir")
        if multihost.first()
        else contextlib.nullcontext() as lock
    ):
        multihost.stage("comparing the processes")
        if jax.process_count() > 1:
            agreement.check(c, {"prompts.train": train_prompts, "prompts.heldout": heldout})
        cli.keep_compiled_programs()
        with cli.user_input():
            plan = Plan.make(c, s)
        with open_pool(c.reward, s.weights) as pool:
            return train(c, s, plan, train_prompts, heldout, pool, lock)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from settings, model folder and devices before any weight is read."""

    mesh: jax.sharding.Mesh
    spread: str  # how the run lies on the mesh, for the log
    model: model_dir.ModelDir
    backend: str  # of attention
    # latents of one video of so many frames, in training or evaluation
    shapes: dict[int, tuple[int, ...]]
    eval_frames: tuple[int, ...]  # of the evaluations; by the first the run is judged
    solver: object  # of the evaluation
    trained: tuple[str, ...]  # experts
    # each expert's to start from; None: fresh ones
    adapters: dict[str, dict[str, np.ndarray]] | None

    @classmethod
    def make(cls, c, s: parse.Settings) -> "Plan":
        """Raises ValueError or `UserError` where settings, model and devices do not fit together."""
        model = model_dir.open_model(c.model.path)
        config, vae = model.config("transformer"), model.config("vae")
        mesh, spread = placement.choose_mesh(
            c,
            s,
            config,
            experts=len(model.experts),
            trained=len(set(model.experts) & set(c.train.experts)),
        )
        if c.train.offload_optimiser:
            optimiser_offload.check_device(mesh.local_devices[0])
        backend = choose_backend(
            c.model.attention, platform_of(mesh.devices.flat[0]), s.dtype, config.attention_head_dim
        )
        eval_frames = frame_schedule.evaluated(c.sample.frames, c.eval.frames, c.eval.more_frames)
        if max(eval_frames) > 1:
            media.check_ffmpeg()  # for the report
        shapes = {
            length: pipeline.latent_shape(length, c.sample.height, c.sample.width, vae, config)
            for length in (
                *frame_schedule.trained(c.sample.frames, c.sample.frame_schedule),
                *eval_frames,
            )
        }
        schedule, solver = (
            flow_sigmas(c.sample.steps, c.sample.shift),
            make_solver(c.eval.solver, c.eval.steps, c.sample.shift),
        )
        trained = tuple(name for name in model.experts if name in c.train.experts)
        if not trained:
            raise UserError(
                f"config.train.experts={tuple(c.train.experts)} leaves nothing to train: "
                f"{c.model.path} has {', '.join(model.experts)}"
            )
        parts = segments(schedule.timesteps, model.boundary)
        # raises where an expert would learn nothing
        Windows.make(c.sample, parts, model.experts, trained, s.levels)
        adapters = initial_adapters(c.lora.init, model, s.lora) if c.lora.init else None
        return cls(mesh, spread, model, backend, shapes, eval_frames, solver, trained, adapters)


def train(
    c,
    s: parse.Settings,
    plan: Plan,
    train_prompts: PromptSet,
    heldout: PromptSet,
    pool: RewardPool,
    lock: folder_lock.Lock | None = None,
) -> int | None:
    """The run. Where SIGTERM ends it early: the last epoch. lock: of the run's folder, in process
    0.
    """
    check_folder = lock.check_held if lock else lambda: None
    mesh, model, solver = plan.mesh, plan.model, plan.solver
    checkpoints = Checkpoints(c.run_dir, keep=c.save.keep)
    restored, spent, belongs = (
        multihost.from_first(checkpoints.begin),
        Spent(),
        train_state.origin(model, train_prompts),
    )
    if restored is not None:
        meta = checkpoints.check(restored)
        spent = train_state.spent_by(checkpoints, restored)
        train_state.check_resume(meta, checkpoints.path(restored), c.to_dict(), model, belongs)
    done = restored or 0
    epochs = range(done + 1, (done if s.budget.reached(spent) else c.epochs) + 1)

    def evaluation_is_due(epoch: int) -> bool:
        return epoch % c.eval.every == 0 or epoch == c.epochs or s.budget.reached(spent)

    # evaluations that an interrupted run has not made of its newest checkpoint; of a new run: those
    # of the base model
    missing = (
        plan.eval_frames
        if restored is None
        else multihost.from_first(
            lambda: (
                not_evaluated(c.run_dir, done, plan.eval_frames) if evaluation_is_due(done) else ()
            )
        )
    )
    processes = f" on {jax.process_count()} processes" if jax.process_count() > 1 else ""
    say(
        f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}{processes}, attention "
        f"{plan.backend}, weights {c.model.dtype}"
    )
    say(plan.spread, *changed_in_vain(c), *examples(train_prompts), sep="\n")

    everything = PromptSet(
        train_prompts.prompts + heldout.prompts, train_prompts.targets + heldout.targets
    )
    bar = functools.partial(
        tqdm,
        leave=False,
        dynamic_ncols=True,
        disable=not (sys.stderr.isatty() and multihost.first()),
    )

    # ---- programs: compiled, and refused where they do not fit, before any weight is read --------
    multihost.stage("compiling")
    with cli.user_input():
        text_rows = multihost.from_first(
            lambda: pipeline.text_rows(model, everything.prompts, c.prompts.negative, dtype=s.dtype)
        )
        limit = memory.limit(mesh.local_devices[0])
        run = Run(presets.of_folder(model), c, mesh, plan.backend, text_rows, limit)
        offload = compile.offloads(run, limit)
    if epochs or missing:
        say(f"rematerialisation: {run.remat}")
        needed = compile.compile_all(run, offload, functools.partial(bar, desc="compiling"))
        say(*needed.table(limit), sep="\n")
        compile.check_fits(needed, run, offload, limit, memory.pinned_limit(mesh.local_devices[0]))
    compiled = compile.CompileCounter()

    multihost.stage("encoding the prompts")
    table = multihost.from_first(
        lambda: pipeline.embed_prompts(
            model,
            everything.prompts,
            c.prompts.negative,
            dtype=s.dtype,
            progress=functools.partial(bar, desc="prompts"),
            cache=True,
        )
    )
    multihost.stage("loading the weights")
    eval_table = dataclasses.replace(table, prompts=table.prompts[len(train_prompts) :])
    vae_graph, vae_state = pipeline.load_vae(model, mesh)
    decode = pipeline.make_decoder(vae_graph, programs=run.decoder)

    # ---- policy, optimiser, restore --------------------------------------------------------------
    key, config = jax.random.key(c.seed), model.config("transformer")
    weights = load_weights(s, plan, offload)  # of expert i, on the device
    start = {}  # each expert's trainable arrays
    with cli.user_input():
        for i, name in enumerate(model.experts):
            expert_key = jax.random.fold_in(key, 0) if i == 0 else jax.random.fold_in(key, 2)
            _, start[name] = make_policy(
                config,
                weights(i),
                mesh,
                lora=s.lora,
                key=expert_key,
                dtype=s.dtype,
                attention=plan.backend,
                remat=run.remat,
            )
            if plan.adapters is not None:
                start[name] = {
                    k: mesh_lib.place(plan.adapters[name][k], v.sharding)
                    for k, v in start[name].items()
                }
    if s.lora is None and not s.needs_reference:
        # full fine-tuning without a reference: the fp32 copies are the only ones
        def weights(expert):
            return None

    initial, on_device = (
        (optimiser_offload.init_state, optimiser_offload.to_device)
        if c.train.offload_optimiser
        else (init_state, lambda x: x)
    )
    states = {name: initial(start[name], s.optimiser, s.loss, s.keeps_old) for name in plan.trained}
    if restored is not None:
        states = train_state.restore(checkpoints, restored, states)

    check_folder()
    log = RunLog(c.run_dir, restored, c.log) if multihost.first() else SilentLog()
    log.config(dict(c.to_dict(), command=" ".join(["python -m grpo.train", *sys.argv[1:]])))
    evaluators = {
        length: Evaluator(
            heldout,
            eval_table,
            solver,
            run.eval_steps,
            segments(solver.schedule.timesteps, model.boundary),
            decode,
            vae_state,
            pool,
            mesh,
            plan.shapes[length],
            c.sample.batch_size,
            c.eval.seed,
            c.eval.previews,
            run.unguided_steps,
        )
        for length in plan.eval_frames
    }

    learner = Learner(
        c,
        s,
        run,
        model.boundary,
        plan.shapes,
        train_prompts,
        table,
        pool,
        decode,
        vae_state,
        start,
        weights,
        states,
        on_device,
        checkpoints,
        bar,
    )

    def evaluate(epoch: int, lengths: tuple[int, ...] = plan.eval_frames):
        for length in lengths:
            result = evaluators[length](
                learner.averaged, epoch, functools.partial(bar, desc="evaluation")
            )
            further = length != plan.eval_frames[0]
            check_folder()
            if epoch == 0 and not further:
                check_base(result, s.weights)
            log.evaluation(result.record, result.videos, length if further else None)
            say(
                f"epoch {epoch}: held-out {said(result.record)}"
                + (f", {length} frames" if len(evaluators) > 1 else "")
            )
            if result.warning:
                say(result.warning)

    saved = restored

    def save(epoch: int):
        """Unless that is the newest checkpoint."""
        nonlocal saved
        if saved != epoch:
            check_folder()
            train_state.save(checkpoints, epoch, states, c.to_dict(), s.lora, spent, belongs)
            saved = epoch

    cli.end_well_on_sigterm()
    if restored is None:
        count = sum(v.size for state in states.values() for v in jax.tree.leaves(state.trainable))
        say(f"{count:,} trained parameters, {s.videos} videos an epoch")
        multihost.stage("epoch 0: saving")
        save(0)
    elif epochs or missing:
        say(f"continuing {c.run_dir} after epoch {done}")
    if missing:
        evaluate(done, missing)
    if epochs:
        base = multihost.from_first(lambda: read_base(c.run_dir, s.weights))

    save_seconds, clip_warned = 0.0, None
    for epoch in epochs:
        compiled.clear()
        lap = Stopwatch()
        sampled = learner.sample(epoch, lap)
        lesson = learner.lesson(sampled, base)
        if not lesson.valid.any():
            save(epoch - 1)  # what is finished is kept, whatever `save.every` is
            raise UserError(
                f"epoch {epoch}: not one of {s.videos} videos could be scored; "
                f"{sampled.scores.why()}. Epoch {epoch - 1} is saved: the same command continues "
                "after it, once that is mended"
            )
        multihost.stage(f"epoch {epoch}: update")
        record = {
            "epoch": epoch,
            "frames": sampled.length,
            "evaluations": sampled.evaluations,
            "evaluations_saved": sampled.saved,
        } | learner.learn(epoch, sampled, lesson)
        lap("update", [state.trainable for state in states.values()])
        scores, evaluations, length = sampled.scores, sampled.evaluations, sampled.length
        del sampled
        known = epoch > done + 1 and length == frame_schedule.at(
            epoch - 1, c.sample.frames, c.sample.frame_schedule
        )
        if known and not scores.nonfinite and (warning := compiled.warning(epoch)):
            say(warning)
        if not clip_warned and (clip_warned := clip_warning(record, c.train)):
            say(clip_warned)

        # log, save, evaluate: in this order, so that a resumed run repeats what no checkpoint
        # holds, and nothing that goes wrong in an evaluation costs an epoch; an evaluation that is
        # cut off is made when the run goes on
        seconds = lap.seconds | {"save": save_seconds, "total": lap.total}
        working = seconds["sample"] + seconds["decode"] + seconds["update"]
        spent += Spent(
            evaluations, multihost.gather(max(0.0, seconds["total"] - compiled.seconds))[0]
        )
        final = epoch == c.epochs or s.budget.reached(spent)
        failed, groups = int((~lesson.valid).sum()), lesson.groups
        check_folder()
        log.epoch(
            record
            | {
                "spent_evaluations": spent.evaluations,
                "spent_seconds": spent.seconds,
                "reward_mean": groups.mean_reward,
                "reward_std": groups.std_reward,
                "group_std": groups.mean_group_std,
                "zero_std_fraction": groups.zero_std_fraction,
                "rewards": reward_combination.means({MAIN: scores.values} | scores.parts),
                "failed_scores": failed,
                **scores.counts(),
                "videos": s.videos,
                "seconds": seconds,
                "idle_share": max(0.0, 1 - working / seconds["total"]),
                "peak_memory": memory.peaks().known(),
            }
        )
        say(
            f"epoch {epoch}/{c.epochs}: reward {groups.mean_reward:.3f}, spread in groups "
            f"{groups.mean_group_std:.3f}, "
            + (
                f"ratio error {record['ratio_max_error']:.1e}, "
                if "ratio_max_error" in record
                else ""
            )
            + (
                f"grad {record['grad_norm']:.2e}"
                if "grad_norm" in record
                else "nothing to learn from"
            )
            + (f", {failures}" if (failures := format_failures(failed, scores.counts())) else "")
            + " | "
            + " ".join(f"{k} {v:.1f}" for k, v in seconds.items() if v >= 0.05)
            + " s"
        )
        saving = time.monotonic()
        multihost.stage(f"epoch {epoch}: saving")
        ending = asked_to_end()
        if epoch % c.save.every == 0 or final or ending:
            save(epoch)
        save_seconds = time.monotonic() - saving  # shown with the next epoch
        if evaluation_is_due(epoch) and (final or not ending):
            evaluate(epoch)
            if ending := asked_to_end():
                save(epoch)
        if final or ending:
            break
    log.close()
    say(memory.peaks())
    if multihost.first():
        path = run_report.write_report(pathlib.Path(c.run_dir))
        say(*run_report.summary_lines(pathlib.Path(c.run_dir)) or [f"report: {path}"], sep="\n")
    return epoch if epochs and not final else None


def asked_to_end() -> bool:
    """Whether SIGTERM reached any process; all must ask."""
    return any(multihost.gather(cli.asked_to_end.is_set()))


def say(*lines, **kwargs):
    if multihost.first():
        print(*lines, flush=True, **kwargs)


def load_weights(s: parse.Settings, plan: Plan, offload: bool) -> Weights:
    """The frozen transformers, the idle one of two in host memory with `offload`."""
    model = plan.model
    if offload:
        say("two experts: the idle one waits in host memory")
    return Weights(
        [
            functools.partial(
                lambda name: model_dir.build(name, model, dtype=s.dtype, mesh=plan.mesh)[1], name
            )
            for name in model.experts
        ],
        offload,
    )


def not_evaluated(run_dir: str, epoch: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the evaluated lengths of which the run's folder has no evaluation after `epoch`."""
    return tuple(
        length
        for i, length in enumerate(lengths)
        if epoch
        not in [
            record["epoch"] for record in run_log.read_evaluations(run_dir, length if i else None)
        ]
    )


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
