"""Measures the rollout step and the update step of Wan at full size with random weights.

    python -m benchmarks.full_size --size 1.3b --height 512 --width 512 --frames 1 --batch 9
    python -m benchmarks.full_size --size 1.3b --guidance 4.5 --kl 0.004 --json FILE
    python -m benchmarks.full_size --size 14b --devices 4 --fsdp 4 --batch 36 --full

Reports seconds, model FLOP/s and peak memory. The transformer has the real configuration, weights
drawn on the devices, and LoRA of rank 32 on attention, or with `--full` all weights trained. Text
is 64 rows of random embeddings (`--text_rows`) padded to 512. Model FLOPs are the matrix products
of a forward pass (two with guidance), three times that in the update; recomputation and the
reference of `--kl` are not counted. TFLOP/s are per device; MFU is relative to an H200's nominal 989.
`benchmarks.peer` measures the same in PyTorch, `benchmarks.side_by_side` compares both, and
`benchmarks.scaling` compares several devices with one.
"""

import dataclasses
import functools
import statistics
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import kernels, workload
from benchmarks.workload import Record, Stage
from grpo.compiled import offload
from grpo.learning import optimiser as update
from grpo.learning.optimiser import OptimiserConfig
from grpo.learning.policy import Policy, make_policy
from grpo.learning.policy_gradient import make_gradient, stack_batches
from grpo.learning.policy_loss import LossConfig
from grpo.learning.step_table import StepTable
from grpo.rollout import make_step, rollout
from wan_jax.choices import WEIGHTS
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.diffusion.sde import SDEConfig
from wan_jax.distributed import memory
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.models import flat_params, quantised
from wan_jax.models.attention import choose_backend, platform_of
from wan_jax.models.config import TransformerConfig
from wan_jax.models.lora import LoRAConfig
from wan_jax.models.quantised import Quantisation
from wan_jax.models.transformer import REMAT_POLICIES, WanTransformer3D


def random_bias(name: str, array: jax.Array) -> jax.Array:
    """Return the array, or for a bias random numbers of about the size of a trained one.

    With zeros, one function that rounds before adding a bias and one that rounds after it would
    agree.
    """
    if not name.endswith("bias"):
        return array
    key = jax.random.fold_in(jax.random.key(2), zlib.crc32(name.encode()))
    return (0.02 * jax.random.normal(key, array.shape)).astype(array.dtype)


def draw_layers(like: nnx.State, shardings: nnx.State, quantisation: Quantisation) -> nnx.State:
    """Draw quantised weights, one layer of one kernel at a time, as they are loaded."""
    wanted, placed = flat_params.flatten(like), flat_params.flatten(shardings)
    abstract = {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=placed[k]) for k, v in wanted.items()
    }
    dtype, flat = wanted["proj_out/kernel"].dtype, {}
    for name, (values, scales) in quantised.kernels(
        {k: v.shape for k, v in wanted.items()}
    ).items():
        layers, *shape = quantisation.kernel_shape(wanted[values].shape)
        keys = jax.random.split(jax.random.key(zlib.crc32(name.encode())), layers)
        kernels = (jax.random.normal(key, shape, dtype) * shape[0] ** -0.5 for key in keys)
        flat[values], flat[scales] = quantised.quantise_layers(
            quantisation, kernels, abstract[values], abstract[scales]
        )
    for name, x in abstract.items():
        if name not in flat:
            key = jax.random.fold_in(jax.random.key(1), zlib.crc32(name.encode()))
            value = jax.random.normal(key, x.shape, x.dtype) * x.shape[-2 % len(x.shape)] ** -0.5
            value = jnp.ones(x.shape, x.dtype) if name.endswith("scale") else value
            flat[name] = sharding_lib.place(random_bias(name, value), x.sharding)
    return flat_params.unflatten(like, flat)


