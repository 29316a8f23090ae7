"""Evaluates a model, and a checkpoint of a run that trained it, on held-out prompts, with the same
prompts, noise and sampler for both.

    python -m grpo.evaluate --config=configs/tiny_ocr.py --checkpoint=runs/tiny_ocr \\
        --out=runs/tiny_eval
    python -m grpo.evaluate --config=configs/tiny_ocr.py --out=runs/base \\
        --config.prompts.heldout=my_prompts.txt
    python -m grpo.evaluate --config=configs/tiny_ocr.py --out=runs/best_of_8 --best_of=8

Everything but the checkpoint comes from the recipe, so the results compare with those of training:
`eval.*`, `reward.*`, `sample.height`, `sample.width`, `sample.shift`, `sample.batch_size`,
`model.*`, `prompts.heldout`. The folder OUT gets evals.jsonl (the reward of each prompt and the text
that was read), videos of the first prompts, report.html, and side_by_side/: files that show the
videos of the model (left) and of the checkpoint (right) from one prompt and noise. With `--best_of` N
each prompt has N videos, of which the one with the best main reward counts; the first of them is that
of an evaluation without it. The number is that of `reward.second_engine`, which does not choose.
Prompts of `eval.more_prompts` and videos of `eval.more_sizes` are evaluated apart.
"""

import functools
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from grpo.records import provenance
from grpo.records.clock import timestamp
from grpo.records.run_log import RunLog
from grpo.report import run_report
from grpo.run import RunSpec, open_model
from grpo.scoring.heldout import Evaluation, Evaluator, format_evaluation
from grpo.scoring.reward_pool import open_pool
from grpo.scoring.scored_prompts import for_rewards, fps_of, load_more_prompts, load_scored_prompts
from grpo.settings import parse
from grpo.settings.reference import FLAG_HELP
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import check_used, define_number, define_path
from wan_jax.command_line.limits import CANDIDATES, Range
from wan_jax.distributed import memory
from wan_jax.errors import UserError
from wan_jax.inference import pipeline, reward_guidance
from wan_jax.models import precision, presets
from wan_jax.storage import checkpoint as checkpoint_lib
from wan_jax.storage import folder_lock, merged_loras
from wan_jax.storage.trained_weights import base_note, load_transformers


def main(_):
    FLAGS = flags.FLAGS
    assert FLAGS.config is not None, "--config is required"
    if FLAGS.reward_head is None:
        check_used(FLAGS, {"reward_guidance": "--reward_head"})
    if FLAGS.checkpoint is None and not FLAGS.base:
        raise UserError("--nobase without --checkpoint leaves nothing to evaluate")
    evaluate_recipe(
        FLAGS.config,
        FLAGS.out,
        FLAGS.checkpoint,
        base=FLAGS.base,
        head=FLAGS.reward_head,
        guidance=FLAGS.reward_guidance,
        best_of=FLAGS.best_of,
    )


