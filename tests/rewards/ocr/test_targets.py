"""Target texts in prompts: quotes of all kinds, apostrophes, and prompts without a target."""

import random

import pytest
from ftfy.fixes import uncurl_quotes

from rewards.ocr.targets import TargetError, _clean, parse_targets
from rewards.ocr.text_match import visible
from wan_jax.models.tokenizer import clean

GOOD = [
    ('a neon sign that says "OPEN"', ("OPEN",)),
    ('"OPEN"', ("OPEN",)),
    ("a poster with “GRAND OPENING” on it", ("GRAND OPENING",)),
    ("a poster with ‘SALE’ on it", ("SALE",)),
    ("a poster with 'SALE' on it", ("SALE",)),
    ("a poster ('SALE'), red", ("SALE",)),
    ('a sign "OPEN" above a sign "24H" and “PIZZA”', ("OPEN", "24H", "PIZZA")),
    ("a sign 'OPEN' above a sign 'CLOSED'.", ("OPEN", "CLOSED")),
    ("a sign ‘OPEN’ above a sign 'CLOSED'", ("OPEN", "CLOSED")),
    # apostrophes
    ("it's Joe's diner with \"EAT HERE\" in the window", ("EAT HERE",)),
    ("Joe's diner, and it's 'OPEN'", ("OPEN",)),
    ("Joe’s diner, and it’s ‘OPEN’", ("OPEN",)),
    ("a sign 'DON'T WALK' on a post", ("DON'T WALK",)),
    ("a sign ‘DON’T WALK’ on a post", ("DON'T WALK",)),
    ('a sign "DON\'T WALK" on a post', ("DON'T WALK",)),
    ("the dogs' bowl says 'WOOF'", ("WOOF",)),
    ("a rock 'n' roll band under 'LIVE'", ("LIVE",)),
    ("a rock ‘n’ roll band under ‘LIVE’", ("LIVE",)),
    ("a diner from the '50s with 'EAT'", ("EAT",)),
    ("go get 'em, says 'COACH'", ("COACH",)),
    ("a 'vintage' rock 'n' roll poster, the dogs' \"BARK\"", ("BARK",)),
    # nested
    ("a note \"say 'cheese' now\"", ("say 'cheese' now",)),
    ("a note “say ‘cheese’ now”", ("say 'cheese' now",)),
    ("a note “say “cheese” now”", ('say "cheese" now',)),
    ('a note “say "cheese" now”', ('say "cheese" now',)),
    # punctuation and spaces
    ('a sign " Hello,  World! "', ("Hello, World!",)),
    ('a sign "50% OFF – Café №1"', ("50% OFF – Café №1",)),
    ('a sign "HELLO," in red', ("HELLO,",)),
    ('two signs "GO""STOP"', ("GO", "STOP")),
    ('line one "TOP\nBOTTOM"', ("TOP BOTTOM",)),
]

CLEANED = [
    ('a sign that says "R&amp;D"', ("R&D",)),
    ('a note that says "don&#39;t"', ("don't",)),
    ('a sign that says "CafÃ©"', ("Café",)),
    ('a door with &quot;OPEN&quot; and "TWO"', ("OPEN", "TWO")),
    ("a door with ＂ＯＰＥＮ＂", ("OPEN",)),
    ('a sign "OP\u200bEN"', ("OPEN",)),
    ('a sign "SO\u00adFT \u2764\ufe0f"', ("SOFT \u2764",)),
]

BAD = [
    (r"a sign that says \"OPEN\"", "backslash"),
    (r"a sign that says \'OPEN\'", "backslash"),
    ('a sign that says "\u200b"', "empty quotes"),
    ("a cat on a sofa", "no quoted text"),
    ("", "no quoted text"),
    ("it's Joe's diner", "no quoted text"),
    ("rock 'n' roll in the '90s", "no quoted text"),
    ('a sign that says ""', "empty quotes"),
    ('a sign that says "  "', "empty quotes"),
    ("a sign that says “”", "empty quotes"),
    ('a sign "A" and ""', "empty quotes"),
    ('a sign that says "OPEN', "unpaired"),
    ('a 12" ruler with "HELLO"', "unpaired"),
    ("a sign that says “OPEN", "unpaired"),
    ("a sign that says OPEN”", "unpaired"),
    ('a sign that says "OPEN”', "unpaired"),
    ("a sign that says “say “cheese”", "unpaired"),
    ("a sign that says 'OPEN", "unpaired"),
    ("a sign that says ‘OPEN", "unpaired"),
]


@pytest.mark.parametrize("prompt, targets", GOOD + CLEANED)
def test_targets(prompt, targets):
    """They also occur in the prompt that the text encoder gets."""
    assert parse_targets(prompt) == targets
    assert all(target in visible(clean(prompt)) for target in targets)


@pytest.mark.parametrize("prompt", [prompt for prompt, _ in GOOD + CLEANED + BAD])
def test_prompts_are_cleaned_as_for_the_text_encoder(prompt):
    assert uncurl_quotes(_clean(prompt)) == clean(prompt)


@pytest.mark.parametrize("prompt, message", BAD)
def test_errors_name_the_prompt_and_the_fix(prompt, message):
    with pytest.raises(TargetError, match=message) as error:
        parse_targets(prompt)
    assert repr(_clean(prompt)) in str(error.value)
    assert "put the text to write in double quotes" in str(error.value) or message == "backslash"


def test_random_prompts_give_back_what_was_quoted():
    """Words with apostrophes around targets in random double quotes: exactly those come back, in
    order.
    """
    rng = random.Random(0)
    words = [
        "a",
        "cat",
        "it's",
        "dogs'",
        "'n'",
        "'90s",
        "Joe’s",
        "red,",
        "sign.",
        "‘vintage’",
        "'old'",
    ]
    texts = ["OPEN", "DON'T WALK", "24 H!", "say 'hi'", "Café", "x"]
    for _ in range(300):
        targets = rng.choices(texts, k=rng.randint(1, 3))
        quoted = [rng.choice(['"{}"', "“{}”"]).format(target) for target in targets]
        parts = [" ".join(rng.choices(words, k=rng.randint(0, 4))) for _ in range(len(targets) + 1)]
        prompt = parts[0] + "".join(f" {quote} {part}" for quote, part in zip(quoted, parts[1:]))
        assert parse_targets(prompt) == tuple(targets), prompt


def test_any_string_gives_targets_or_a_target_error():
    rng = random.Random(1)
    for _ in range(2000):
        prompt = "".join(rng.choices("ab s'\"‘’“”", k=rng.randint(0, 12)))
        try:
            targets = parse_targets(prompt)
        except TargetError:
            continue
        assert targets and all(
            target and target == target.strip() and target in clean(prompt) for target in targets
        )