@dataclasses.dataclass(frozen=True)
class RandomPolicy:
    """A policy with random weights that are drawn on the devices."""

    config: TransformerConfig
    mesh: jax.sharding.Mesh
    backend: str
    policy: Policy
    trainable: dict
    frozen: nnx.State | None

    @classmethod
    def draw(
        cls,
        size: str,
        dtype,
        remat: str,
        mesh: jax.sharding.Mesh | None = None,
        full: bool = False,
        weights: str = "dtype",
        kernel: bool = True,
    ) -> "RandomPolicy":
        """Draw a policy. mesh: None for the first device. full: train all weights, no reference.
        kernel: whether fp8 uses GELU's, where that is the device's default.
        """
        config, dtype = workload.transformer_config(size), jnp.dtype(dtype)
        mesh = mesh or mesh_lib.make_mesh(devices=jax.devices()[:1])
        device = mesh.devices.flat[0]
        quantisation = Quantisation.choose(weights, platform_of(device), device)
        if quantisation is not None and not kernel:
            quantisation = dataclasses.replace(quantisation, kernel=False)
        backend = choose_backend("auto", platform_of(device), dtype, config.attention_head_dim)

        def draw():
            state = nnx.split(
                WanTransformer3D(
                    config,
                    dtype=dtype,
                    attention=backend,
                    quantisation=quantisation,
                    rngs=nnx.Rngs(0),
                )
            )[1]
            return flat_params.unflatten(
                state, {k: random_bias(k, v) for k, v in flat_params.flatten(state).items()}
            )

        like = jax.eval_shape(draw)
        shardings = sharding_lib.param_shardings(like, mesh)
        if quantisation is None:
            frozen = jax.jit(draw, out_shardings=shardings)()
        else:
            frozen = draw_layers(like, shardings, quantisation)
        policy, trainable = make_policy(
            config,
            frozen,
            mesh,
            lora=None if full else LoRAConfig(workload.RANK, workload.ALPHA),
            key=jax.random.key(0),
            dtype=dtype,
            attention=backend,
            remat=remat,
            quantisation=quantisation,
        )
        return cls(config, mesh, backend, policy, trainable, None if full else frozen)

    def placed(self, rows: jax.Array) -> jax.Array:
        """Return rows [B, ...] with training's sharding, or a function would compile twice."""
        return sharding_lib.place(rows, sharding_lib.batch_sharding(self.mesh))

    def random_text(self, batch: int, rows: int = workload.TEXT) -> TextBatch:
        """Return random embeddings of a batch of prompts and of the negative prompt.

        They have the weights' data type, as in training.
        """
        dtype = flat_params.flatten(self.policy.base)["proj_out/kernel"].dtype
        shape = batch + 1, rows, self.config.text_dim
        text = jax.random.normal(jax.random.key(1), shape, dtype)
        return TextBatch(
            self.placed(text[:-1]),
            sharding_lib.place(text[-1], sharding_lib.replicated(self.mesh)),
            workload.TEXT_ROWS - rows,
        )


def step_table() -> StepTable:
    """Return the stochastic steps of Flow-GRPO for Wan."""
    return StepTable.make(flow_sigmas(workload.STEPS, workload.SHIFT), SDEConfig("flow_grpo_wan"))


def peak_bytes() -> int | None:
    """Return the largest peak memory of any device so far, or None if it is not reported."""
    return memory.peaks().device


def software() -> str:
    """Return the name and version of the framework."""
    return f"JAX {jax.__version__}"


