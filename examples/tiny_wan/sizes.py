"""Sizes of tiny-wan: the classes of Wan 2.1, small enough to train in minutes and run on a laptop."""

TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.37.0",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 192,
    "freq_dim": 256,
    "ffn_dim": 768,
    "num_layers": 8,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
}
VAE = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.37.0",
    "base_dim": 24,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,  # measured after training
}
TEXT_ENCODER = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "vocab_size": 128,
    "d_model": 192,
    "d_kv": 32,
    "num_heads": 6,
    "d_ff": 512,
    "num_layers": 3,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "is_encoder_decoder": False,
    "use_cache": False,
    "tie_word_embeddings": False,
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.37.0",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "disable_corrector": [],
    "timestep_spacing": "linspace",
    "thresholding": False,
}
MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.37.0",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
HEIGHT, WIDTH, CLIP_FRAMES = 64, 128, 9
TEXT_ROWS = 512  # Wan's text length: what the transformer attends to, padding included
FLOW_SHIFT = 3.0
MULTIPLE = 16  # pixels of a patch: the VAE's 8 times the transformer's 2


def parse(text: str) -> tuple[tuple[int, int], ...]:
    """Return frame sizes (height, width) in pixels of e.g. "64x128,96x192". Raises `ValueError` for
    anything else, for a size twice, and for sides that are not multiples of 16.
    """
    sizes = []
    for part in text.split(","):
        sides = part.strip().split("x")
        if len(sides) != 2 or not all(side.isdigit() for side in sides):
            raise ValueError(f"sizes={text}: {part!r} is not HEIGHTxWIDTH, such as 64x128")
        height, width = map(int, sides)
        if not height or not width or height % MULTIPLE or width % MULTIPLE:
            raise ValueError(f"sizes={text}: sides of {part} must be multiples of {MULTIPLE}")
        sizes.append((height, width))
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes={text}: a size is given twice")
    return tuple(sizes)
