"""Measures the parts of which an epoch consists, with random weights, in one process.

    python -m benchmarks.parts --size 1.3b --guidance 4.5 --kl 0.004 --json FILE

    rollout           a denoising step without guidance: forward pass, SDE step, log-prob, noise
    guided rollout    the same with guidance
    grpo update       Flow-GRPO's update of one trained step, with guidance and the KL to the reference
    nft update        DiffusionNFT's update at one noise level, without guidance, with its KL
    decode            latents to uint8 frames on the host, VAE in fp32

Updates are optimiser steps over two trained steps or levels, divided by two. With several `--devices`
the batch is that of all of them. Model FLOPs are counted as in `benchmarks.full_size`.
`benchmarks.epoch_cost` adds the parts up to whole epochs, `benchmarks.scaling` compares numbers of GPUs,
and `benchmarks.peer --task=parts` measures the same in PyTorch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import workload
from benchmarks.decode import random_vae
from benchmarks.full_size import RandomPolicy, peak_bytes, software, step_table, timed
from benchmarks.workload import Record, Stage
from grpo.learning.finished_batch import FinishedBatch
from grpo.learning.optimiser import OptimiserConfig, init_state, make_update
from grpo.learning.policy import Policy, make_structure
from grpo.learning.policy_gradient import make_gradient, stack_batches
from grpo.learning.policy_loss import LossConfig
from grpo.learning.step_table import StepTable
from grpo.methods.nft import BEHAVIOUR, NFT
from grpo.rollout import Trajectory, make_step
from wan_jax.choices import WEIGHTS
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.inference import pipeline
from wan_jax.models.attention import platform_of
from wan_jax.models.lora import LoRAConfig
from wan_jax.models.quantised import Quantisation
from wan_jax.models.transformer import REMAT_POLICIES


def with_remat(drawn: RandomPolicy, settings, remat: str) -> Policy:
    """Return the structure of the policy with other rematerialised activations."""
    device = drawn.mesh.devices.flat[0]
    return make_structure(
        drawn.config,
        lora=LoRAConfig(workload.RANK, workload.ALPHA),
        dtype=jnp.dtype(settings.dtype),
        attention=drawn.backend,
        remat=remat,
        quantisation=Quantisation.choose(settings.weights, platform_of(device), device),
        mesh=drawn.mesh,
    )


def one_batch(text: TextBatch) -> TextBatch:
    """Return the text of a batch with an axis of micro-batches before it."""
    return jax.tree.map(lambda rows: rows[None], text)


def finished_batch(
    x: jax.Array, text: TextBatch, table: StepTable, mesh: jax.sharding.Mesh
) -> FinishedBatch:
    """Return an update's batch of DiffusionNFT at the noise levels of two steps. x: final latents."""
    size = len(x)

    def rows(values: jax.Array) -> jax.Array:
        return sharding_lib.place(values, sharding_lib.batch_sharding(mesh, values.ndim - 1))

    def levels(values) -> jax.Array:
        chosen = jnp.asarray([values[i] for i in workload.TRAINED], jnp.float32)
        return rows(jnp.broadcast_to(chosen[None, :, None], (1, len(chosen), size)))

    return FinishedBatch(
        x0=x[None],
        worse=None,
        text=one_batch(text),
        video=rows(jnp.arange(size, dtype=jnp.int32)[None]),
        sigma=levels(table.sigma),
        timestep=levels(table.timestep),
        weight=rows(jax.random.uniform(jax.random.key(5), (1, size))),
        valid=rows(jnp.ones((1, size), bool)),
        draw=jnp.arange(len(workload.TRAINED), dtype=jnp.int32),
        key=jax.random.key(6),
    )


