"""The programs that training runs on the devices, and abstract arguments to lower and compile them
with.

`grpo.train` runs the jitted functions made here; `grpo.compiled.compile` compiles them before a
weight is read, and `grpo.plan` without weights, for any mesh: of devices that exist, or of a
topology to compile for. Arguments have the types and lie on the mesh as training's own, so a
program compiled ahead is the one that the loop runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from grpo import update
from grpo.compiled import offload, placement
from grpo.methods import flow_matching
from grpo.methods.flow_matching import ForwardBatch
from grpo.methods.selection import layout
from grpo.policy import make_structure
from grpo.rollout import StepTable, Trajectory, initial_noise, make_step
from grpo.sde_windows import ONE_PER_GROUP, Windows, batches_with
from grpo.settings import frame_schedule
from grpo.settings import parse as settings
from grpo.update import TrainState, UpdateBatch, state_shapes
from wan_jax.diffusion.experts import Segment, guidances, per_guidance, segments
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.schedule import Schedule, flow_sigmas
from wan_jax.diffusion.solvers import SolverState, make_solver
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.inference import pipeline
from wan_jax.models import presets, vae_chunks
from wan_jax.storage import model_dir

# taken for the prompts' longest where they have not been encoded, of the 512 the transformer
# attends to
TEXT_ROWS = 64
# of a Run: what its lengths share
JITTED = (
    "settings",
    "remat",
    "policy",
    "table",
    "solver",
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
class Run:
    """A training run before it has weights: a model, a recipe, a mesh, an attention backend, and
    the memory of a device in bytes, None where it is not known.
    """

    preset: presets.Preset
    recipe: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    backend: str
    text_rows: int = TEXT_ROWS  # St of every batch
    memory: int | None = None

    # ---- what follows from the recipe ------------------------------------------------------------
    @functools.cached_property
    def settings(self) -> settings.Settings:
        return settings.from_config(self.recipe)

    def shape_of(self, frames: int) -> tuple[int, ...]:
        """(F, H, W, C) of the latents of a video of so many frames."""
        sample = self.recipe.sample
        return pipeline.latent_shape(
            frames, sample.height, sample.width, self.preset.vae, self.preset.transformer
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one video's latents in training."""
        return self.shape_of(self.recipe.sample.frames)

    @property
    def eval_shape(self) -> tuple[int, ...]:
        """And in evaluation."""
        return self.shape_of(self.recipe.eval.frames or self.recipe.sample.frames)

    @property
    def trained_frames(self) -> tuple[int, ...]:
        """All that epochs have, each once."""
        return frame_schedule.trained(self.recipe.sample.frames, self.recipe.sample.frame_schedule)

    @property
    def evaluated_frames(self) -> tuple[int, ...]:
        c = self.recipe
        return frame_schedule.evaluated(c.sample.frames, c.eval.frames, c.eval.more_frames)

    def with_frames(self, sample: int, evaluation: int) -> "Run":
        """At one length in training and one in evaluation, with the same jitted functions."""
        if (self.trained_frames, self.evaluated_frames) == ((sample,), (evaluation,)):
            return self
        recipe = self.recipe.copy_and_resolve_references()
        recipe.sample.update(frames=sample, frame_schedule=())
        recipe.eval.update(frames=evaluation, more_frames=())
        other = dataclasses.replace(self, recipe=recipe)
        vars(other).update({name: getattr(self, name) for name in JITTED})
        return other

    @property
    def tokens(self) -> int:
        """S of one video in training."""
        return tokens(self.shape)

    @functools.cached_property
    def remat(self) -> str:
        """What the backward pass computes again, one of `REMAT_POLICIES`, by the longest videos."""
        return placement.choose_remat(
            self.recipe,
            self.settings,
            self.preset.transformer,
            self.mesh,
            tokens=tokens(self.shape_of(max(self.trained_frames))),
            experts=len(self.preset.experts),
            trained=len(self.trained),
            memory=self.memory,
        )

    @functools.cached_property
    def schedule(self) -> Schedule:
        return flow_sigmas(self.recipe.sample.steps, self.recipe.sample.shift)

    @property
    def parts(self) -> tuple[Segment, ...]:
        """The schedule's steps by expert."""
        return segments(self.schedule.timesteps, self.preset.boundary)

    @property
    def trained(self) -> tuple[str, ...]:
        """Experts."""
        return tuple(name for name in self.preset.experts if name in self.recipe.train.experts)

    @property
    def windows(self) -> Windows:
        return Windows.make(
            self.recipe.sample, self.parts, self.preset.experts, self.trained, self.settings.levels
        )

    def trained_steps(self, expert: int) -> int:
        """K, the stochastic steps of an epoch that train this expert, or the noise levels of a
        video.
        """
        return sum(
            quota for part, quota in zip(self.parts, self.windows.quotas) if part.expert == expert
        )

    def update_batches(self, expert: int) -> np.ndarray:
        """The rollout batches that train this expert in each optimiser step of an epoch: int
        [updates, M].
        """
        # of those that are chosen by their rewards
        if self.settings.train_batches < self.settings.batches:
            return np.arange(self.settings.train_batches).reshape(
                self.recipe.train.updates_per_epoch, -1
            )
        i = next(i for i, part in enumerate(self.parts) if part.expert == expert)
        return batches_with(
            self.windows.videos(i),
            self.recipe.sample.batch_size,
            self.settings.batches,
            self.recipe.train.updates_per_epoch,
        )

    @property
    def selected(self) -> tuple[int, int]:
        """(M, B) of one optimiser step of a method that trains on finished videos: batches of what
        it selects.
        """
        sample, one_a_group = self.recipe.sample, self.settings.forward.method in ("dpo", "sft")
        return layout(
            sample.groups if one_a_group else self.settings.videos,
            self.recipe.train.updates_per_epoch,
            sample.batch_size,
            mesh_lib.batch_shards(self.mesh),
        )

    def update_passes(self, expert: int) -> float:
        """How many of the rollout's forward passes one forward of all an epoch's updates is worth,
        for each of this expert's steps: other methods than GRPO may train without guidance, and
        leave videos out.
        """
        if (f := self.settings.forward) is None:
            return self.update_batches(expert).size
        micro, rows = self.selected
        branches = 2 if self.scales(self.recipe.sample)[expert] > 1 and not f.guided else 1
        videos = (
            self.recipe.train.updates_per_epoch * micro * rows * (2 if f.method == "dpo" else 1)
        )
        return videos / self.recipe.sample.batch_size / branches

    @property
    def eval_batches(self) -> int:
        return -(-self.recipe.eval.num_prompts // self.recipe.sample.batch_size)

    # ---- the jitted functions, one an expert; experts with the same guidance share them ----------
    @functools.cached_property
    def policy(self):
        return make_structure(
            self.preset.transformer,
            lora=self.settings.lora,
            dtype=self.settings.dtype,
            attention=self.backend,
            remat=self.remat,
            mesh=self.mesh,
        )

    @functools.cached_property
    def table(self) -> StepTable:
        return StepTable.make(
            self.schedule,
            self.settings.sde,
            self.recipe.train.credit,
            slice(*self.recipe.sample.sde_range),
            self.recipe.sample.ode_solver,
        )

    @functools.cached_property
    def solver(self):
        """Of the evaluation."""
        evaluation = self.recipe.eval
        return make_solver(evaluation.solver, evaluation.steps, self.recipe.sample.shift)

    def scales(self, section) -> tuple[float, ...]:
        return guidances(section.guidance, section.guidance_2, len(self.preset.experts))

    @functools.cached_property
    def steps(self) -> tuple[Callable, ...]:
        """Denoising steps of the rollout."""
        loss, in_reward = self.settings.loss, self.settings.kl_reward > 0
        make = functools.partial(
            make_step,
            self.policy,
            self.table,
            keep_mean=loss.needs_old_mean,
            kl_kind=loss.kl_kind if in_reward else None,
        )
        return per_guidance(make, self.scales(self.recipe.sample))

    @functools.cached_property
    def updates(self) -> tuple[Callable, ...]:
        s = self.settings
        where, train = offload if self.recipe.train.offload_optimiser else update, self.recipe.train
        if s.forward is not None:
            return per_guidance(
                lambda scale: where.update_of(
                    flow_matching.make_gradient(self.policy, s.forward, scale),
                    self.policy,
                    s.optimiser,
                    self.mesh,
                    keeps_old=s.keeps_old,
                ),
                self.scales(self.recipe.sample)
                if s.forward.guided
                else (1.0,) * len(self.preset.experts),
            )
        teachers = guidances(
            train.cfg_distill_guidance, train.cfg_distill_guidance_2, len(self.preset.experts)
        )
        losses = [
            dataclasses.replace(s.loss, distill_guidance=teacher if s.loss.distill_weight else 1.0)
            for teacher in teachers
        ]
        return per_guidance(
            lambda one: where.make_update(self.policy, self.table, *one, s.optimiser, self.mesh),
            tuple(zip(self.scales(self.recipe.sample), losses)),
        )

    @functools.cached_property
    def eval_steps(self) -> tuple[Callable, ...]:
        """Denoising steps of the evaluation: the deployment sampler's."""
        return per_guidance(
            functools.partial(pipeline.make_ode_step, self.policy.module, self.solver),
            self.scales(self.recipe.eval),
        )

    @functools.cached_property
    def unguided_steps(self) -> tuple[Callable, ...]:
        """The same without guidance, where the evaluation is made without it as well."""
        make = functools.partial(pipeline.make_ode_step, self.policy.module, self.solver)
        return (
            per_guidance(make, (1.0,) * len(self.preset.experts))
            if self.recipe.eval.also_unguided
            else ()
        )

    @functools.cached_property
    def vae(self) -> tuple:
        """(graphdef, abstract state)."""
        return model_dir.abstract("vae", self.preset.vae)

    @functools.cached_property
    def decoder(self) -> tuple[Callable, Callable]:
        return pipeline.decoder_programs(self.vae[0])

    # ---- the programs ----------------------------------------------------------------------------
    def programs(self) -> list[Program]:
        """All that the epochs run over and over, each once, for every length: experts may share
        theirs, an evaluation has training's decoder where the lengths are the same.
        """
        training = {f: self.with_frames(f, self.evaluated_frames[0]) for f in self.trained_frames}
        evaluation = {f: self.with_frames(self.trained_frames[0], f) for f in self.evaluated_frames}
        distinct = {}
        for runs, made in (
            (training, Run.training_steps),
            (evaluation, Run.evaluation_steps),
            (training, Run.decode),
            (evaluation, Run.evaluation_decode),
        ):
            for length, run in runs.items():
                for program in made(run):
                    name = f"{program.name}, {length} frames" if len(runs) > 1 else program.name
                    distinct.setdefault(identity(program), dataclasses.replace(program, name=name))
        return list(distinct.values())

    def training_steps(self) -> list[Program]:
        experts = range(len(self.preset.experts))
        trained = [i for i in experts if self.preset.experts[i] in self.trained]
        return shared([*map(self.rollout_step, experts), *map(self.update, trained)])

    def evaluation_steps(self) -> list[Program]:
        unguided = [self.unguided_step()] if self.unguided_steps else []  # one for all experts
        return shared([*map(self.ode_step, range(len(self.preset.experts))), *unguided])

    def evaluation_decode(self) -> list[Program]:
        return [
            dataclasses.replace(p, name=f"evaluation {p.name}", beside=())
            for p in self.decode(self.eval_shape)
        ]

    def named(self, name: str, expert: int) -> str:
        return f"{name}, {self.preset.experts[expert]}" if len(self.preset.experts) > 1 else name

    def initial_noise(self) -> Program:
        return Program(
            "initial noise", initial_noise, (random_key(), self.rows(jnp.int32), self.shape)
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
                random_key(),
                self.rows(jnp.int32),
                *past,
            ),
            stay=2,
            beside=(
                *self.trajectories,
                *[self.latents()] * (self.settings.batches - 1),
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
            beside=(self.trainable if self.recipe.train.offload_optimiser else None,)
            + ((self.solver_state(), self.text()),) * (self.eval_batches - 1)
            # the noise
            + (self.rows(jnp.float32, shape=self.eval_shape),) * self.eval_batches,
        )

    def unguided_step(self) -> Program:
        return dataclasses.replace(
            self.ode_step(), name="evaluation step without guidance", jitted=self.unguided_steps[0]
        )

    def update(self, expert: int = 0) -> Program:
        """Of one optimiser step: M micro-batches of the recipe's batch, K stochastic steps each.
        Where the optimiser's state waits in host memory, the gradient, which takes the most.
        """
        if self.recipe.train.offload_optimiser:
            return Program(
                self.named("update", expert),
                self.updates[expert].gradient,
                (self.trainable, self.state.held, self.frozen, self.update_batch(expert)),
                stay=3,
                beside=self.trajectories,
            )
        kept = (number(),) if self.settings.keeps_old else ()
        return Program(
            self.named("update", expert),
            self.updates[expert],
            (self.state, self.frozen, self.update_batch(expert), *kept),
            stay=2,
            beside=self.trajectories,
        )

    def decode(self, shape: tuple[int, ...] | None = None) -> list[Program]:
        """The VAE on a batch of latents (F, H, W, C), the rollout's by default: whole clips, or the
        chunks that `pipeline.make_decoder` chooses, the first one and those after it.
        """
        whole = self.decode_whole(shape := shape or self.shape)
        state, latents = whole.args
        chunk = vae_chunks.choose_chunk(
            self.preset.vae, latents.sharding.shard_shape(latents.shape)
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
        state = lie(self.vae[1], mesh_lib.replicated(self.mesh))
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
            "text_encoder", self.preset.text_encoder, dtype=self.settings.dtype
        )
        here = jax.sharding.SingleDeviceSharding(self.mesh.devices.flat[0])
        ids = jax.ShapeDtypeStruct((16, self.text_rows), jnp.int32, sharding=here)
        return Program("text encoder", pipeline.make_encoder(graph), (lie(state, here), ids, ids))

    # ---- arguments -------------------------------------------------------------------------------
    def params(self, tree):
        """Abstract parameters, or what has their shapes, as `mesh.shard_params` lays them."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            mesh_lib.param_shardings(tree, self.mesh),
        )

    @functools.cached_property
    def frozen(self):
        """One expert's base weights; None in full fine-tuning without a reference, as in
        `grpo.train`.
        """
        needed = self.settings.lora is not None or self.settings.needs_reference
        return self.params(self.policy.base) if needed else None

    @functools.cached_property
    def trainable(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.params(self.policy.trainable)

    @functools.cached_property
    def state(self) -> TrainState:
        return self.params(
            state_shapes(
                self.policy, self.settings.optimiser, self.settings.loss, self.settings.keeps_old
            )
        )

    def solver_state(self) -> SolverState:
        x = self.rows(jnp.float32, shape=self.eval_shape)
        return SolverState(x, (x,) * len(jax.eval_shape(self.solver.init, x).history))

    def trajectory(self, expert: int, *leading: int) -> Trajectory:
        """Of a rollout batch; with a leading axis, of several."""
        k = self.trained_steps(expert)
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
            x if self.settings.loss.needs_old_mean else None,
        )

    @functools.cached_property
    def trajectories(self) -> tuple:
        """All of an epoch; of methods that train on finished videos, their latents."""
        if self.settings.forward is not None:
            return (self.latents(),) * self.settings.batches
        experts = [i for i, name in enumerate(self.preset.experts) if name in self.trained]
        ends = (self.latents(),) * self.settings.batches if self.settings.importance else ()
        return (*(self.trajectory(i) for i in experts for _ in range(self.settings.batches)), *ends)

    @property
    def unstacked(self) -> list[jax.ShapeDtypeStruct]:
        """What the batch under way keeps of its steps before they are stacked; the host dispatches
        one batch ahead, so it may lie there while another is decoded.
        """
        if self.settings.forward is not None:
            return []
        most = max(map(self.trained_steps, range(len(self.preset.experts))))
        return [self.latents()] * most * (3 if self.settings.loss.needs_old_mean else 2)

    def update_batch(self, expert: int) -> UpdateBatch | ForwardBatch:
        if (f := self.settings.forward) is None:
            m, b = self.update_batches(expert).shape[1], self.recipe.sample.batch_size
            steps = (self.trained_steps(expert),) if self.settings.advantage_by_step else ()
            return UpdateBatch(
                self.trajectory(expert, m),
                jax.ShapeDtypeStruct((m, *steps, b), jnp.float32),
                jax.ShapeDtypeStruct((m, b), bool),
            )
        m, b = self.selected
        floats, bools = (jax.ShapeDtypeStruct((m, b), dtype) for dtype in (jnp.float32, bool))
        k, latents = (
            self.trained_steps(expert),
            self.rows(jnp.float32, m, shape=self.shape, batch=b),
        )
        levels = jax.ShapeDtypeStruct((m, k, b), jnp.float32)
        return ForwardBatch(
            latents,
            latents if f.method == "dpo" else None,
            self.text(m, batch=b),
            self.rows(jnp.int32, m, batch=b),
            levels,
            levels,
            floats,
            bools,
            jax.ShapeDtypeStruct((k,), jnp.int32),
            random_key(),
        )

    @property
    def own_steps(self) -> bool:
        """Whether videos of a batch have stochastic steps of their own."""
        return self.windows.rule == ONE_PER_GROUP

    @property
    def stochastic(self) -> jax.ShapeDtypeStruct:
        """Whether a step is: one for all videos of a batch, or each one's own."""
        return self.rows(bool) if self.own_steps else jax.ShapeDtypeStruct((), bool)

    def rows(
        self, dtype, *leading: int, shape: tuple[int, ...] = (), batch: int = 0
    ) -> jax.ShapeDtypeStruct:
        """[*leading, B, *shape], split over the mesh by B. batch: another B than the recipe's."""
        sharding = mesh_lib.batch_sharding(self.mesh, len(leading))
        size = batch or self.recipe.sample.batch_size
        return jax.ShapeDtypeStruct((*leading, size, *shape), dtype, sharding=sharding)

    def latents(self, *leading: int) -> jax.ShapeDtypeStruct:
        return self.rows(jnp.float32, *leading, shape=self.shape)

    def text(self, *leading: int, batch: int = 0) -> TextBatch:
        """In the text encoder's type, which is the model's."""
        dtype, rows = self.settings.dtype, (self.text_rows, self.preset.transformer.text_dim)
        negative = jax.ShapeDtypeStruct(
            (*leading, *rows), dtype, sharding=mesh_lib.replicated(self.mesh)
        )
        return TextBatch(
            self.rows(dtype, *leading, shape=rows, batch=batch),
            negative,
            pipeline.TEXT_ROWS - self.text_rows,
        )


def tokens(shape: tuple[int, ...]) -> int:
    """S of latents (F, H, W, C)."""
    frames, height, width, _ = shape
    return frames * (height // 2) * (width // 2)


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


def random_key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))
