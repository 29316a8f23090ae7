"""Every setting of `grpo.train` with its default; a recipe changes the few that make it.

The method is DiffusionNFT, which learnt fastest of all on the small Wan (docs/results.md, "Methods
under one budget"). With train.method=grpo the defaults are Flow-GRPO's published settings for Wan
2.1 (`general_ocr_wan2_1`).
"""

import ml_collections
from absl import flags
from ml_collections import config_flags

ConfigDict = ml_collections.ConfigDict


class _OrNone:
    """Parse 'None' and nothing, on the command line, as None: `grpo.settings.limits` knows where
    that is a value.
    """

    def parse(self, argument):
        return None if argument in ("None", "") else super().parse(argument)


class _FloatOrNone(_OrNone, flags.FloatParser):
    pass


class _IntegerOrNone(_OrNone, flags.IntegerParser):
    pass


config_flags.register_flag_parser_for_type(float, _FloatOrNone())
config_flags.register_flag_parser_for_type(int, _IntegerOrNone())


def optional_float():
    """Return a setting that is None until a recipe or the command line gives a number."""
    return ml_collections.config_dict.placeholder(float)


def optional_int():
    """Return the same for a whole number."""
    return ml_collections.config_dict.placeholder(int)


def defaults() -> ConfigDict:
    c = ConfigDict()
    c.run_dir = ""  # where checkpoints, logs and the report go; a finished epoch there is resumed
    c.seed = 0  # every random draw is a function of (seed, epoch, sample, step)
    c.epochs = 200  # one epoch: sample groups, score, update

    # the run ends after the epoch that reaches one of them (grpo/settings/budget.py)
    c.budget = ConfigDict()
    c.budget.evaluations = optional_int()  # of the model while sampling
    c.budget.seconds = optional_float()  # of the epochs

    c.model = ConfigDict()
    c.model.path = ""  # a folder written by convert.from_diffusers
    c.model.dtype = "bfloat16"  # of the transformer's weights and matrix products
    # auto | xla | chunked | cudnn | pallas (wan_jax/models/attention/__init__.py)
    c.model.attention = "auto"
    c.model.offload = "auto"  # auto | never | always: the idle expert of two waits in host memory
    # none | save_matmuls | block | offload: how much of each block the backward pass computes again
    # (wan_jax/models/transformer.py): less time or less memory; auto: save_matmuls where that fits
    # (grpo/compiled/placement.py), else block
    c.model.remat = "auto"

    c.lora = ConfigDict()
    c.lora.rank = 32  # 0 trains all weights
    c.lora.alpha = 64.0
    c.lora.targets = ("to_q", "to_k", "to_v", "to_out.0")
    c.lora.init = ""  # LoRA file or folder of any kind to start from; KL is to the base model

    c.mesh = ConfigDict()
    # devices = data x fsdp x context, batches split over data x fsdp; 0: chosen
    # (`wan_jax.distributed.mesh.choose`) and printed
    c.mesh.fsdp = 0  # devices that the weights, gradients, moments and averages are split over
    # devices that a video's tokens are split over; for long videos, small batches
    c.mesh.context = 0

    c.prompts = ConfigDict()
    c.prompts.train = ""  # text, one prompt a line, what to write in quotes; or .jsonl
    c.prompts.heldout = ""  # the same for evaluation
    c.prompts.negative = ""  # negative prompt of the guidance

    c.sample = ConfigDict()
    c.sample.frames = 1
    # ((epoch, frames), ...): so many from that epoch on, e.g. ((50, 9), (100, 33))
    c.sample.frame_schedule = ()
    c.sample.height = 512
    c.sample.width = 512
    c.sample.steps = 20  # denoising steps
    c.sample.shift = 3.0  # of the sigma schedule
    c.sample.guidance = 4.5  # classifier-free guidance; up to 1 means none
    # of the second expert (Wan 2.2 A14B); None: as the first
    c.sample.guidance_2 = optional_float()
    c.sample.groups = 48  # prompts an epoch
    c.sample.group_size = 12  # videos a prompt
    c.sample.batch_size = 9  # videos of one rollout batch, and of one micro-batch of the update
    # a group's videos start from one noise, and the steps before the first stochastic one, the same
    # for all of them, are computed once for the group
    c.sample.shared_noise = False
    # flow_grpo_wan | flow_sde | dance | cps: the noise of the stochastic steps
    c.sample.sde = "flow_grpo_wan"
    c.sample.ode_solver = "euler"  # euler | dpmpp_2m (MixGRPO-Flash): of the other steps
    c.sample.noise_level = optional_float()  # None: the form's own default
    c.sample.max_step_std = optional_float()
    c.sample.sde_steps = 19  # how many steps of an epoch are stochastic and trained
    c.sample.sde_range = (0, 19)  # drawn from [low, high)
    # any subset | random (a window of neighbours: Flow-GRPO-Fast) | progressive | decay | exp_decay
    # (MixGRPO's sliding window) | one_per_group: sde_steps=1, another step for every group
    # (Flash-GRPO)
    c.sample.sde_window = "any"
    c.sample.sde_window_epochs = 25  # epochs a sliding window stays at its first place

    c.train = ConfigDict()
    # nft | dpo | rwr | sft train on the finished videos, noised again
    # (grpo/methods/flow_matching.py), and leave GRPO's settings aside; grpo: Flow-GRPO
    c.train.method = "nft"
    # of the others: noise levels a video and epoch, shared out between the experts
    c.train.timesteps = 4
    # of nft: how far its positive and negative policies lie from the old one
    c.train.nft_beta = 0.1
    # of nft: after n updates the old policy, which samples, keeps min(old_rate n,
    c.train.old_rate = 1e-3
    c.train.old_most = 0.5  # old_most) of itself, once an epoch
    c.train.dpo_beta = 100.0  # of dpo
    # of dpo: updates after which the policy becomes the reference (online DPO); 0: the reference is
    # the base model
    c.train.reference_every = 0
    c.train.temperature = 1.0  # of rwr: videos weigh exp(reward / temperature), within their group
    # of the others: train the velocity with sample.guidance, which sampled, for twice the passes;
    # False: the conditional one alone, as published
    c.train.guided = False
    # which are trained; models with one have only the first
    c.train.experts = ("transformer", "transformer_2")
    c.train.groups = 0  # of the sampled groups, those with the largest spread of rewards; 0: all
    c.train.best_of = 0  # of each group, so many best videos and as many worst; 0: all
    c.train.updates_per_epoch = 2  # the epoch's batches are split over so many optimiser steps
    c.train.learning_rate = 1e-4
    c.train.warmup_updates = 0
    c.train.adam_b1 = 0.9
    c.train.adam_b2 = 0.999
    c.train.adam_eps = 1e-8
    c.train.weight_decay = 1e-4
    c.train.max_grad_norm = 1.0
    c.train.ema_decay = 0.9
    c.train.offload_optimiser = False  # moments and average wait in host memory between updates
    c.train.objective = "clip"  # clip | unscaled | guard | dppo (grpo/methods/losses.py)
    c.train.divergence = 1e-5  # of dppo: where a row is left out
    # none | longcat | rectified | otca: how much each step counts (grpo/rollout.py)
    c.train.credit = "none"
    c.train.clip_low = 1e-3  # clip range of the ratio
    c.train.clip_high = 1e-3
    # KL to the reference; nft, rwr, sft: of mean((v - v_ref)^2); dpo has none; None: 0.004 of grpo,
    # 1e-4 of nft, 0 of the others
    c.train.kl_weight = optional_float()
    # loss | reward: kl_weight x KL at sampling is taken off the reward of each step
    c.train.kl_as = "loss"
    # base | average: the model before training, or an average of what was trained, that keeps
    # kl_reference_decay of itself in every update; of grpo
    c.train.kl_reference = "base"
    c.train.kl_reference_decay = 0.99
    # the KL that the weight is adapted to, from kl_weight on; None: it stays
    c.train.kl_target = optional_float()
    c.train.kl_horizon = 20.0  # updates in which twice the target multiplies the weight by e
    c.train.kl_weight_range = (1e-4, 1.0)  # bounds of the adapted weight
    c.train.kl_kind = "flow_grpo"  # flow_grpo | sigma | x | velocity
    # of a loss that pulls the velocity without guidance (sample.guidance=1) to the reference's with
    # guidance
    c.train.cfg_distill_weight = 0.0
    c.train.cfg_distill_guidance = 4.5  # the reference's
    c.train.cfg_distill_guidance_2 = optional_float()  # of the second expert; None: as the first
    c.train.advantage_std = "group"  # group | global | max | none (grpo/advantages.py)
    c.train.advantage_clip = 5.0  # also what nft divides advantages by
    # |ratio - 1| allowed on policy, more stops the run; None: 1e-4 in float32, 2e-3 in bfloat16
    c.train.ratio_tolerance = optional_float()

    c.reward = ConfigDict()
    c.reward.rule = "spelling"  # spelling | flow_grpo_image | flow_grpo_video
    # rapidocr | paddleocr | judge: the vision model at reward.servers reads
    c.reward.engine = "rapidocr"
    c.reward.max_frames = 9  # frames scored of a video
    c.reward.weights = ConfigDict()  # of the rewards; 0: measured and logged, None: not measured
    c.reward.weights.ocr = 1.0  # the spelling
    for name in (
        "stability",  # of the text in time (rewards/composite.py)
        "clip",
        "pickscore",  # the prompt as a whole (rewards/clip.py)
        "sharpness",
        "exposure",
        "contrast",
        "compressibility",
        "flicker",
        "motion",
    ):
        # rewards/quality.py, grpo/scoring/reward_combination.py
        c.reward.weights[name] = optional_float()
    c.reward.clip_model = ""  # folder of a CLIP model as transformers writes it
    c.reward.pickscore_model = ""  # the same, of PickScore
    # rewards | advantages: which are added up (grpo/scoring/reward_combination.py)
    c.reward.combine = "rewards"
    # scoring processes; 0 scores in the training process; with servers: how many videos are sent at
    # the same time, at least the workers of all servers
    c.reward.workers = 2
    c.reward.servers = ()  # URLs of reward servers (docs/rewards_server.md); none: scored here
    # environment variable with the servers' token; the token is stored nowhere
    c.reward.token_env = "REWARD_TOKEN"
    c.reward.timeout = 120.0  # seconds until a server that does not answer counts as down
    c.reward.retries = 3  # further servers asked for the score of one video
    # seconds to wait when no server works; then videos are masked and counted
    c.reward.patience = 120.0
    # of engine judge: its name at the servers; "": the only one they have
    c.reward.judge_model = ""
    # transcribe (scored by the rule) | yes_no | rate (rewards/judge.py)
    c.reward.judge_question = "transcribe"

    c.eval = ConfigDict()
    # epochs between held-out evaluations; there is one before and one after anyway
    c.eval.every = 20
    c.eval.num_prompts = 256
    c.eval.frames = 0  # 0: as in training
    c.eval.more_frames = ()  # evaluations with so many frames as well, logged apart, e.g. (33,)
    c.eval.steps = 20
    c.eval.guidance = 4.5
    c.eval.guidance_2 = optional_float()
    c.eval.also_unguided = False  # each evaluation a second time without guidance, under `unguided`
    c.eval.solver = "unipc"  # unipc | euler | flow_match_euler | dpmpp_2m
    c.eval.seed = 1234
    c.eval.previews = 12  # samples kept as pictures for the report

    c.log = ConfigDict()  # beside the run's own files and TensorBoard (grpo/records/trackers.py)
    c.log.wandb = ConfigDict()
    # Weights & Biases: "" is not used; WANDB_MODE=offline keeps the run here
    c.log.wandb.project = ""
    c.log.wandb.entity = ""  # user or team; "": the default one
    c.log.mlflow = ConfigDict()
    c.log.mlflow.uri = ""  # MLflow: "" is not used; http://host:5000, or sqlite:///FILE
    c.log.mlflow.experiment = "wan-jax-grpo"

    c.save = ConfigDict()
    c.save.every = 10  # epochs between checkpoints; the last epoch is saved anyway
    c.save.keep = 3
    return c