def measure(settings) -> Record:
    """Return the figures of all parts. settings: the flags."""
    mesh = mesh_lib.make_mesh(settings.fsdp, jax.devices()[: settings.devices])
    drawn = RandomPolicy.draw(
        settings.size, settings.dtype, settings.remat, mesh, weights=settings.weights
    )
    guided = with_remat(drawn, settings, settings.guided_remat)
    trainable, frozen, table = drawn.trainable, drawn.frozen, step_table()
    shape, text = workload.shape_of_latents(settings), drawn.random_text(settings.batch)
    flops = workload.batch_flops(drawn.config, shape, settings.batch, 1) / settings.devices
    samples = drawn.placed(jnp.arange(settings.batch, dtype=jnp.int32))
    x = drawn.placed(jax.random.normal(jax.random.key(3), (settings.batch, *shape)))
    kind, key, stages = jax.devices()[0].device_kind, jax.random.key(4), {}
    print(
        f"parts: {settings.size}, {settings.dtype}, weights {settings.weights}, "
        f"{workload.describe_shape(settings)}, guidance {settings.guidance}, {settings.devices} x "
        f"{kind}, mesh {mesh_lib.describe(mesh)}, {software()}",
        flush=True,
    )

    def show(name: str, function, work: float | None, steps: int = 1) -> None:
        seconds = timed(function, settings.repeats) / steps
        stages[name] = Stage.of(seconds, peak_bytes(), work)
        print(f"{name}: {stages[name]}", flush=True)

    # Rollout steps
    steps = {
        "rollout": (make_step(drawn.policy, table, 1.0), flops),
        "guided rollout": (make_step(guided, table, settings.guidance), 2 * flops),
    }
    for name, (step, work) in steps.items():
        run = functools.partial(step, trainable, frozen, x, 3, True, text, key, samples)
        show(name, run, work)
    # Updates. Each of them donates its state
    optimiser, count = OptimiserConfig(), len(workload.TRAINED)
    step = steps["guided rollout"][0]
    taken = [
        (x, *step(trainable, frozen, x, i, True, text, key, samples)[:4]) for i in workload.TRAINED
    ]
    trajectory = Trajectory.make(taken, jnp.asarray(workload.TRAINED, jnp.int32), text)
    advantages = np.asarray(jax.random.normal(jax.random.key(7), (1, settings.batch)))
    batch = stack_batches([trajectory], advantages, np.ones((1, settings.batch), bool))
    nft = NFT(kl_weight=NFT.default_kl_weight)
    loss, firsts = LossConfig(kl_beta=settings.kl), []

    def updating(policy: Policy, gradient, batch, lagged: tuple[str, ...]):
        """Return a function that updates a state of its own by the gradient."""
        apply = make_update(gradient, policy, optimiser, drawn.mesh, lagged=lagged)
        state = init_state(jax.tree.map(jnp.copy, trainable), optimiser, None, lagged)

        def run():
            nonlocal state
            state, metrics, _ = apply(state, frozen, batch, dict.fromkeys(lagged, 1.0))
            firsts.append(metrics.averages())
            return state

        return run

    gradient = make_gradient(guided, table, settings.guidance, loss)
    show("grpo update", updating(guided, gradient, batch, ()), 6 * flops, count)
    first = firsts[0]
    gradient = nft.make_gradient(drawn.policy, table, 1.0)
    finished = finished_batch(x, text, table, mesh)
    show("nft update", updating(drawn.policy, gradient, finished, (BEHAVIOUR,)), 3 * flops, count)
    # Decoding
    graph, state = random_vae(settings.size, jnp.float32)
    decode, state = pipeline.make_decoder(graph), sharding_lib.replicate(state, mesh)
    show("decode", lambda: decode(state, x)(), None)
    return Record("ours", stages, kind, software(), (first["ratio_min"], first["ratio_max"]))


def main(_):
    measure(flags.FLAGS).write(flags.FLAGS.json)


if __name__ == "__main__":
    workload.define_flags(guidance=4.5, kl=0.004)
    flags.DEFINE_string("dtype", "bfloat16", "data type of weights and matrix products")
    flags.DEFINE_enum("weights", "dtype", WEIGHTS, "how frozen weights are stored")
    flags.DEFINE_integer("devices", 1, "number of GPUs, data x fsdp", lower_bound=1)
    flags.DEFINE_integer("fsdp", 1, "GPUs that share the weights")
    for name, update in (("remat", "without guidance"), ("guided_remat", "with guidance")):
        flags.DEFINE_enum(
            name,
            "save_matmuls",
            list(REMAT_POLICIES),
            f"activations that the backward pass of the update {update} recomputes",
        )
    app.run(main)
