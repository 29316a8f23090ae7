"""The tiny Wan's tokenizer: one token per character (files: tests/wan_jax/models/test_tokenizer.py)."""

from examples.tiny_wan.tokenizer import EOS, PAD, SPACE, UNK, VOCABULARY, build


def ids(*tokens):
    return [VOCABULARY.index(token) for token in tokens]


def test_vocabulary():
    assert VOCABULARY[:4] == (PAD, EOS, UNK, SPACE) and len(set(VOCABULARY)) == len(VOCABULARY)
    assert len(VOCABULARY) <= 128, "the text encoder's embedding"


def test_characters_are_tokens():
    tokenizer = build()
    expected = ids(SPACE, "A", SPACE, '"', "z", "9", '"', EOS)
    assert tokenizer.encode('A "z9"').ids == expected
    assert tokenizer.decode(expected) == 'A "z9"'
    assert tokenizer.encode("").ids == ids(EOS)
    assert tokenizer.encode("é").ids == ids(SPACE, UNK, EOS)
