"""The preparation of a run before its first epoch.

It compiles all functions before any weight is read, so that a run that does not fit is refused within
minutes; encodes the prompts; loads the weights; makes the policy and the optimiser, or restores them
from the newest checkpoint.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from convert.lora import initial_adapters
from grpo.compiled import compile, offload
from grpo.compiled.functions import Functions
from grpo.data.prompts import PromptSet, examples
from grpo.learning import train_state
from grpo.learning.data_loss import DataSource, open_run_data
from grpo.learning.head_guidance import HeadState, initial_head
from grpo.learning.optimiser import init_state
from grpo.learning.policy import Flat, make_policy
from grpo.random_streams import Stream
from grpo.records import provenance, run_log
from grpo.records.console import print_once, progress_bar
from grpo.records.run_folder import RunFolder
from grpo.records.start_warnings import start_warnings
from grpo.run import RunSpec
from grpo.sampling import Session, States
from grpo.scoring.heldout import Evaluator
from grpo.scoring.run_evaluations import evaluation_is_due, not_evaluated
from grpo.settings.budget import Spent
from grpo.settings.schema import Recipe
from grpo.settings.unused import changed_in_vain
from rewards.pool_set import Pool
from wan_jax.command_line import cli
from wan_jax.distributed import memory, multihost
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.distributed.offload import Weights
from wan_jax.inference import pipeline
from wan_jax.storage import folder_lock, model_dir
from wan_jax.storage.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Start:
    """A run before its first epoch, or before the first epoch after a checkpoint.

    Attributes:
        session: the objects that all epochs share.
        states: of the trained experts.
        resumed: epoch of the checkpoint that the run continues after; None: a new run.
        spent: by the run before this start.
        unevaluated: series of evaluations that are to be made before the next epoch.
        folder: of the run.
        log: of the run; silent in all processes but the first.
        evaluators: by series (`RunSpec.evaluations`).
        compiled: counts the functions that are compiled from now on.
        head: that guides the rollout; None without reward guidance.
    """

    session: Session
    states: States
    resumed: int | None
    spent: Spent
    unevaluated: tuple[int | str, ...]
    folder: RunFolder
    log: run_log.RunLog | run_log.SilentLog
    evaluators: dict[int | str, Evaluator]
    compiled: compile.CompileCounter
    head: HeadState | None = None

    @property
    def epochs(self) -> range:
        """The epochs to train."""
        spec, done = self.session.spec, self.resumed or 0
        ended = spec.settings.budget.reached(self.spent)
        return range(done + 1, (done if ended else spec.recipe.epochs) + 1)


def all_changes(recipe: Recipe, resumed: int | None, changed: Sequence[str]) -> dict[str, Any]:
    """Return {'changes': {epoch: changed settings}} of a continued run, {} if there are none: those
    in config.json that were made before the epoch `resumed`, and the present ones.
    """
    if resumed is None:
        return {}
    earlier = run_log.read_config(recipe.run_dir).get("changes") or {}
    changes = {epoch: keys for epoch, keys in earlier.items() if int(epoch) < resumed}
    if changed:
        changes[str(resumed)] = list(changed)
    return {"changes": changes} if changes else {}


def prepare(
    spec: RunSpec,
    model: model_dir.ModelDir,
    prompts: PromptSet,
    heldout: PromptSet,
    pool: Pool,
    lock: folder_lock.Lock | None = None,
    more: Mapping[str, PromptSet] | None = None,
) -> Start:
    """Return the run as it starts or continues. Raises `UserError` where the newest checkpoint is of
    another run, or where this run does not fit into memory.

    prompts, heldout: of training and of evaluations. pool: the processes that score. lock: of the
    run's folder, in process 0. more: prompts of further evaluations by name.
    """
    recipe, settings, mesh = spec.recipe, spec.settings, spec.mesh
    checkpoints = Checkpoints(recipe.run_dir, keep=recipe.save.keep)
    continues = bool(multihost.from_first(checkpoints.epochs))
    fresh = () if continues else spec.trained  # a continued run reads its states
    drawn = {*fresh, *(name for name in spec.preset.experts if name not in spec.trained)}
    adapters = None
    if recipe.lora.init and settings.lora is not None and drawn:
        with cli.user_input():
            adapters = initial_adapters(recipe.lora.init, model, settings.lora)
    data = open_run_data(spec, model)

    # ---- the newest checkpoint ---------------------------------------------------------------
    folder = RunFolder(spec, checkpoints, train_state.origin(model, prompts, data), lock)
    resumed, spent = multihost.from_first(checkpoints.begin), Spent()
    changed = ()
    if resumed is not None:
        meta = checkpoints.check(resumed)
        spent = train_state.spent_by(checkpoints, resumed)
        changed = train_state.check_resume(
            meta, checkpoints.path(resumed), recipe.to_dict(), model, folder.origin
        )
        if changed:
            print_once(f"changed since epoch {resumed}: {'; '.join(changed)}")
    done = resumed or 0
    ended = done == recipe.epochs or settings.budget.reached(spent)
    unevaluated = spec.evaluations  # a new run evaluates the base model
    if resumed is not None:  # a continued run makes evaluations that were interrupted
        unevaluated = multihost.from_first(
            lambda: (
                not_evaluated(recipe.run_dir, done, spec.evaluations)
                if evaluation_is_due(spec, done, spent)
                else ()
            )
        )
    describe(spec, prompts)
    if data is not None:
        print_once(str(data))

    # ---- compiled functions: refused where they do not fit, before any weight is read --------
    evaluated = {"": heldout, **(more or {})}
    texts = [text for each in (prompts, *evaluated.values()) for text in each.prompts]
    multihost.stage("compiling")
    with cli.user_input():
        text_rows = multihost.from_first(
            lambda: pipeline.text_rows(model, texts, recipe.prompts.negative, dtype=settings.dtype)
        )
        if data is not None:
            text_rows = max(text_rows, pipeline.round_up_rows(data.text_rows))
        functions = Functions(spec, text_rows)
        offloaded = compile.offloads(functions, spec.memory)
    if not ended or unevaluated:
        compile_functions(functions, offloaded)
    compiled = compile.CompileCounter()

    # ---- prompts and frozen weights ----------------------------------------------------------
    multihost.stage("encoding the prompts")
    table = multihost.from_first(
        lambda: pipeline.embed_prompts(
            model,
            texts,
            recipe.prompts.negative,
            dtype=settings.dtype,
            progress=functools.partial(progress_bar, desc="prompts"),
            cache=True,
        )
    )
    source = None
    if data is not None:
        table = dataclasses.replace(table, rows=text_rows)
        source = DataSource.make(data, table, settings.dtype)
    multihost.stage("loading the weights")
    vae_graph, vae_state = pipeline.load_vae(model, mesh)
    decode = pipeline.make_decoder(vae_graph, functions=functions.decoder)
    # full fine-tuning without a reference needs only the fp32 copies
    kept = settings.lora is not None or spec.method.needs_reference
    weights = load_weights(spec, model, offloaded) if kept or drawn else no_weights

    # ---- the policy, the optimiser -----------------------------------------------------------
    with cli.user_input():
        start = initial_arrays(spec, weights, adapters, drawn)
    frozen: Callable[[int], Any] = weights if kept else no_weights
    del weights
    offloads = recipe.train.offload_optimiser
    initial = offload.init_state if offloads else init_state
    states = {  # an update donates the initial arrays
        name: initial(
            start.pop(name), settings.optimiser, spec.method.adaptive_kl, spec.method.lagged
        )
        for name in fresh
    }
    with cli.user_input():
        head = initial_head(spec, model)
    if resumed is not None:
        like = offload.to_host(functions.state) if offloads else functions.state
        like = dict.fromkeys(spec.trained, like)
        states, head = train_state.restore_all(checkpoints, resumed, like, head)

    # ---- the log, the session, the evaluators ------------------------------------------------
    folder.check_held()
    log = run_log.SilentLog()
    if multihost.first():
        log = run_log.RunLog(recipe.run_dir, resumed, recipe.log)
    command = provenance.command_line("grpo.train")
    log.config(dict(recipe.to_dict(), command=command) | all_changes(recipe, resumed, changed))
    log.provenance(provenance.entry(spec, command, done))
    session = Session(
        functions=functions,
        prompts=prompts,
        table=table,
        decode=functools.partial(decode, vae_state),
        pool=pool,
        frozen=frozen,
        start=start,
        to_device=offload.to_device if offloads else lambda arrays: arrays,
        progress=progress_bar,
        data=source,
    )
    tables, first = {}, len(prompts)
    for name, each in evaluated.items():
        rows = table.prompts[first : first + len(each)]
        tables[name] = dataclasses.replace(table, prompts=rows)
        first += len(each)

    def evaluator(series: int | str) -> Evaluator:
        name = series if series in evaluated else ""
        own = functions.of_series(series)
        return Evaluator(
            prompts=evaluated[name],
            table=tables[name],
            solver=own.spec.solver,
            steps=own.eval_steps,
            parts=own.spec.eval_segments,
            decode=decode,
            vae_state=vae_state,
            pool=pool,
            mesh=mesh,
            shape=own.spec.eval_shape,
            batch_size=recipe.sample.batch_size,
            seed=recipe.eval.seed,
            previews=recipe.eval.previews,
            unguided=own.unguided_steps,
            main=settings.main,
        )

    evaluators = {series: evaluator(series) for series in spec.evaluations}
    shared = folder, log, evaluators, compiled
    return Start(session, states, resumed, spent, unevaluated, *shared, head)


def describe(spec: RunSpec, prompts: PromptSet) -> None:
    """Print the devices, the placement, settings without effect, and examples of prompts."""
    devices, count = spec.mesh.devices, jax.process_count()
    processes = f" on {count} processes" if count > 1 else ""
    print_once(
        f"{devices.size} x {devices.flat[0].device_kind}{processes}, attention {spec.backend}, "
        f"weights {spec.recipe.model.dtype}",
        spec.placed,
        *start_warnings(spec),
        *changed_in_vain(spec.recipe),
        *examples(prompts),
    )


def compile_functions(functions: Functions, offloaded: bool) -> None:
    """Compile all functions, and print the memory that they need. Raises `UserError` where it does
    not fit. offloaded: whether the idle one of two experts is in host memory.
    """
    spec = functions.spec
    print_once(f"rematerialisation: {spec.remat}")
    bar = functools.partial(progress_bar, desc="compiling")
    needed = compile.compile_all(functions, offloaded, bar)
    print_once(*needed.table(spec.memory))
    pinned = memory.pinned_limit(spec.mesh.local_devices[0])
    compile.check_fits(needed, spec, offloaded, spec.memory, pinned)


def load_weights(spec: RunSpec, model: model_dir.ModelDir, offloaded: bool) -> Weights:
    """Return the frozen transformers, with the idle one of two offloaded to host memory where
    `offloaded`.
    """
    if offloaded:
        print_once("two experts: the idle one is offloaded to host memory")

    def load(name: str):
        return model_dir.build(
            name,
            model,
            dtype=spec.settings.dtype,
            mesh=spec.mesh,
            quantisation=spec.quantisation,
        )[1]

    return Weights([functools.partial(load, name) for name in model.experts], offloaded)


def no_weights(expert: int) -> None:
    """Return None as the frozen weights of an expert, for runs that do not need any."""
    return


def initial_arrays(
    spec: RunSpec,
    frozen: Callable,
    adapters: Mapping[str, Mapping[str, Any]] | None,
    experts: Collection[str],
) -> dict[str, Flat]:
    """Return the trainable arrays of `experts` before the first update: adapters drawn from the
    seed, or `adapters` by name of the expert, or all weights. frozen: number of an expert -> its
    weights.
    """
    start, key = {}, jax.random.key(spec.recipe.seed)
    for i, name in enumerate(spec.preset.experts):
        if name not in experts:
            continue
        stream = Stream.SECOND_ADAPTERS if i else Stream.ADAPTERS
        _, arrays = make_policy(
            spec.preset.transformer,
            frozen(i),
            spec.mesh,
            lora=spec.settings.lora,
            key=stream.key(key),
            dtype=spec.settings.dtype,
            attention=spec.backend,
            remat=spec.remat,
        )
        if adapters is not None:
            given = adapters[name]
            shardings = sharding_lib.param_shardings(arrays, spec.mesh)
            arrays = {key: sharding_lib.place(given[key], shardings[key]) for key in arrays}
        start[name] = arrays
    return start
