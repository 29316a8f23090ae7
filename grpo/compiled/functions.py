"""The jitted functions of a run, and abstract arguments to lower and compile them with.

`grpo.train` runs the functions made here; `grpo.compiled.compile` compiles them before a weight is
read, and `grpo.plan` without weights, for any mesh: of devices that exist, or of a topology to
compile for. Abstract arguments have the types and shardings of training's own, so a function that is
compiled ahead is the one that the loop runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from grpo.compiled import offload
from grpo.learning import optimiser as update
from grpo.learning.optimiser import TrainState, state_shapes
from grpo.learning.policy import make_structure
from grpo.rollout import StepTable, Trajectory, initial_noise, make_step
from grpo.run import RunSpec
from grpo.sde_windows import ONE_PER_GROUP
from wan_jax.diffusion.experts import per_guidance
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.solvers import SolverState
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.inference import pipeline
from wan_jax.models import vae_chunks
from wan_jax.storage import model_dir

# rows of text taken for the prompts' longest where they have not been encoded, of the 512 that the
# transformer attends to
TEXT_ROWS = 64
# what the functions of one run at several lengths of video share
JITTED = (
    "policy",
    "table",
    "steps",
    "updates",
    "eval_steps",
    "unguided_steps",
    "vae",
    "decoder",
)


@dataclasses.dataclass(frozen=True)
class Program:
    name: str
    jitted: Callable
    args: tuple  # abstract, up to static ones
    # how many of the arguments, from the first, lie on the devices throughout training
    stay: int = 0
    beside: tuple = ()  # abstract trees of what else lies there while it runs, but not throughout


@dataclasses.dataclass(frozen=True)
class Functions:
    """The jitted functions of a run, one for each expert; experts with the same guidance share
    them.
    """

    spec: RunSpec
    text_rows: int = TEXT_ROWS  # St of every batch

    def with_frames(self, sample: int, evaluation: int) -> "Functions":
        """Return the same jitted functions at one length in training and one in evaluation."""
        spec = self.spec.with_frames(sample, evaluation)
        if spec is self.spec:
            return self
        other = Functions(spec, self.text_rows)
        vars(other).update({name: getattr(self, name) for name in JITTED})
        return other

    @functools.cached_property
    def policy(self):
        spec = self.spec
        return make_structure(
            spec.preset.transformer,
            lora=spec.settings.lora,
            dtype=spec.settings.dtype,
            attention=spec.backend,
            remat=spec.remat,
            mesh=spec.mesh,
        )

    @functools.cached_property
    def table(self) -> StepTable:
        recipe = self.spec.recipe
        return StepTable.make(
            self.spec.schedule,
            self.spec.settings.sde,
            recipe.train.credit,
            slice(*recipe.sample.sde_range),
            recipe.sample.ode_solver,
        )

    @functools.cached_property
    def steps(self) -> tuple[Callable, ...]:
        """Denoising steps of the rollout."""
        method = self.spec.method
        make = functools.partial(
            make_step,
            self.policy,
            self.table,
            keep_mean=method.keeps_mean,
            kl_kind=method.sampling_kl,
        )
        return per_guidance(make, self.spec.sampling_guidance)

    @functools.cached_property
    def updates(self) -> tuple[Callable, ...]:
        """Optimiser steps."""
        spec, method = self.spec, self.spec.method
        where = offload if spec.recipe.train.offload_optimiser else update

        def make(key):
            return where.make_update(
                method.make_gradient(self.policy, self.table, key),
                self.policy,
                spec.settings.optimiser,
                spec.mesh,
                adaptive_kl=method.adaptive_kl,
                lagged=method.lagged,
            )

        return per_guidance(make, method.gradient_keys(spec))

    @functools.cached_property
    def eval_steps(self) -> tuple[Callable, ...]:
        """Denoising steps of the evaluation: the deployment sampler's."""
        make = functools.partial(pipeline.make_ode_step, self.policy.module, self.spec.solver)
        return per_guidance(make, self.spec.eval_guidance)

    @functools.cached_property
    def unguided_steps(self) -> tuple[Callable, ...]:
        """The same without guidance, where the evaluation is made without it as well."""
        if not self.spec.recipe.eval.also_unguided:
            return ()
        make = functools.partial(pipeline.make_ode_step, self.policy.module, self.spec.solver)
        return per_guidance(make, (1.0,) * len(self.spec.preset.experts))

    @functools.cached_property
    def vae(self) -> tuple:
        """(graphdef, abstract state)."""
        return model_dir.abstract("vae", self.spec.preset.vae)

    @functools.cached_property
    def decoder(self) -> tuple[Callable, Callable]:
        return pipeline.decoder_functions(self.vae[0])

    # ---- the programs ----------------------------------------------------------------------------
    def programs(self) -> list[Program]:
        """All that the epochs run over and over, each once, for every length: experts may share
        theirs, an evaluation has training's decoder where the lengths are the same.
        """
        training = {
            f: self.with_frames(f, self.spec.evaluated_frames[0]) for f in self.spec.trained_frames
        }
        evaluation = {
            f: self.with_frames(self.spec.trained_frames[0], f) for f in self.spec.evaluated_frames
        }
        distinct = {}
        for runs, made in (
            (training, Functions.training_steps),
            (evaluation, Functions.evaluation_steps),
            (training, Functions.decode),
            (evaluation, Functions.evaluation_decode),
        ):
            for length, run in runs.items():
                for program in made(run):
                    name = f"{program.name}, {length} frames" if len(runs) > 1 else program.name
                    distinct.setdefault(identity(program), dataclasses.replace(program, name=name))
        return list(distinct.values())

    def training_steps(self) -> list[Program]:
        experts = range(len(self.spec.preset.experts))
        return shared(
            [*map(self.rollout_step, experts), *map(self.update, self.spec.trained_experts)]
        )

    def evaluation_steps(self) -> list[Program]:
        unguided = [self.unguided_step()] if self.unguided_steps else []  # one for all experts
        return shared([*map(self.ode_step, range(len(self.spec.preset.experts))), *unguided])

    def evaluation_decode(self) -> list[Program]:
        return [
            dataclasses.replace(p, name=f"evaluation {p.name}", beside=())
            for p in self.decode(self.spec.eval_shape)
        ]

    def named(self, name: str, expert: int) -> str:
        return (
            f"{name}, {self.spec.preset.experts[expert]}"
            if len(self.spec.preset.experts) > 1
            else name
        )

    def initial_noise(self) -> Program:
        return Program(
            "initial noise",
            initial_noise,
            (self.random_key(), self.rows(jnp.int32), self.spec.shape),
        )

    def rollout_step(self, expert: int = 0) -> Program:
        past = () if self.table.dpm is None else (self.latents(), self.stochastic)
        return Program(
            self.named("rollout step", expert),
            self.steps[expert],
            (
                self.trainable,
                self.frozen,
                self.latents(),
                integer(),
                self.stochastic,
                self.text(),
                self.random_key(),
                self.rows(jnp.int32),
                *past,
            ),
            stay=2,
            beside=(
                *self.trajectories,
                *[self.latents()] * (self.spec.settings.batches - 1),
                *self.unstacked,
            ),
        )

    def ode_step(self, expert: int = 0) -> Program:
        return Program(
            self.named("evaluation step", expert),
            self.eval_steps[expert],
            ((self.trainable, self.frozen), self.solver_state(), integer(), self.text()),
            stay=1,
            # the average, fetched
            beside=(self.trainable if self.spec.recipe.train.offload_optimiser else None,)
            + ((self.solver_state(), self.text()),) * (self.spec.eval_batches - 1)
            # the noise
            + (self.rows(jnp.float32, shape=self.spec.eval_shape),) * self.spec.eval_batches,
        )

    def unguided_step(self) -> Program:
        return dataclasses.replace(
            self.ode_step(), name="evaluation step without guidance", jitted=self.unguided_steps[0]
        )

    def update(self, expert: int = 0) -> Program:
        """Of one optimiser step: M micro-batches of the recipe's batch, K stochastic steps each.
        Where the optimiser's state waits in host memory, the gradient, which takes the most.
        """
        if self.spec.recipe.train.offload_optimiser:
            return Program(
                self.named("update", expert),
                self.updates[expert].gradient,
                (self.trainable, self.state.held, self.frozen, self.update_batch(expert)),
                stay=3,
                beside=self.trajectories,
            )
        share_kept = {name: number() for name in self.spec.method.lagged}
        return Program(
            self.named("update", expert),
            self.updates[expert],
            (self.state, self.frozen, self.update_batch(expert), share_kept),
            stay=2,
            beside=self.trajectories,
        )

    def decode(self, shape: tuple[int, ...] | None = None) -> list[Program]:
        """The VAE on a batch of latents (F, H, W, C), the rollout's by default: whole clips, or the
        chunks that `pipeline.make_decoder` chooses, the first one and those after it.
        """
        whole = self.decode_whole(shape := shape or self.spec.shape)
        state, latents = whole.args
        chunk = vae_chunks.choose_chunk(
            self.spec.preset.vae, latents.sharding.shard_shape(latents.shape)
        )
        if not 0 < chunk < shape[0]:
            return [whole]
        programs, history, step = [], (), self.decoder[1]
        for name, frames in zip(
            ("decode, first chunk", "decode, chunk"), vae_chunks.chunk_sizes(shape[0], chunk)
        ):
            piece = self.rows(jnp.float32, shape=(frames, *shape[1:]))
            programs.append(
                Program(
                    name,
                    step,
                    (state, piece, history),
                    stay=1,
                    beside=(*self.trajectories, *self.unstacked, latents),
                )
            )
            history = lie(jax.eval_shape(step, *programs[-1].args)[1], latents.sharding)
        return programs

    def decode_whole(self, shape: tuple[int, ...]) -> Program:
        state = lie(self.vae[1], sharding_lib.replicated(self.spec.mesh))
        return Program(
            "decode",
            self.decoder[0],
            (state, self.rows(jnp.float32, shape=shape)),
            stay=1,
            beside=(*self.trajectories, *self.unstacked),
        )

    def encode_text(self) -> Program:
        """The text encoder on 16 prompts, on one device; it is gone before the weights come."""
        graph, state = model_dir.abstract(
            "text_encoder", self.spec.preset.text_encoder, dtype=self.spec.settings.dtype
        )
        here = jax.sharding.SingleDeviceSharding(self.spec.mesh.devices.flat[0])
        ids = jax.ShapeDtypeStruct((16, self.text_rows), jnp.int32, sharding=here)
        return Program("text encoder", pipeline.make_encoder(graph), (lie(state, here), ids, ids))

    # ---- arguments -------------------------------------------------------------------------------
    def params(self, tree):
        """Abstract parameters, or what has their shapes, as `mesh.shard_params` lays them."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            sharding_lib.param_shardings(tree, self.spec.mesh),
        )

    @functools.cached_property
    def frozen(self):
        """One expert's base weights; None in full fine-tuning without a reference, as in
        `grpo.train`.
        """
        needed = self.spec.settings.lora is not None or self.spec.method.needs_reference
        return self.params(self.policy.base) if needed else None

    @functools.cached_property
    def trainable(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.params(self.policy.trainable)

    @functools.cached_property
    def state(self) -> TrainState:
        method = self.spec.method
        return self.params(
            state_shapes(
                self.policy, self.spec.settings.optimiser, method.adaptive_kl, method.lagged
            )
        )

    def solver_state(self) -> SolverState:
        x = self.rows(jnp.float32, shape=self.spec.eval_shape)
        return SolverState(x, (x,) * len(jax.eval_shape(self.spec.solver.init, x).history))

    def trajectory(self, expert: int, *leading: int) -> Trajectory:
        """Of a rollout batch; with a leading axis, of several."""
        k = self.spec.trained_steps(expert)
        x = self.latents(*leading, k)
        step = (
            self.rows(jnp.int32, *leading, k)
            if self.own_steps
            else jax.ShapeDtypeStruct((*leading, k), jnp.int32)
        )
        return Trajectory(
            x,
            x,
            self.rows(jnp.float32, *leading, k),
            step,
            self.text(*leading),
            x if self.spec.method.keeps_mean else None,
        )

    @functools.cached_property
    def trajectories(self) -> tuple:
        """What an epoch's rollout leaves on the devices."""
        return self.spec.method.epoch_shapes(self)

    @property
    def unstacked(self) -> list[jax.ShapeDtypeStruct]:
        """What a batch under way keeps of its steps."""
        return self.spec.method.step_shapes(self)

    def update_batch(self, expert: int):
        """The batch of one optimiser step of an expert."""
        return self.spec.method.batch_shapes(self, expert)

    @property
    def own_steps(self) -> bool:
        """Whether videos of a batch have stochastic steps of their own."""
        return self.spec.windows.rule == ONE_PER_GROUP

    @property
    def stochastic(self) -> jax.ShapeDtypeStruct:
        """Whether a step is: one for all videos of a batch, or each one's own."""
        return self.rows(bool) if self.own_steps else jax.ShapeDtypeStruct((), bool)

    def rows(
        self, dtype, *leading: int, shape: tuple[int, ...] = (), batch: int = 0
    ) -> jax.ShapeDtypeStruct:
        """[*leading, B, *shape], split over the mesh by B. batch: another B than the recipe's."""
        sharding = sharding_lib.batch_sharding(self.spec.mesh, len(leading))
        size = batch or self.spec.recipe.sample.batch_size
        return jax.ShapeDtypeStruct((*leading, size, *shape), dtype, sharding=sharding)

    @staticmethod
    def random_key() -> jax.ShapeDtypeStruct:
        return jax.eval_shape(lambda: jax.random.key(0))

    def latents(self, *leading: int) -> jax.ShapeDtypeStruct:
        return self.rows(jnp.float32, *leading, shape=self.spec.shape)

    def text(self, *leading: int, batch: int = 0) -> TextBatch:
        """In the text encoder's type, which is the model's."""
        dtype, rows = (
            self.spec.settings.dtype,
            (self.text_rows, self.spec.preset.transformer.text_dim),
        )
        negative = jax.ShapeDtypeStruct(
            (*leading, *rows), dtype, sharding=sharding_lib.replicated(self.spec.mesh)
        )
        return TextBatch(
            self.rows(dtype, *leading, shape=rows, batch=batch),
            negative,
            pipeline.TEXT_ROWS - self.text_rows,
        )


def identity(program: Program) -> tuple:
    """Equal for programs that are compiled once."""
    leaves, treedef = jax.tree.flatten(program.args)
    return program.jitted, treedef, tuple((x.shape, x.dtype) for x in leaves)


def shared(programs: Iterable[Program]) -> list[Program]:
    """Each once: what several experts run loses the expert's name."""
    distinct = {}
    for program in programs:
        key = identity(program)
        distinct[key] = (
            program
            if key not in distinct
            else dataclasses.replace(program, name=program.name.partition(", ")[0])
        )
    return list(distinct.values())


def lie(tree, sharding):
    """The abstract tree, lying so."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def integer() -> jax.ShapeDtypeStruct:
    """A Python int."""
    return jax.ShapeDtypeStruct((), jnp.int32, weak_type=True)


def number() -> jax.ShapeDtypeStruct:
    """A Python float."""
    return jax.ShapeDtypeStruct((), jnp.float32, weak_type=True)
