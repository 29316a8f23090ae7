"""Held-out evaluation of a model, and of what a run made of it: the same prompts, noise and sampler
for both.

    python -m grpo.evaluate --config=configs/tiny_ocr.py --checkpoint=runs/tiny_ocr
    --out=runs/tiny_eval python -m grpo.evaluate --config=configs/tiny_ocr.py --out=runs/base
    --config.prompts.heldout=my_prompts.txt

Everything but the checkpoint comes from the recipe, so figures compare with those of training:
`eval.*`, `reward.*`, `sample.height`, `sample.width`, `sample.shift`, `sample.batch_size`,
`model.*`, `prompts.heldout`. OUT gets evals.jsonl (each prompt's reward and what was read), the
first prompts' videos, report.html, and side_by_side/, where a file has what the model and the
checkpoint made of one prompt and noise, left and right.
"""

import functools
import pathlib
import sys

from absl import flags
from flax import nnx
from ml_collections import config_flags
from tqdm import tqdm

from grpo.data.prompts import load_prompts
from grpo.records.run_log import RunLog
from grpo.report import run_report
from grpo.run import RunSpec
from grpo.scoring.heldout import Evaluator, format_evaluation
from grpo.scoring.scores import for_rewards, open_pool, targets_check
from grpo.settings import parse
from grpo.settings.reference import FLAG_HELP
from rewards.ocr.targets import parse_targets
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import check_used, define_number, define_path
from wan_jax.command_line.limits import Range
from wan_jax.diffusion.experts import per_guidance
from wan_jax.distributed import memory
from wan_jax.errors import UserError
from wan_jax.inference import pipeline, reward_guidance
from wan_jax.models import presets
from wan_jax.storage import checkpoint as checkpoint_lib
from wan_jax.storage import folder_lock, model_dir
from wan_jax.storage.trained_weights import load_transformers

CONFIG = config_flags.DEFINE_config_file("config", None, FLAG_HELP, lock_config=True)
CHECKPOINT = define_path(
    "checkpoint",
    "run folder of grpo.train, or one of its checkpoints/<epoch>; None: only the model itself",
)
OUT = define_path("out", "folder to write", required=True)
HEAD = define_path("reward_head", "file of grpo.reward_head: with guidance towards a higher reward")
GUIDANCE = define_number("reward_guidance", 10.0, "its weight", Range(0))
BASE = flags.DEFINE_bool(
    "base", True, "evaluate the model itself, too; a checkpoint of epoch 0 is the model itself"
)


def main(_):
    CONFIG.value.run_dir = OUT.value
    c = parse.recipe_from_config(CONFIG.value)
    s = parse.settings_of(c)
    prompts = load_prompts(
        c.prompts.heldout, parse_targets, limit=c.eval.num_prompts, check=targets_check(c.reward)
    )
    prompts = for_rewards(prompts, s.weights)
    if HEAD.value is None:
        check_used(flags.FLAGS, {"reward_guidance": "--reward_head"})
    if CHECKPOINT.value is None and not BASE.value:
        raise UserError("--nobase without --checkpoint leaves nothing to evaluate")
    if (pathlib.Path(OUT.value) / "checkpoints").exists():
        raise UserError(f"--out {OUT.value} is a training run's folder; give another one")
    epoch = 0
    cli.enable_compilation_cache()
    with cli.user_input():
        model = model_dir.open_model(c.model.path)
        if CHECKPOINT.value is not None:
            checkpoints, epoch = checkpoint_lib.find(CHECKPOINT.value)
            # now, not after the evaluation of the model itself
            meta = checkpoints.check(epoch, ("meta", "trained"))
            model.check_same(
                meta.get("model_digest"), meta["model"], CHECKPOINT.value, "config.model.path"
            )
        spec = RunSpec.make(c, s, presets.of_folder(model), training=False)
        steer = reward_guidance.guidance(HEAD.value, GUIDANCE.value, spec.preset.transformer, model)
    print(spec.placed, flush=True)
    bar = functools.partial(tqdm, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())
    with folder_lock.locked(c.run_dir, "--out"), open_pool(c.reward, s.weights) as pool:
        table = pipeline.embed_prompts(
            model,
            prompts.prompts,
            c.prompts.negative,
            dtype=s.dtype,
            cache=True,
            progress=functools.partial(bar, desc="prompts"),
        )
        vae_graph, vae_state = pipeline.load_vae(model, spec.mesh)
        decode = pipeline.make_decoder(vae_graph)
        log, unscored = RunLog(c.run_dir), []
        log.config(dict(c.to_dict(), command=" ".join(["python -m grpo.evaluate", *sys.argv[1:]])))

        def evaluate(checkpoint: str | None, number: int):
            graph, weights = load_transformers(
                model, checkpoint, s.dtype, spec.backend, spec.mesh, c.model.offload
            )
            module = functools.partial(nnx.merge, graph)
            make = functools.partial(pipeline.make_ode_step, module, spec.solver, shift=steer)
            steps = per_guidance(make, spec.eval_guidance)
            unguided = ()
            if c.eval.also_unguided:
                unguided = per_guidance(make, (1.0,) * len(model.experts))
            for i, frames in enumerate(spec.evaluated_frames):
                evaluator = Evaluator(
                    prompts,
                    table,
                    spec.solver,
                    steps,
                    spec.eval_segments,
                    decode,
                    vae_state,
                    pool,
                    spec.mesh,
                    spec.shape_of(frames),
                    c.sample.batch_size,
                    c.eval.seed,
                    c.eval.previews,
                    unguided,
                )
                result = evaluator(
                    lambda expert: (weights(expert),),
                    number,
                    functools.partial(bar, desc="evaluation"),
                )
                log.evaluation(result.record, result.videos, frames if i else None)
                print(
                    f"{checkpoint or c.model.path}: {format_evaluation(result.record)}"
                    + (f", {frames} frames" if len(spec.evaluated_frames) > 1 else ""),
                    flush=True,
                )
                if result.warning:
                    print(result.warning, flush=True)
                    unscored.append(result)

        if BASE.value and (epoch > 0 or CHECKPOINT.value is None):
            evaluate(None, 0)
        if CHECKPOINT.value is not None:
            evaluate(CHECKPOINT.value, epoch)
        log.close()
        print(memory.peaks(), f"report: {run_report.write_report(c.run_dir)}", sep="\n")
    if unscored:
        raise UserError(
            f"{len(unscored)} evaluation(s) scored fewer than two videos; {unscored[0].why}"
        )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
