"""What is trained and on what it runs: `model`, `lora`, `mesh`."""

import dataclasses

from grpo.settings.setting import PER_PROCESS, Section, setting
from wan_jax.choices import BACKENDS, DTYPES, MATMUL_PRECISIONS, OFFLOAD, REMAT_POLICIES, WEIGHTS
from wan_jax.command_line.limits import Range


@dataclasses.dataclass(frozen=True)
class Model(Section):
    """The model that training starts from, and how it is computed."""

    path: str = setting(
        "",
        "Folder of the model, written by `python -m convert.from_diffusers`.",
        path=True,
        required=True,
        **PER_PROCESS,
    )
    loras: tuple[str, ...] = setting(
        (),
        "LoRA files that are merged into the model when it is loaded, before training: FILE or "
        "FILE:SCALE each, of any form that `lora.init` reads, and also with changes of norms and "
        "biases. For two experts a file for both, or HIGH,LOW or HIGH,LOW:SCALE; an empty one "
        "leaves its expert as it is; on the command line such a pair is in quotes, "
        "`'--config.model.loras=\"HIGH,LOW\"'`. The merged model is the base of everything: sampling, the KL, "
        "evaluations. Checkpoints name the files with their digests.",
    )
    dtype: str = setting(
        "bfloat16",
        "Type of the transformer's weights and matrix products. Trained weights, norms, the "
        "schedule and log-probs are always in float32.",
        choices=DTYPES,
    )
    weights: str = setting(
        "dtype",
        "How the frozen weights of the transformer's blocks are stored when adapters are trained. "
        "`dtype`: in `model.dtype`. `fp8` and `int8` take half of the memory of bfloat16, `nf4` a "
        "quarter. `fp8` is also multiplied in 8 bits where the device can (NVIDIA since Ada and "
        "Hopper, AMD since MI300), which is faster; the others, and `fp8` elsewhere, are "
        "dequantised before each product. The quantised model is the base of everything: "
        "sampling, ratios, the KL, evaluations. `grpo.evaluate` with "
        "`--config.model.weights=dtype` judges the adapters on the unquantised model.",
        choices=WEIGHTS,
    )
    matmul_precision: str = setting(
        "default",
        "How products and convolutions of float32 values are computed, including those of the VAE "
        "and of a transformer in `model.dtype=float32`. `default` is the backend's: TF32 on NVIDIA, "
        "float32 on the CPU. `float32` is exact on all, and slower. Products in bfloat16 stay as "
        "they are.",
        choices=MATMUL_PRECISIONS,
    )
    attention: str = setting(
        "auto",
        "Implementation of attention. `auto` is `cudnn` where that runs (NVIDIA, 16-bit types) and "
        "`chunked` elsewhere. `xla` needs memory quadratic in the number of tokens, the others "
        "linear. `pallas` needs a GPU, and has not run on one yet.",
        choices=BACKENDS,
    )
    single_expert: bool = setting(
        False,
        "For models with two experts: whether the first one computes all steps, and the second is "
        "neither loaded nor trained, as in Diffusers up to 0.34, with which Flow-GRPO trained "
        "Wan 2.2 A14B.",
    )
    offload: str = setting(
        "auto",
        "Whether the expert that is not in use is offloaded to host memory, for models with two "
        "experts. `auto` offloads when both would take more than half of a device's memory.",
        choices=OFFLOAD,
        resume=True,
    )
    remat: str = setting(
        "auto",
        "Which activations of a transformer block the backward pass rematerialises (recomputes). "
        "`none` keeps all of them, `save_matmuls` only the results of dense layers and attention, `block` only "
        "the block's input; `offload` keeps that input in host memory. Memory falls in this order, "
        "and time rises from `save_matmuls` on. `auto` is `save_matmuls` where it fits the device's "
        "memory, and `block` elsewhere.",
        choices=("auto", *REMAT_POLICIES),
    )


@dataclasses.dataclass(frozen=True)
class LoRA(Section):
    """Low-rank adapters, which are trained instead of the weights."""

    rank: int = setting(
        32, "Rank of the adapters. 0 trains all weights, without adapters.", bounds=Range(0)
    )
    alpha: float = setting(
        64.0,
        "Scale of the adapters: their output is multiplied by alpha / rank.",
        bounds=Range(0, above=True, note="adapters are scaled by alpha / rank"),
    )
    targets: tuple[str, ...] = setting(
        ("to_q", "to_k", "to_v", "to_out.0"),
        "Names of the dense layers that have adapters, as Diffusers names them.",
    )
    init: str = setting(
        "",
        "LoRA file or folder (Diffusers, PEFT, ComfyUI or kohya) whose adapters training starts "
        "from. The KL is still to the base model. Empty: training starts from fresh adapters.",
        path=True,
    )


@dataclasses.dataclass(frozen=True)
class Mesh(Section):
    """How the devices share the work: data x fsdp x context. Batches are split over data x fsdp."""

    fsdp: int = setting(
        0,
        "Number of devices that weights, gradients, moments and averages are split over. 0: chosen "
        "by the memory they need, and printed.",
        bounds=Range(0),
    )
    context: int = setting(
        0,
        "Number of devices that the tokens of each video are split over, for long videos or small "
        "batches. 0: chosen, 1 unless a batch has fewer videos than there are devices.",
        bounds=Range(0),
    )
