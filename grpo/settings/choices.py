"""Values that settings of training may have. Reading a recipe imports this module, so it does not
import JAX.
"""

from grpo import methods
from rewards.choices import QUESTIONS

METHODS = methods.names()
ONE_PER_GROUP = "one_per_group"
WINDOWS = ("any", "random", "progressive", "decay", "exp_decay", "spaced", ONE_PER_GROUP)
SLIDING = ("progressive", "decay", "exp_decay")  # windows that move through the steps
ODE_SOLVERS = ("euler", "dpmpp_2m")
OBJECTIVES = ("clip", "unscaled", "guard", "dppo")
KL_KINDS = ("flow_grpo", "sigma", "x", "velocity")
KL_PLACES = ("loss", "reward")
KL_REFERENCES = ("base", "average")
CREDITS = ("none", "longcat", "rectified", "noise_over_step", "otca")
ZERO_ADVANTAGES = ("keep", "drop")
STDS = ("group", "global", "max", "none")
DATA_NOISE = ("own", "rollout")  # of the loss on data
COMBINATIONS = ("rewards", "advantages")
ALARMS = ("log", "stop", "kl")  # what the guard does on an alarm
JUDGE = "judge"  # the reward engine that asks a vision model on reward servers
JUDGE_QUESTIONS = ("transcribe", *QUESTIONS)
