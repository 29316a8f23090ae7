"""Makes text_encoder.npz: hidden states of transformers' `UMT5EncoderModel` for a small random
encoder.

    python tests/golden/make_text_encoder.py        # needs torch and transformers

Stored: the config, the seed, ids, mask and hidden states (fp32, CPU). The weights are not:
`random_weights` makes them again from the seed, with numpy alone.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

PATH = pathlib.Path(__file__).parent / "text_encoder.npz"
SEED = 20
# inner width (4 * 12) differs from d_model, and 160 tokens reach every bucket: both on purpose
CONFIG = dict(
    vocab_size=96,
    d_model=32,
    d_kv=12,
    d_ff=80,
    num_layers=3,
    num_heads=4,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    layer_norm_epsilon=1e-6,
    feed_forward_proj="gated-gelu",
)
LENGTHS = (160, 41, 1)


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """State-dict key to fp32 tensor, drawn in key order; norm scales far from 1, position tables
    from 0.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for key in sorted(shapes):
        value = rng.standard_normal(shapes[key])
        if key.endswith("norm.weight"):
            value = 1 + 0.3 * value
        elif "SelfAttention.q." in key or "SelfAttention.k." in key:
            # scores of a few units: a softmax with peaks
            value = value * 0.7 * shapes[key][1] ** -0.5
        elif len(shapes[key]) == 2 and not key.startswith("shared") and "relative" not in key:
            value = value * shapes[key][1] ** -0.5
        weights[key] = value.astype(np.float32)
    return weights


def random_ids(vocab_size: int, lengths, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) int32 [B, S]: random tokens of the given lengths, the last one 1 (end), padded
    with 0.
    """
    rng = np.random.default_rng(seed)
    mask = (np.arange(max(lengths))[None, :] < np.asarray(lengths)[:, None]).astype(np.int32)
    ids = rng.integers(3, vocab_size, mask.shape).astype(np.int32)
    ids[np.arange(len(lengths)), np.asarray(lengths) - 1] = 1
    return ids * mask, mask


def main():
    import torch
    import transformers

    model = transformers.UMT5EncoderModel(
        transformers.UMT5Config(**CONFIG, dropout_rate=0.0)
    ).eval()
    shapes = {
        k: tuple(v.shape)
        for k, v in model.state_dict().items()
        if k != "encoder.embed_tokens.weight"
    }
    weights = {k: torch.from_numpy(v) for k, v in random_weights(shapes, SEED).items()}
    model.load_state_dict({**weights, "encoder.embed_tokens.weight": weights["shared.weight"]})
    ids, mask = random_ids(CONFIG["vocab_size"], LENGTHS, SEED)
    with torch.no_grad():
        hidden = model(
            torch.from_numpy(ids).long(), torch.from_numpy(mask)
        ).last_hidden_state.numpy()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    np.savez_compressed(
        PATH,
        config=json.dumps(CONFIG),
        versions=json.dumps(versions),
        seed=SEED,
        ids=ids,
        mask=mask,
        hidden=hidden * mask[..., None],
    )
    print(f"{PATH}: {PATH.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
