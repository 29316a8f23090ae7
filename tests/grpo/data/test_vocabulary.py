"""Words and phrases of generated prompts."""

import re

from grpo.data import vocabulary


def test_word_lists():
    assert len(set(vocabulary.WORDS)) == len(vocabulary.WORDS) > 700
    assert all(re.fullmatch("[a-z]{2,12}", word) for word in vocabulary.WORDS)
    assert all(surface.count("{text}") == 1 for surface in vocabulary.SURFACES.values())
    for names in (vocabulary.SURFACES, vocabulary.SCENES, vocabulary.CAMERAS):
        assert len(set(names.values())) == len(names) and all(
            text.isascii() and '"' not in text for text in names.values()
        )
