"""The policy of the PyTorch peer: Diffusers' Wan transformer with PEFT LoRA, and its two steps."""

import contextlib
import dataclasses
import math

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import LoraConfig, get_peft_model

from benchmarks import workload
from wan_jax.diffusion.schedule import Schedule
from wan_jax.models.config import TransformerConfig

CLIP = 1e-3  # range of the importance ratio around 1
MAX_NORM = 1.0  # of the gradient


@dataclasses.dataclass(frozen=True)
class Transition:
    """One stochastic step of a batch: latents [B, C, F, H, W] and log-probs [B] in fp32."""

    step: int
    x: torch.Tensor
    x_next: torch.Tensor
    log_prob: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Text:
    """Embeddings [B, 512, text_dim] of prompts and negative prompt; rows after the prompt are 0."""

    embeddings: torch.Tensor
    negative: torch.Tensor


@contextlib.contextmanager
def drawn_as(dtype: torch.dtype, device: str):
    """Create parameters inside the block on the device in this data type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def weight_dtype(mode: str) -> torch.dtype:
    """Return the data type of the weights in a mode."""
    return torch.bfloat16 if mode.startswith("bf16") else torch.float32


def make_transformer(
    config: TransformerConfig, dtype: torch.dtype, device: str
) -> WanTransformer3DModel:
    """Return a model with random weights of the types of `from_pretrained(torch_dtype=dtype)`."""
    with drawn_as(dtype, device):
        model = WanTransformer3DModel(**dataclasses.asdict(config))
    for name, parameter in model.named_parameters():
        if set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    return model


class Policy:
    """The transformer with adapters in one of the modes, and the steps of its schedule."""

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        mode: str,
        schedule: Schedule,
        guidance: float,
        compiler: str = "inductor",
    ):
        transformer.requires_grad_(False)
        self.model = get_peft_model(
            transformer,
            LoraConfig(
                r=workload.RANK,
                lora_alpha=workload.ALPHA,
                init_lora_weights="gaussian",
                target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            ),
            autocast_adapter_dtype=False,
        )
        transformer.enable_gradient_checkpointing()
        if mode == "bf16-compile":
            for block in transformer.blocks:
                block.compile(backend=compiler)
        self.mode, self.guidance, self.device = mode, guidance, transformer.device.type
        self.dtype = weight_dtype(mode)
        self.sigmas, self.timesteps = schedule.sigmas.tolist(), schedule.timesteps.tolist()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=1e-4)

    def velocity(self, x, i: int, text: Text):
        """Return the velocity in fp32; with guidance v_u + guidance (v_c - v_u), in two passes."""

        def forward(embeddings):
            t = torch.full((len(x),), self.timesteps[i], device=x.device).long()
            return self.model(
                hidden_states=x.to(self.dtype),
                timestep=t,
                encoder_hidden_states=embeddings.to(self.dtype),
                return_dict=False,
            )[0].float()

        with torch.autocast(self.device, torch.bfloat16, enabled=self.mode == "autocast"):
            conditional = forward(text.embeddings)
            if self.guidance <= 1:
                return conditional
            unconditional = forward(text.negative)
        return unconditional + self.guidance * (conditional - unconditional)

    def gaussian(self, x, v, i: int):
        """Return mean and deviation of step i with Flow-GRPO's noise for Wan, g = sigma_1 sigma."""
        s, dt = self.sigmas[i], self.sigmas[i + 1] - self.sigmas[i]
        g = self.sigmas[1] * s
        return x + v * dt + g * g / (2 * s) * dt * (x + (1 - s) * v), g * math.sqrt(-dt)

    @torch.no_grad()
    def sample(self, x, i: int, text: Text) -> Transition:
        """Take the stochastic step i from the latents x."""
        mean, std = self.gaussian(x, self.velocity(x, i, text), i)
        x_next = mean + std * torch.randn_like(x)
        return Transition(i, x, x_next, log_prob(x_next, mean, std))

    def loss(self, transition: Transition, text: Text, advantages, kl: float):
        """Return the clipped objective plus the KL to the reference, and the ratios [B]."""
        x, step = transition.x, transition.step
        mean, std = self.gaussian(x, self.velocity(x, step, text), step)
        ratio = torch.exp(log_prob(transition.x_next, mean, std) - transition.log_prob)
        clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
        if kl > 0:
            with torch.no_grad(), self.model.disable_adapter():
                reference, _ = self.gaussian(x, self.velocity(x, step, text), step)
            loss = loss + kl * ((mean - reference) ** 2).mean() / (2 * std**2)
        return loss, ratio.detach()

    def update(self, batches: list[tuple[list[Transition], Text, torch.Tensor]], kl: float):
        """Take one optimiser step over batches of (steps, text, advantages [B]).

        Returns all ratios.
        """
        self.model.train()
        ratios, count = [], sum(len(steps) for steps, _, _ in batches)
        for steps, text, advantages in batches:
            for transition in steps:
                loss, ratio = self.loss(transition, text, advantages, kl)
                (loss / count).backward()
                ratios.append(ratio)
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return torch.cat(ratios)


def log_prob(x_next, mean, std: float):
    """Return the log-density [B] of the Gaussian, averaged over all other dimensions."""
    z = ((x_next - mean) / std).flatten(1)
    return -0.5 * (z * z).mean(1) - math.log(std) - 0.5 * math.log(2 * math.pi)
