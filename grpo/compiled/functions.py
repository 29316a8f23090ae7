"""The jitted functions of a run, and abstract arguments to lower and compile them with.

`grpo.train` calls the functions made here. `grpo.compiled.compile` compiles them before a weight is
read, and `grpo.plan` without weights, for a mesh of devices that exist or of a topology to compile
for. Abstract arguments have the types and shardings of those in training, so training calls the
functions that were compiled ahead.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo.compiled import offload
from grpo.compiled.program import Program, identity, integer, number, shared
from grpo.compiled.run_arrays import RunArrays
from grpo.learning import abstract, data_loss, optimiser
from grpo.learning.confidence import make_probe, probed_guidance
from grpo.learning.head_guidance import HeadGuidance, HeadState
from grpo.learning.step_table import StepTable
from grpo.rollout import initial_noise, make_step
from grpo.settings import video_sizes
from grpo.settings.video_sizes import Size
from wan_jax.diffusion.experts import per_guidance
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.inference import pipeline
from wan_jax.models import vae_chunks
from wan_jax.storage import model_dir

# attributes of `Functions` that are the same for all sizes of videos; for those of one shift in
# training; and for those of one shift in evaluations
OF_ALL = ("policy", "vae", "decoder")
OF_TRAINING = ("table", "steps", "updates", "refit", "probes")
OF_EVALUATION = ("eval_steps", "unguided_steps")


@dataclasses.dataclass(frozen=True)
class Functions(RunArrays):
    """The jitted functions of a run, one for each expert. Experts with the same guidance share
    them.
    """

    @functools.cached_property
    def by_size(self) -> dict[tuple[Size, Size], "Functions"]:
        """The results of `of_sizes`, by their sizes."""
        return {}

    def of_sizes(self, sample: Size, evaluation: Size) -> "Functions":
        """Return the functions for one size in training and one in evaluation. Sizes of one shift have
        the same jitted functions.
        """
        spec = self.spec.of_sizes(sample, evaluation)
        if spec is self.spec:
            return self
        if (sample, evaluation) not in self.by_size:
            other = Functions(spec, self.text_rows)
            own = self.spec.trained_sizes[0], self.spec.evaluated_sizes[0]
            known = [(*own, self), *((*sizes, made) for sizes, made in self.by_size.items())]
            same = [
                (OF_ALL, known),
                (OF_TRAINING, [k for k in known if k[0].shift == sample.shift]),
                (OF_EVALUATION, [k for k in known if k[1].shift == evaluation.shift]),
            ]
            for names, like in same:
                if like:
                    vars(other).update({name: getattr(like[0][2], name) for name in names})
            self.by_size[sample, evaluation] = other
        return self.by_size[sample, evaluation]

    def of_epoch(self, epoch: int) -> "Functions":
        """Return the functions for the size of an epoch's videos."""
        spec = self.spec
        size = video_sizes.at(epoch, spec.recipe.sample)
        one = len(spec.trained_sizes) == 1
        return self if one else self.of_sizes(size, spec.evaluated_sizes[0])

    def of_series(self, series: int | str) -> "Functions":
        """Return the functions for the size of a series of evaluations."""
        return self.of_sizes(self.spec.trained_sizes[0], self.spec.size_of(series))

    # ---- jitted functions --------------------------------------------------------------------
    @functools.cached_property
    def table(self) -> StepTable:
        """The values of the rollout's schedule for each step."""
        recipe = self.spec.recipe
        return StepTable.make(
            self.spec.schedule,
            self.spec.settings.sde,
            recipe.train.credit,
            self.spec.windows.ranges,
            recipe.sample.ode_solver,
        )

    @functools.cached_property
    def steps(self) -> tuple[Callable, ...]:
        """The denoising steps of the rollout."""
        method = self.spec.method
        make = functools.partial(
            make_step,
            self.policy,
            self.table,
            keep_mean=method.keeps_mean,
            kl_kind=method.sampling_kl,
            head=self.head,
        )
        return per_guidance(make, self.spec.sampling_guidance)

    @functools.cached_property
    def head(self) -> HeadGuidance | None:
        """The reward guidance of the rollout; None without."""
        return HeadGuidance.of(self.spec)

    @functools.cached_property
    def head_state(self) -> HeadState | None:
        """The state of the reward head; None without guidance."""
        if self.head is None:
            return None
        return abstract.arrays(self.head.state, sharding_lib.replicated(self.spec.mesh))

    @functools.cached_property
    def refit(self) -> Callable | None:
        """The update of the reward head; None without one that is fitted."""
        if self.head is None or not self.spec.recipe.reward.head_refit:
            return None
        return self.head.make_refit(self.spec.mesh)

    @functools.cached_property
    def probes(self) -> tuple[Callable, ...]:
        """The probes of the policy's confidence; () where it is not a reward."""
        if not self.spec.recipe.reward.confidence:
            return ()
        make = functools.partial(make_probe, self.policy)
        return per_guidance(make, probed_guidance(self.spec))

    @functools.cached_property
    def updates(self) -> tuple[Callable, ...]:
        """The optimiser steps."""
        spec, method = self.spec, self.spec.method
        module = offload if spec.recipe.train.offload_optimiser else optimiser

        def make(key):
            gradient = method.make_gradient(self.policy, self.table, key)
            if spec.recipe.data.used and not spec.recipe.data.only:
                gradient = data_loss.with_data(gradient, self.policy, spec.recipe.data.weight)
            return module.make_update(
                gradient,
                self.policy,
                spec.settings.optimiser,
                spec.mesh,
                adaptive_kl=method.adaptive_kl,
                lagged=method.lagged,
            )

        return per_guidance(make, method.gradient_keys(spec))

    @functools.cached_property
    def eval_steps(self) -> tuple[Callable, ...]:
        """The denoising steps of the evaluation."""
        make = functools.partial(pipeline.make_ode_step, self.policy.module, self.spec.solver)
        return per_guidance(make, self.spec.eval_guidance)

    @functools.cached_property
    def unguided_steps(self) -> tuple[Callable, ...]:
        """The denoising steps of the evaluation without guidance; () where it is not made."""
        if not self.spec.recipe.eval.also_unguided:
            return ()
        make = functools.partial(pipeline.make_ode_step, self.policy.module, self.spec.solver)
        return per_guidance(make, (1.0,) * len(self.spec.preset.experts))

    @functools.cached_property
    def vae(self) -> tuple:
        """(graphdef, abstract state) of the VAE."""
        return model_dir.abstract("vae", self.spec.preset.vae)

    @functools.cached_property
    def decoder(self) -> tuple[Callable, Callable]:
        """The functions that decode a whole video, and a chunk of one."""
        return pipeline.decoder_functions(self.vae[0])

    # ---- functions with abstract arguments ---------------------------------------------------
    def programs(self) -> list[Program]:
        """Return all functions that epochs call, each once for every size of videos.

        Experts may share theirs, and an evaluation uses training's decoder at the same size.
        """
        trained, evaluated = self.spec.trained_sizes, self.spec.evaluated_sizes
        training = {size: self.of_sizes(size, evaluated[0]) for size in trained}
        evaluation = {size: self.of_sizes(trained[0], size) for size in evaluated}
        distinct = {}
        for sizes, make in (
            (training, Functions.training_steps),
            (evaluation, Functions.evaluation_steps),
            ({} if self.spec.recipe.data.only else training, Functions.decode),
            (evaluation, Functions.evaluation_decode),
        ):
            for size, functions_of_size in sizes.items():
                for program in make(functions_of_size):
                    suffix = video_sizes.suffix(size, sizes)
                    named = dataclasses.replace(program, name=program.name + suffix)
                    distinct.setdefault(identity(program), named)
        return list(distinct.values())

    def training_steps(self) -> list[Program]:
        """Return the denoising and optimiser steps of all experts; training on data alone has no
        rollout.
        """
        experts = range(0 if self.spec.recipe.data.only else len(self.spec.preset.experts))
        refit = [self.refit_step()] if self.refit is not None and experts else []
        probes = map(self.probe, experts) if self.probes else ()
        updates = map(self.update, self.spec.trained_experts)
        return shared([*map(self.rollout_step, experts), *updates, *refit, *probes])

    def evaluation_steps(self) -> list[Program]:
        """Return the denoising steps of the evaluation of all experts."""
        unguided = [self.unguided_step()] if self.unguided_steps else []  # one for all experts
        return shared([*map(self.ode_step, range(len(self.spec.preset.experts))), *unguided])

    def evaluation_decode(self) -> list[Program]:
        """Return the VAE at the evaluation's shape."""
        return [
            dataclasses.replace(program, name=f"evaluation {program.name}", extra=())
            for program in self.decode(self.spec.eval_shape)
        ]

    def with_expert(self, name: str, expert: int) -> str:
        """Return a function's name with that of the expert, where the model has two."""
        experts = self.spec.preset.experts
        return f"{name}, {experts[expert]}" if len(experts) > 1 else name

    def initial_noise(self) -> Program:
        """Return the function that draws x_T of a batch."""
        args = (self.random_key(), self.rows(jnp.int32), self.spec.shape)
        return Program("initial noise", initial_noise, args)

    def rollout_step(self, expert: int = 0) -> Program:
        """Return one denoising step of the rollout."""
        multistep = () if self.table.dpm is None else (self.latents(), self.stochastic)
        head = self.head_state
        return Program(
            self.with_expert("rollout step", expert),
            self.steps[expert],
            (
                self.trainable if head is None else (self.trainable, head.arrays),
                self.frozen,
                self.latents(),
                integer(),
                self.stochastic,
                self.text(),
                self.random_key(),
                self.rows(jnp.int32),
                *multistep,
            ),
            resident=2,
            extra=(
                *self.trajectories,
                *[self.latents()] * (self.spec.settings.batches - 1),
            ),
        )

    def refit_step(self) -> Program:
        """Return one update of the reward head."""
        rows = self.rows(jnp.float32), self.rows(bool)
        args = (self.head_state, self.random_key(), self.latents(), self.text(), *rows)
        return Program("reward head update", self.refit, args, resident=1, extra=self.trajectories)

    def probe(self, expert: int = 0) -> Program:
        """Return the probes of a batch at one noise level."""
        of_batch = self.text(), self.random_key(), self.rows(jnp.int32)
        args = self.trainable, self.frozen, self.latents(), *of_batch, integer(), number(), number()
        name = self.with_expert("confidence", expert)
        return Program(name, self.probes[expert], args, resident=2, extra=self.trajectories)

    def ode_step(self, expert: int = 0) -> Program:
        """Return one denoising step of the evaluation."""
        batches = self.spec.eval_batches
        train = self.spec.recipe.train
        average = self.trainable if train.offload_optimiser and train.ema_decay else None
        noise = self.rows(jnp.float32, shape=self.spec.eval_shape)
        return Program(
            self.with_expert("evaluation step", expert),
            self.eval_steps[expert],
            ((self.trainable, self.frozen), self.solver_state(), integer(), self.text()),
            resident=1,
            # the average that is fetched from host memory, the other batches, the noise of all
            extra=(average,)
            + ((self.solver_state(), self.text()),) * (batches - 1)
            + (noise,) * batches,
        )

    def unguided_step(self) -> Program:
        """Return one denoising step of the evaluation without guidance."""
        return dataclasses.replace(
            self.ode_step(), name="evaluation step without guidance", jitted=self.unguided_steps[0]
        )

    def update(self, expert: int = 0) -> Program:
        """Return one optimiser step: M micro-batches with K stochastic steps each.

        Where the optimiser's state is offloaded to host memory it is the gradient, the part of the
        optimiser step that needs the most memory.
        """
        name, update = self.with_expert("update", expert), self.updates[expert]
        batch = self.update_batch(expert)
        kl_weight = number() if self.spec.recipe.train.on_alarm == "kl" else None
        if isinstance(update, offload.OffloadedUpdate):
            inputs = self.state.gradient_inputs(kl_weight)
            args = (self.trainable, inputs, self.frozen, batch)
            return Program(name, update.gradient, args, resident=3, extra=self.waiting(expert))
        share_kept = {name: number() for name in self.spec.method.lagged}
        args = (self.state, self.frozen, batch, share_kept, kl_weight)
        return Program(name, update, args, resident=2, extra=self.waiting(expert))

    def decode(self, shape: tuple[int, ...] | None = None) -> list[Program]:
        """Return the VAE on a batch of latents (F, H, W, C), the rollout's by default: on whole
        videos, or on the first chunk and a later one, as `pipeline.make_decoder` chooses.
        """
        shape = shape or self.spec.shape
        whole = self.decode_whole(shape)
        state, latents = whole.args
        chunk = vae_chunks.choose_chunk(
            self.spec.preset.vae, latents.sharding.shard_shape(latents.shape)
        )
        if not 0 < chunk < shape[0]:
            return [whole]
        decode_chunk, history, programs = self.decoder[1], (), []
        for name, frames in zip(
            ("decode, first chunk", "decode, chunk"), vae_chunks.chunk_sizes(shape[0], chunk)
        ):
            args = (state, self.rows(jnp.float32, shape=(frames, *shape[1:])), history)
            extra = (*self.trajectories, latents)
            programs.append(Program(name, decode_chunk, args, resident=1, extra=extra))
            history = abstract.arrays(jax.eval_shape(decode_chunk, *args)[1], latents.sharding)
        return programs

    def decode_whole(self, shape: tuple[int, ...]) -> Program:
        """Return the VAE on a batch of whole videos with latents (F, H, W, C)."""
        state = abstract.arrays(self.vae[1], sharding_lib.replicated(self.spec.mesh))
        return Program(
            "decode",
            self.decoder[0],
            (state, self.rows(jnp.float32, shape=shape)),
            resident=1,
            extra=self.trajectories,
        )

    def encode_text(self) -> Program:
        """Return the text encoder on 16 prompts, on one device. It is deleted before the
        transformer's weights are loaded.
        """
        graph, state = model_dir.abstract(
            "text_encoder", self.spec.preset.text_encoder, dtype=self.spec.settings.dtype
        )
        device = jax.sharding.SingleDeviceSharding(self.spec.mesh.devices.flat[0])
        ids = abstract.array((16, self.text_rows), jnp.int32, sharding=device)
        args = (abstract.arrays(state, device), ids, ids)
        return Program("text encoder", pipeline.make_encoder(graph), args)
