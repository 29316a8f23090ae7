"""Names that options of the models and samplers may have. Imports nothing, so that reading a recipe
does not load JAX.
"""

DTYPES = ("float32", "bfloat16")
MATMUL_PRECISIONS = ("default", "tf32", "float32")  # of products of float32 values
BACKENDS = ("auto", "xla", "chunked", "cudnn", "pallas")  # of attention
WEIGHTS = ("dtype", "fp8", "int8", "nf4")  # how frozen weights are stored
# what to choose instead where they take too much memory
SMALLER_WEIGHTS = {"dtype": ("fp8", "nf4"), "fp8": ("nf4",), "int8": ("nf4",), "nf4": ()}
REMAT_POLICIES = ("none", "block", "save_matmuls", "offload")
OFFLOAD = ("auto", "never", "always")  # of the idle expert
SOLVERS = ("unipc", "euler", "flow_match_euler", "dpmpp_2m")
SCHEDULES = ("diffusers", "legacy")  # of flow sigmas
SDE_KINDS = ("flow_grpo_wan", "flow_sde", "dance", "cps")
EXPERTS = ("transformer", "transformer_2")
TEXT_ENCODER = ("auto", "device", "cpu")  # where it runs when sampling
WAN = "wan"  # as a negative prompt: that of Wan's own code