def evaluate_recipe(
    config,
    out: str,
    checkpoint: str | None = None,
    *,
    base: bool = True,
    head: str | None = None,
    guidance: float = 0.0,
    best_of: int = 1,
    own: Mapping[str, Any] | None = None,
) -> list[dict]:
    """Evaluate by a recipe's ConfigDict, write the results into the folder `out`, and return their
    records: the model's, then the checkpoint's. Raises `UserError`.

    config: its run_dir becomes `out`. base: whether the model itself is evaluated too; without a
    checkpoint it always is. head, guidance: file and weight of a reward head. best_of: videos of each
    prompt, of which the best one counts. own: as in `open_pool`.
    """
    # ---- the recipe --------------------------------------------------------------------------
    config.run_dir = out
    recipe = parse.recipe_from_config(config)
    settings = parse.settings_of(recipe)
    prompts = load_scored_prompts(
        recipe.prompts.heldout,
        recipe.reward,
        settings.weights,
        limit=recipe.eval.num_prompts,
        skip_invalid=recipe.prompts.skip_invalid,
    )
    more = load_more_prompts(recipe, settings.weights)
    if (pathlib.Path(recipe.run_dir) / "checkpoints").exists():
        raise UserError(f"--out {out} is a training run's folder; give another one")

    # ---- the model, the checkpoint, the devices ----------------------------------------------
    epoch = 0
    cli.enable_compilation_cache()
    precision.use(recipe.model.matmul_precision)
    with cli.user_input():
        model = open_model(recipe)
        if checkpoint is not None:
            checkpoints, epoch = checkpoint_lib.find(checkpoint)
            # checked before the model itself is evaluated, which takes long
            meta = checkpoints.check(epoch, ("meta", "trained"))
            model.check_same(
                meta.get("model_digest"), meta["model"], checkpoint, "config.model.path"
            )
            merged_loras.check(model, meta, checkpoint)
        spec = RunSpec.make(recipe, settings, presets.of_folder(model), training=False)
        if checkpoint is not None and (note := base_note(checkpoint, spec.quantisation)):
            print(note, flush=True)
        shift = reward_guidance.guidance(head, guidance, spec.preset.transformer, model)
    prompt_sets = {
        name: for_rewards(each, settings.weights, fps_of(spec.preset))
        for name, each in {"": prompts, **more}.items()
    }
    print(spec.placed, flush=True)
    bar = functools.partial(tqdm, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())

    lock = folder_lock.locked(recipe.run_dir, "--out")
    with lock, open_pool(recipe.reward, settings.weights, own) as pool:
        # ---- prompts, decoder, log -----------------------------------------------------------
        tables = {
            name: pipeline.embed_prompts(
                model,
                each.prompts,
                recipe.prompts.negative,
                dtype=settings.dtype,
                cache=True,
                progress=functools.partial(bar, desc="prompts"),
            )
            for name, each in prompt_sets.items()
        }
        vae_graph, vae_state = pipeline.load_vae(model, spec.mesh)
        decode = pipeline.make_decoder(vae_graph)
        log = RunLog(recipe.run_dir)
        command = provenance.command_line("grpo.evaluate")
        log.config(dict(recipe.to_dict(), command=command))
        log.provenance(provenance.entry(spec, command, epoch))
        records: list[dict] = []
        unscored: list[Evaluation] = []

        def evaluate(trained: str | None, number: int):
            """Evaluate the model, or a checkpoint of epoch `number`, and record the results."""
            graph, weights = load_transformers(
                model,
                trained,
                settings.dtype,
                spec.backend,
                spec.mesh,
                recipe.model.offload,
                spec.quantisation,
            )
            made = {}  # the steps by shift of the schedule
            for i, series in enumerate(spec.evaluations):
                name, size = series if series in prompt_sets else "", spec.size_of(series)
                own = spec.of_sizes(size, size)
                if size.shift not in made:
                    make = functools.partial(
                        pipeline.make_ode_steps, graph, own.solver, shift=shift
                    )
                    unguided = (1.0,) * len(model.experts) if recipe.eval.also_unguided else ()
                    made[size.shift] = make(spec.eval_guidance), make(unguided)
                steps, unguided = made[size.shift]
                evaluator = Evaluator(
                    prompts=prompt_sets[name],
                    table=tables[name],
                    solver=own.solver,
                    steps=steps,
                    parts=own.eval_segments,
                    decode=decode,
                    vae_state=vae_state,
                    pool=pool,
                    mesh=spec.mesh,
                    shape=own.eval_shape,
                    batch_size=recipe.sample.batch_size,
                    seed=recipe.eval.seed,
                    previews=recipe.eval.previews,
                    unguided=unguided,
                    main=settings.main,
                    best_of=best_of,
                )
                result = evaluator(
                    lambda expert: (weights(expert),),
                    number,
                    functools.partial(bar, desc="evaluation"),
                )
                log.evaluation(
                    result.record | {"time": timestamp()}, result.videos, series if i else None
                )
                if not i:
                    records.append(result.record)
                label = spec.label(series)
                print(
                    f"{trained or recipe.model.path}: {format_evaluation(result.record)}{label}",
                    flush=True,
                )
                if result.warning:
                    print(result.warning, flush=True)
                    unscored.append(result)

        # ---- the model itself, then the checkpoint -------------------------------------------
        if checkpoint is None or (base and epoch > 0):
            evaluate(None, 0)
        if checkpoint is not None:
            evaluate(checkpoint, epoch)
        log.close()
        report = run_report.write_report(pathlib.Path(recipe.run_dir))
        print(memory.peaks(), f"report: {report}", sep="\n")
    if unscored:
        raise UserError(
            f"{len(unscored)} evaluation(s) scored fewer than two videos; {unscored[0].why}"
        )
    return records


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, FLAG_HELP, lock_config=True)
    define_path(
        "checkpoint",
        "run folder of grpo.train, RUN/best or RUN/checkpoints/<epoch>; not given: only the model itself",
    )
    define_path("out", "folder to write", required=True)
    define_path(
        "reward_head", "file of grpo.reward_head: sample with guidance towards a higher reward"
    )
    define_number("reward_guidance", 10.0, "weight of the reward head's guidance", Range(0))
    define_number(
        "best_of", 1, "videos of each prompt, of which the best one counts", CANDIDATES, int
    )
    flags.DEFINE_bool(
        "base",
        True,
        "whether the model itself is evaluated, too; a checkpoint of epoch 0 is the model itself",
    )
    flags.mark_flag_as_required("config")
    cli.run(main)
