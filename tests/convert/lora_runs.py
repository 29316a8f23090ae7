"""Run folders whose checkpoints hold random adapters."""

import numpy as np

from wan_jax.models import lora
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage.checkpoint import Checkpoints, join_experts

ATTENTION = lora.ATTENTION_TARGETS
FFN = (*ATTENTION, "ffn.net.0.proj", "ffn.net.2")


def random_adapters(kernels, config: LoRAConfig, seed=0):
    """Adapters as a run trains them, with both factors far from zero."""
    rng = np.random.default_rng(seed)
    flat = {}
    for layer in sorted(lora.adapted_layers(kernels, config.targets)):
        *stack, n_in, n_out = kernels[layer]
        flat[f"{layer}/lora_a"] = 0.3 * rng.standard_normal((*stack, n_in, config.rank)).astype(
            np.float32
        )
        flat[f"{layer}/lora_b"] = 0.3 * rng.standard_normal((*stack, config.rank, n_out)).astype(
            np.float32
        )
    return flat


def write_run(folder, trained, config: LoRAConfig | None):
    """A run folder whose checkpoint holds these trained weights: {expert: flat}, or one
    transformer's alone.
    """
    experts = trained if "transformer" in trained else {"transformer": trained}
    flat = join_experts(experts)
    settings = config and {
        "rank": config.rank,
        "alpha": config.alpha,
        "targets": list(config.targets),
    }
    checkpoints = Checkpoints(folder)
    checkpoints.save(
        1,
        {"trainable": flat},
        flat,
        {"config": {}, "lora": settings, "model": "", "experts": list(experts)},
    )
    return folder
