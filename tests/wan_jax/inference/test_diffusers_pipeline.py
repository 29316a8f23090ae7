"""The whole way from prompt to pixels, against Diffusers' WanPipeline."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.from_diffusers import convert
from convert.to_diffusers import export
from tests import tiny
from wan_jax.diffusion.experts import guidances, per_guidance, segments
from wan_jax.diffusion.solvers import make_solver
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.inference import pipeline
from wan_jax.models import flat_params, lora
from wan_jax.models.config import load_scheduler
from wan_jax.models.layers import LoRAParam
from wan_jax.models.lora import LoRAConfig
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.storage import model_dir
from wan_jax.storage.checkpoint import Checkpoints, join_experts
from wan_jax.storage.trained_weights import load_transformers

PROMPTS = ('A red sign with the word "open".', "Someone wrote “it's late” on a  wall.")


def one_device():
    return mesh_lib.make_mesh(devices=jax.devices()[:1])


# What depends on fewer settings than `sample` has is shared, so that it is loaded and compiled once
# for the module.


@functools.cache
def embedded(folder, prompts, negative):
    return pipeline.embed_prompts(model_dir.open_model(folder), prompts, negative)


@functools.cache
def loaded(folder, checkpoint, offload):
    return load_transformers(
        model_dir.open_model(folder), checkpoint, jnp.float32, "xla", one_device(), offload
    )


@functools.cache
def ode_solver(name, order, steps, shift):
    return make_solver(name, steps, shift, order=order)


@functools.cache
def ode_step(graphdef, solver, guidance):
    return pipeline.make_ode_step(lambda s: nnx.merge(graphdef, s), solver, guidance)


@functools.cache
def decoder(folder):
    graphdef, state = pipeline.load_vae(model_dir.open_model(folder), one_device())
    return functools.partial(pipeline.make_decoder(graphdef), state)


def sample(
    folder,
    prompts,
    noise,
    *,
    solver="unipc",
    order=2,
    steps=6,
    guidance=4.0,
    guidance_2=None,
    shift=3.0,
    negative="",
    checkpoint=None,
    offload="never",
):
    """Return the latents by our pipeline."""
    model, mesh = model_dir.open_model(folder), one_device()
    graphdef, weights = loaded(folder, checkpoint, offload)
    solver = ode_solver(solver, order, steps, shift)
    scales = guidances(guidance, guidance_2, len(model.experts))
    ode_steps = per_guidance(functools.partial(ode_step, graphdef, solver), scales)
    text = embedded(folder, tuple(prompts), negative).batch(
        np.arange(len(prompts)), sharding_lib.replicated(mesh), sharding_lib.replicated(mesh)
    )
    parts = segments(solver.schedule.timesteps, model.boundary)
    (latents,) = pipeline.sample_ode(
        ode_steps, lambda expert: (weights(expert),), parts, solver, [(jnp.asarray(noise), text)]
    )
    return np.asarray(latents)


def decode(folder, latents):
    """Return the uint8 videos by our pipeline."""
    return decoder(folder)(latents)().frames


@functools.cache
def peer(folder):
    import diffusers

    pipe = diffusers.WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe.scheduler.config


def peer_sample(
    folder,
    prompts,
    noise,
    *,
    frames,
    height,
    width,
    steps=6,
    guidance=4.0,
    guidance_2=None,
    shift=3.0,
    negative="",
    scheduler=None,
    pixels=True,
):
    """Return (latents, float frames in [0, 1] or None without `pixels`) by Diffusers."""
    import diffusers
    import torch

    pipe, schedule = peer(folder)
    pipe.scheduler = scheduler or diffusers.UniPCMultistepScheduler.from_config(
        schedule, flow_shift=shift
    )
    final = []

    def keep(pipe, step, timestep, tensors):
        final.append(tensors["latents"])
        return tensors

    latents = torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy())
    video = pipe(
        prompt=list(prompts),
        negative_prompt=negative,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        guidance_scale_2=guidance_2,
        latents=latents,
        output_type="np" if pixels else "latent",
        callback_on_step_end=keep,
    ).frames
    assert len(final) == steps
    return final[-1].numpy().transpose(0, 2, 3, 4, 1), video if pixels else None


def relative_error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    "frames, guidance, negative", [(1, 1.0, ""), (1, 4.0, "ugly, blurred"), (5, 4.0, "")]
)
def test_latents_and_pixels_of_diffusers(folders, frames, guidance, negative):
    """fp32: latents to 1e-4 relative after six UniPC steps, pixels to 1/255 on average."""
    source, model = folders
    noise = (
        np.random.default_rng(0)
        .standard_normal((2, (frames - 1) // 4 + 1, 4, 6, 16))
        .astype(np.float32)
    )
    latents = sample(model, PROMPTS, noise, guidance=guidance, negative=negative)
    wanted, pixels = peer_sample(
        source,
        PROMPTS,
        noise,
        frames=frames,
        height=32,
        width=48,
        guidance=guidance,
        negative=negative,
    )
    assert relative_error(latents, wanted) < 1e-4
    assert np.abs(decode(model, latents) / 255.0 - pixels).mean() < 1 / 255


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    "kind, changes",
    [
        ("UniPCMultistepScheduler", {"solver_order": 1, "flow_shift": 3.0}),
        ("UniPCMultistepScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}),
    ],
)
def test_latents_by_the_scheduler_of_the_folder(folders, tmp_path, kind, changes):
    """fp32: latents to 1e-4 relative after four steps of UniPC of order 1, without a shift, and of
    Euler.
    """
    import diffusers

    source, model = folders
    common = (
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        if kind.startswith("UniPC")
        else {}
    )
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps({"_class_name": kind} | common | changes)
    )
    ours = load_scheduler(tmp_path / "scheduler_config.json")
    noise = np.random.default_rng(0).standard_normal((1, 1, 4, 6, 16)).astype(np.float32)
    latents = sample(
        model,
        PROMPTS[:1],
        noise,
        solver=ours.solver,
        shift=ours.shift,
        order=ours.order,
        steps=4,
        guidance=1.0,
    )
    wanted, _ = peer_sample(
        source,
        PROMPTS[:1],
        noise,
        frames=1,
        height=32,
        width=48,
        steps=4,
        guidance=1.0,
        scheduler=getattr(diffusers, kind).from_pretrained(tmp_path),
        pixels=False,
    )
    assert relative_error(latents, wanted) < 1e-4


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    """(Diffusers folder, converted folder) of a random model with two experts."""
    root = tmp_path_factory.mktemp("two_experts")
    convert(
        str(tiny.write_pipeline(root / "source", seed=5, boundary=0.875)), root / "model", "float32"
    )
    return root / "source", root / "model"


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    "guidance, guidance_2, steps, shift",
    [
        (4.0, 3.0, 6, 3.0),
        (4.0, None, 6, 3.0),
        (4.0, 1.0, 6, 3.0),
        (1.0, 5.0, 6, 3.0),
        (4.0, 3.0, 6, 12.0),
        (1.0, None, 3, 1.0),
    ],
)
def test_two_experts_as_in_diffusers(two_experts, guidance, guidance_2, steps, shift):
    """The switch at the boundary and each expert's guidance, 1e-4 relative. The VAE is as with one
    expert.
    """
    source, model = two_experts
    noise = np.random.default_rng(0).standard_normal((2, 1, 4, 6, 16)).astype(np.float32)
    latents = sample(
        model, PROMPTS, noise, guidance=guidance, guidance_2=guidance_2, steps=steps, shift=shift
    )
    wanted, _ = peer_sample(
        source,
        PROMPTS,
        noise,
        frames=1,
        height=32,
        width=48,
        guidance=guidance,
        guidance_2=guidance_2,
        steps=steps,
        shift=shift,
        pixels=False,
    )
    assert relative_error(latents, wanted) < 1e-4


def write_checkpoint(run, model, names, rank=4, alpha=6.0) -> None:
    """A checkpoint as training writes it, with random adapters for the experts `names`."""
    settings, trained = LoRAConfig(rank, alpha), {}
    config = model_dir.open_model(model).config("transformer")
    module = WanTransformer3D(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    adapters = flat_params.flatten(
        nnx.split(lora.attach(module, settings, jax.random.key(0)), LoRAParam, ...)[1]
    )
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        trained[name] = {
            k: rng.standard_normal(v.shape, np.float32) * 0.3 for k, v in adapters.items()
        }
    checkpoints = Checkpoints(run)
    flat = join_experts(trained)
    checkpoints.save(
        7,
        {"trainable": flat},
        flat,
        {
            "config": {},
            "model": str(model),
            "experts": list(names),
            "lora": {"rank": rank, "alpha": alpha, "targets": list(settings.targets)},
        },
    )


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("names", [("transformer", "transformer_2"), ("transformer_2",)])
def test_trained_experts_exported_to_diffusers(two_experts, tmp_path, names):
    _, model = two_experts
    write_checkpoint(tmp_path / "run", model, names)
    export(model, tmp_path / "exported", checkpoint=str(tmp_path / "run"))
    noise = np.random.default_rng(0).standard_normal((1, 1, 4, 6, 16)).astype(np.float32)
    ours = sample(
        model, PROMPTS[:1], noise, guidance=4.0, guidance_2=3.0, checkpoint=str(tmp_path / "run")
    )
    wanted, _ = peer_sample(
        tmp_path / "exported",
        PROMPTS[:1],
        noise,
        frames=1,
        height=32,
        width=48,
        guidance=4.0,
        guidance_2=3.0,
        pixels=False,
    )
    assert relative_error(ours, wanted) < 1e-4
    assert (
        relative_error(ours, sample(model, PROMPTS[:1], noise, guidance=4.0, guidance_2=3.0)) > 1e-2
    )


@pytest.mark.slow
@pytest.mark.parity
def test_ti2v_as_in_diffusers(tmp_path):
    """The layout of TI2V-5B: 48 channels, the VAE of Wan 2.2. Diffusers feeds a timestep for every
    token, all equal in text to video; we feed one.
    """
    source = tiny.write_pipeline(tmp_path / "source", seed=7, ti2v=True)
    convert(str(source), tmp_path / "model", "float32")
    noise = np.random.default_rng(0).standard_normal((2, 2, 4, 6, 48)).astype(np.float32)
    latents = sample(tmp_path / "model", PROMPTS, noise, shift=5.0)
    wanted, pixels = peer_sample(source, PROMPTS, noise, frames=5, height=64, width=96, shift=5.0)
    assert relative_error(latents, wanted) < 1e-4
    videos = decode(tmp_path / "model", latents)
    assert videos.shape[1:] == (5, 64, 96, 3) and np.abs(videos / 255.0 - pixels).mean() < 1 / 255


@pytest.mark.slow
def test_offloaded_experts_sample_the_same(two_experts):
    noise = np.random.default_rng(0).standard_normal((1, 1, 4, 6, 16)).astype(np.float32)
    first, again = (
        sample(two_experts[1], PROMPTS[:1], noise, offload=offload)
        for offload in ("never", "always")
    )
    # float32: two compilations may order six steps' sums differently
    assert relative_error(first, again) < 1e-5


@pytest.mark.slow
@pytest.mark.parity
def test_guidance_and_prompt_matter_to_the_parity_test(folders):
    """The comparison above would notice a wrong prompt, guidance or shift."""
    _, model = folders
    noise = np.random.default_rng(0).standard_normal((2, 1, 4, 6, 16)).astype(np.float32)
    base = sample(model, PROMPTS, noise)
    for changed in (
        sample(model, PROMPTS[::-1], noise),
        sample(model, PROMPTS, noise, guidance=4.5),
        sample(model, PROMPTS, noise, shift=3.1),
        sample(model, PROMPTS, noise, solver="euler"),
    ):
        assert relative_error(changed, base) > 1e-3


@pytest.mark.slow
def test_export_of_a_conversion_samples_the_same(folders, tmp_path):
    _, model = folders
    export(model, tmp_path / "back")
    convert(str(tmp_path / "back"), tmp_path / "again")
    noise = np.random.default_rng(1).standard_normal((1, 1, 4, 4, 16)).astype(np.float32)
    first, again = (sample(folder, PROMPTS[:1], noise) for folder in (model, tmp_path / "again"))
    # the weights are equal (test_convert); two compilations encode
    assert relative_error(first, again) < 1e-5
