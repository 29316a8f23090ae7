"""The policy of the PyTorch peer, Diffusers' Wan transformer with PEFT LoRA: its two steps, and the
moving average of its adapters.
"""

import contextlib
import dataclasses
import math

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from benchmarks import workload
from wan_jax.diffusion.schedule import Schedule
from wan_jax.models.config import TransformerConfig

DEFAULT, BEHAVIOUR = (
    "default",
    "old",
)  # adapters: the trained one, and that of DiffusionNFT's sampler
BETA = 0.1  # of DiffusionNFT


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of training; the defaults are those of Flow-GRPO's Wan script.

    Attributes:
        rank, alpha, targets: of LoRA.
        learning_rate, betas, eps, weight_decay: of AdamW.
        clip: (below, above), range of the importance ratio around 1.
        max_norm: of the gradient.
        noise: g of each step; None: sigma_1 sigma, Flow-GRPO's for Wan.
        checkpointing: whether the backward pass computes a block's activations again.
        joined: whether guidance takes one forward pass over prompt and negative prompt, not two.
    """

    rank: int = workload.RANK
    alpha: float = workload.ALPHA
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip: tuple[float, float] = (1e-3, 1e-3)
    max_norm: float = 1.0
    noise: tuple[float, ...] | None = None
    checkpointing: bool = True
    joined: bool = False


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
        options: Options = Options(),
    ):
        transformer.requires_grad_(False)
        lora = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType]  any number
            init_lora_weights="gaussian",
            target_modules=list(options.targets),
        )
        self.model = get_peft_model(transformer, lora, autocast_adapter_dtype=False)
        if options.checkpointing:
            transformer.enable_gradient_checkpointing()
        if mode == "bf16-compile":
            for block in transformer.blocks:
                block.compile(backend=compiler)
        self.mode, self.guidance, self.device = mode, guidance, transformer.device.type
        self.dtype = weight_dtype(mode)
        self.sigmas, self.timesteps = schedule.sigmas.tolist(), schedule.timesteps.tolist()
        self.noise = options.noise or tuple(self.sigmas[1] * s for s in self.sigmas[:-1])
        self.options = options
        self.lora = lora
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.trained,
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
        )

    def velocity(self, x, i: int, text: Text):
        """Return the velocity in fp32; with guidance v_u + guidance (v_c - v_u)."""

        def forward(x, embeddings):
            t = torch.full((len(x),), self.timesteps[i], device=x.device).long()
            return self.model(
                hidden_states=x.to(self.dtype),
                timestep=t,
                encoder_hidden_states=embeddings.to(self.dtype),
                return_dict=False,
            )[0].float()

        with torch.autocast(self.device, torch.bfloat16, enabled=self.mode == "autocast"):
            if self.guidance <= 1:
                return forward(x, text.embeddings)
            if self.options.joined:
                both = forward(torch.cat([x, x]), torch.cat([text.embeddings, text.negative]))
                conditional, unconditional = both.chunk(2)
            else:
                conditional = forward(x, text.embeddings)
                unconditional = forward(x, text.negative)
        return unconditional + self.guidance * (conditional - unconditional)

    def gaussian(self, x, v, i: int):
        """Return mean and deviation of step i if it is stochastic."""
        s, dt, g = self.sigmas[i], self.sigmas[i + 1] - self.sigmas[i], self.noise[i]
        return x + v * dt + g * g / (2 * s) * dt * (x + (1 - s) * v), g * math.sqrt(-dt)

    @torch.no_grad()
    def sample(self, x, i: int, text: Text) -> Transition:
        """Take the stochastic step i from the latents x."""
        mean, std = self.gaussian(x, self.velocity(x, i, text), i)
        x_next = mean + std * torch.randn_like(x)
        return Transition(i, x, x_next, log_prob(x_next, mean, std))

    @torch.no_grad()
    def ode(self, x, i: int, text: Text):
        """Return the latents after the deterministic step i, by Euler."""
        return x + self.velocity(x, i, text) * (self.sigmas[i + 1] - self.sigmas[i])

    def loss(self, transition: Transition, text: Text, advantages, kl: float):
        """Return the clipped objective plus the KL to the reference, and the ratios [B]."""
        x, step = transition.x, transition.step
        mean, std = self.gaussian(x, self.velocity(x, step, text), step)
        ratio = torch.exp(log_prob(transition.x_next, mean, std) - transition.log_prob)
        clipped = torch.clamp(ratio, 1 - self.options.clip[0], 1 + self.options.clip[1])
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
        if kl > 0:
            with torch.no_grad(), self.model.disable_adapter():
                reference, _ = self.gaussian(x, self.velocity(x, step, text), step)
            loss = loss + kl * ((mean - reference) ** 2).mean() / (2 * std**2)
        return loss, ratio.detach()

    def accumulate(self, batches: list[tuple[list[Transition], Text, torch.Tensor]], kl: float):
        """Add up the mean gradient over batches of (steps, text, advantages [B]), with a backward
        pass for each step. Returns all ratios.
        """
        self.model.train()
        ratios, count = [], sum(len(steps) for steps, _, _ in batches)
        for steps, text, advantages in batches:
            for transition in steps:
                loss, ratio = self.loss(transition, text, advantages, kl)
                (loss / count).backward()
                ratios.append(ratio)
        return torch.cat(ratios)

    def update(self, batches: list[tuple[list[Transition], Text, torch.Tensor]], kl: float):
        """Take one optimiser step over batches, as in `accumulate`. Returns all ratios."""
        ratios = self.accumulate(batches, kl)
        self.step()
        return ratios

    def step(self) -> None:
        """Clip the gradient, and take the optimiser's step."""
        torch.nn.utils.clip_grad_norm_(self.trained, self.options.max_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()

    # ---- DiffusionNFT ----------------------------------------------------------------------------
    def keep_behaviour(self) -> None:
        """Add a second adapter, the behaviour policy: a copy of the trained one."""
        self.model.add_adapter(BEHAVIOUR, self.lora, autocast_adapter_dtype=False)
        state = get_peft_model_state_dict(self.model, adapter_name=DEFAULT)
        set_peft_model_state_dict(self.model, state, adapter_name=BEHAVIOUR)
        self.model.set_adapter(DEFAULT)

    def nft_loss(self, x0, i: int, text: Text, weight, kl: float):
        """Return DiffusionNFT's loss at the noise level of step i, with the KL to the base model.

        x0: final latents. weight: [B], probability that a video is a good one. The behaviour policy
        and the base model are evaluated by switching adapters, as in the authors' code.
        """
        s = self.sigmas[i]
        x = (1 - s) * x0 + s * torch.randn_like(x0)
        with torch.no_grad():
            self.model.set_adapter(BEHAVIOUR)
            behaviour = self.velocity(x, i, text)
            self.model.set_adapter(DEFAULT)
            with self.model.disable_adapter():
                reference = self.velocity(x, i, text)
        return nft_loss(x, x0, s, self.velocity(x, i, text), behaviour, reference, weight, kl)

    def update_nft(self, rows: list[tuple[torch.Tensor, int, Text, torch.Tensor]], kl=1e-4):
        """Take an optimiser step over batches of (final latents, step, text, weights [B])."""
        self.model.train()
        for x0, i, text, weight in rows:
            (self.nft_loss(x0, i, text, weight, kl) / len(rows)).backward()
        self.step()


class Average:
    """The moving average of the trained arrays, with `grpo.train`'s warm-up of the decay."""

    def __init__(self, policy: Policy, decay: float):
        self.trained, self.decay, self.updates = policy.trained, decay, 0
        self.values = [p.detach().clone() for p in policy.trained]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the trained arrays after an optimiser step."""
        self.updates += 1
        decay = min((1 + self.updates) / (10 + self.updates), self.decay)
        for value, parameter in zip(self.values, self.trained):
            value.lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def in_use(self):
        """Use the average as the policy's arrays inside the block."""
        own = [p.data for p in self.trained]
        for parameter, value in zip(self.trained, self.values):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in zip(self.trained, own):
                parameter.data = value


def nft_loss(x, x0, s: float, v, behaviour, reference, weight, kl: float):
    """Return the mean loss of DiffusionNFT (arXiv 2509.16117) with beta 0.1 and its weights, times
    the advantages' bound of 5, plus kl mean((v - reference)^2). Velocities as x; weight: [B].
    """
    mixed = (1 - BETA) * behaviour + BETA * v, (1 + BETA) * behaviour - BETA * v

    def error(velocity):
        residual = (x - s * velocity - x0).flatten(1)
        scale = residual.detach().abs().mean(1).clamp(min=1e-5)
        return (residual * residual).mean(1) / scale

    better, worse = map(error, mixed)
    loss = 5 * (weight * better + (1 - weight) * worse) / BETA
    return (loss + kl * ((v - reference) ** 2).flatten(1).mean(1)).mean()


def log_prob(x_next, mean, std: float):
    """Return the log-density [B] of the Gaussian, averaged over all other dimensions."""
    z = ((x_next - mean) / std).flatten(1)
    return -0.5 * (z * z).mean(1) - math.log(std) - 0.5 * math.log(2 * math.pi)
