"""Writes the tokenizer of the tiny Wan: one token per character, in the files of Wan's `tokenizer/`.

    python -m examples.tiny_wan.tokenizer --out DIR

Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, which
`transformers.T5TokenizerFast` (4.51 to 5.x), `WanPipeline.from_pretrained` and
`wan_jax.models.tokenizer.Tokenizer` read like the real one. Wan's spiece.model, the same vocabulary
for slow tokenizers, is left out: none of the three reads it where tokenizer.json exists.

Tokens are characters because the tiny model learns to spell words that it never saw in training.
As in UMT5, the ids 0, 1, 2 are pad, end and unknown, and a space is the token ▁, which also starts
every non-empty prompt.
"""

import argparse
import json
import pathlib
import string

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

PAD, EOS, UNK, SPACE = "<pad>", "</s>", "<unk>", "▁"
CURLY = "‘’“”"  # ftfy makes them straight; kept for text that was not cleaned
CHARACTERS = (
    string.ascii_lowercase + string.ascii_uppercase + string.digits + string.punctuation + CURLY
)
VOCABULARY = (PAD, EOS, UNK, SPACE, *CHARACTERS)  # a token's id is its index
MAX_LENGTH = 512


def build() -> Tokenizer:
    """Return a unigram tokenizer whose pieces are single characters: one segmentation of any text.

    It splits at whitespace, puts ▁ before every word and the end token last, as transformers 5
    rebuilds it in `T5TokenizerFast` whatever tokenizer.json says. Unknown characters in a row are
    one <unk>.
    """
    scores = [(token, 0.0 if token in (PAD, EOS, UNK) else -1.0) for token in VOCABULARY]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=VOCABULARY.index(UNK), byte_fallback=False))
    metaspace = {"replacement": SPACE, "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", EOS],
        pair=["$A", EOS, "$B", EOS],
        special_tokens=[(EOS, VOCABULARY.index(EOS))],
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (PAD, EOS, UNK)]
    )
    return tokenizer


def write(folder) -> None:
    """Write the three files of the tokenizer into `folder`, which is made if needed."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    special = {"eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    added = {
        str(VOCABULARY.index(token)): {
            "content": token,
            "special": True,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for token in (PAD, EOS, UNK)
    }
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": False,
        # T5TokenizerFast would add 100 sentinel tokens, past the end of the embedding
        "extra_ids": 0,
        "model_max_length": MAX_LENGTH,
        "tokenizer_class": "T5Tokenizer",
        **special,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, help="folder to write")
    arguments = parser.parse_args()
    write(arguments.out)
    print(f"{arguments.out}: {len(VOCABULARY)} tokens, at most {MAX_LENGTH} per prompt")


if __name__ == "__main__":
    main()