def timed(function, repeats: int) -> float:
    """Return the median seconds of a call that returns arrays, after one warm-up call."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measure(settings) -> Record:
    """Return the figures of both steps. settings: the flags."""
    # Weights, functions and inputs
    mesh = mesh_lib.make_mesh(settings.fsdp, jax.devices()[: settings.devices], settings.context)
    drawn = RandomPolicy.draw(
        settings.size,
        settings.dtype,
        settings.remat,
        mesh,
        settings.full,
        settings.weights,
        settings.kernel,
    )
    policy, trainable, frozen = drawn.policy, drawn.trainable, drawn.frozen
    steps, optimiser = step_table(), OptimiserConfig()
    step = make_step(policy, steps, settings.guidance)
    where = offload if settings.offload_optimiser else update
    gradient = make_gradient(policy, steps, settings.guidance, LossConfig(kl_beta=settings.kl))
    apply = where.make_update(gradient, policy, optimiser, mesh)
    shape = workload.shape_of_latents(settings)
    text = drawn.random_text(settings.batch, settings.text_rows)
    flops = (
        workload.batch_flops(drawn.config, shape, settings.batch, settings.guidance)
        / settings.devices
    )
    parameters = sum(array.size for array in jax.tree.leaves(policy.base))
    kind = jax.devices()[0].device_kind
    print(
        f"{settings.size}: {parameters:,} parameters {settings.dtype}, weights {settings.weights}, "
        f"{'' if settings.kernel else 'no kernel, '}"
        f"{'all' if settings.full else 'adapters'} "
        f"trained, {workload.describe_shape(settings)}, guidance {settings.guidance}, "
        f"attention {drawn.backend}, remat {settings.remat}, {settings.devices} x {kind}, mesh "
        f"{mesh_lib.describe(mesh)}, jax {jax.__version__}",
        flush=True,
    )
    stages = {}

    def show(name, title, seconds, work):
        stages[name] = Stage.of(seconds, peak_bytes(), work)
        print(f"{title}: {stages[name]}", flush=True)

    # The rollout step
    samples = drawn.placed(jnp.arange(settings.batch, dtype=jnp.int32))
    x = drawn.placed(jax.random.normal(jax.random.key(3), (settings.batch, *shape)))
    key = jax.random.key(4)
    show(
        "rollout",
        "rollout step",
        timed(
            functools.partial(step, trainable, frozen, x, 3, True, text, key, samples),
            settings.repeats,
        ),
        flops,
    )
    # The update step, for every expert in turn
    window = np.array(workload.TRAINED)
    _, trajectory = rollout(
        step, trainable, frozen, x, text, key=key, samples=samples, steps=range(18), window=window
    )
    advantages = np.random.default_rng(0).standard_normal((1, settings.batch))
    batch = stack_batches(
        [trajectory] * settings.micro,
        np.repeat(advantages, settings.micro, 0),
        np.ones((settings.micro, settings.batch), bool),
    )
    states, firsts = [], []
    while len(states) < settings.experts:
        start = time.perf_counter()
        weights = jax.tree.map(jnp.copy, trainable) if states else trainable
        states.append(jax.block_until_ready(where.init_state(weights, optimiser)))
        del weights
        if settings.offload_optimiser:
            seconds = time.perf_counter() - start
            print(f"optimiser's state on the host after {seconds:.1f} s", flush=True)
    del drawn, trainable  # the states' weights may be donated

    def one_update():
        """Update every expert once."""
        for i, state in enumerate(states):
            states[i], metrics, _ = apply(state, frozen, batch)
            if not firsts:
                firsts.append(metrics.averages())
        return states

    seconds = timed(one_update, settings.repeats) / settings.experts
    show(
        "update",
        f"update of {settings.micro} x {len(window)} steps, each",
        seconds / len(window) / settings.micro,
        3 * flops,
    )
    (first,) = firsts
    if settings.profile:
        kernels.show(
            "rollout step",
            lambda: step(states[0].trainable, frozen, x, 3, True, text, key, samples),
        )
        kernels.show("update", one_update)
    print(f"ratio of the first update: {first['ratio_min']:.7f} to {first['ratio_max']:.7f}")
    return Record("ours", stages, kind, software(), (first["ratio_min"], first["ratio_max"]))


def main(_):
    memory.allow_pinned()
    measure(flags.FLAGS).write(flags.FLAGS.json)


if __name__ == "__main__":
    workload.define_flags(guidance=1.0, kl=0.0)
    flags.DEFINE_integer("micro", 1, "rollout batches of an update")
    flags.DEFINE_string("dtype", "bfloat16", "data type of weights and matrix products")
    flags.DEFINE_enum("weights", "dtype", WEIGHTS, "how frozen weights are stored")
    flags.DEFINE_bool("kernel", True, "use GELU's kernel with fp8 on NVIDIA GPUs")
    flags.DEFINE_enum(
        "remat",
        "save_matmuls",
        list(REMAT_POLICIES),
        "activations that the backward pass recomputes",
    )
    flags.DEFINE_integer(
        "text_rows", workload.TEXT, "rows of a prompt; FLOPs are counted for the default"
    )
    flags.DEFINE_integer("devices", 1, "number of GPUs, data x fsdp x context", lower_bound=1)
    flags.DEFINE_integer("fsdp", 1, "GPUs that share the weights")
    flags.DEFINE_integer("context", 1, "GPUs that share a video's tokens")
    flags.DEFINE_bool("full", False, "train all weights, without a reference")
    flags.DEFINE_integer("experts", 1, "experts trained in turn, 2 as in A14B", lower_bound=1)
    flags.DEFINE_bool(
        "offload_optimiser", False, "offload moments and average to host memory between updates"
    )
    flags.DEFINE_bool("profile", False, "list the kernels by time")
    app.run(main)
