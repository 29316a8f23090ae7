"""Finds the text that a prompt asks for: `a neon sign that says "OPEN"` gives ("OPEN",).

This runs on every prompt when the prompts are loaded, so that a prompt without a usable target
stops the run before any accelerator time is spent.

Targets are read from the cleaned prompt, which is what the text encoder gets
(`wan_jax.models.tokenizer.clean`): HTML such as &quot; or &amp; is unescaped and wrongly decoded
text is repaired. Invisible characters are removed from the targets.

The rules, in order:
1. Text in double quotes is a target. The quotes are straight ("...") or curly (“...”), and each kind
   is closed by its own kind. Quotes of another kind inside are part of the text, and so are curly
   quotes nested in curly quotes.
2. Only a prompt without any double quote is searched for single quotes, '...' or ‘...’. (Where both
   occur, the single ones are apostrophes or scare quotes: to take them as quotes gives a wrong
   target for 110 of the 1018 prompts of Flow-GRPO's OCR test set.) A single quote opens only before
   a word and closes only after one, so the apostrophes of it's, Joe's and the dogs' are skipped; so
   are shortened words: rock 'n' roll, the '90s, 'em.
3. Several targets are returned in the order of the prompt. No target, an empty target and an
   unpaired quote are errors, and so is a backslash before a quote, which comes from text that was
   copied out of JSON or code.
"""

import html
import re

import ftfy
from ftfy.fixes import uncurl_quotes

from rewards.ocr.text_match import visible

FIX = "put the text to write in double quotes"

# words that start with an apostrophe; a single quote before one of them is that apostrophe
_SHORTENED = re.compile(r"(?:n|em|til|tis|twas|cause|bout|\d0s)\b", re.IGNORECASE)
_ESCAPED = re.compile("\\\\[\"'“”‘’]")
_SINGLE_OPEN, _SINGLE_CLOSE = "'‘", "'’"


class TargetError(ValueError):
    """A prompt from which no target text can be read."""


def parse_targets(prompt: str) -> tuple[str, ...]:
    """Return the quoted texts of `prompt` in order, by the rules at the top of this file. Raises
    `TargetError`, with the prompt and the place in it.
    """
    prompt = _clean(prompt)
    if escaped := _ESCAPED.search(prompt):
        raise TargetError(
            f"a backslash before the quote at character {escaped.end() - 1} of the prompt "
            f"{prompt!r}: leave the backslash out, or save the prompts as JSON lines"
        )
    has_double = any(mark in prompt for mark in '"“”')
    spans = _double_quoted(prompt) if has_double else _single_quoted(prompt)
    if not spans:
        raise TargetError(f"no quoted text in the prompt {prompt!r}: {FIX}")
    targets = tuple(uncurl_quotes(visible(prompt[start:end])).strip() for start, end in spans)
    if "" in targets:
        start, _ = spans[targets.index("")]
        raise TargetError(f"empty quotes at character {start} of the prompt {prompt!r}: {FIX}")
    return targets


def _clean(prompt: str) -> str:
    """Clean a prompt as `wan_jax.models.tokenizer.clean` does, but keep curly quotes, which show
    where a quotation begins and ends.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(prompt, uncurl_quotes=False)))
    return re.sub(r"\s+", " ", text).strip()


def _unpaired(prompt: str, at: int) -> TargetError:
    return TargetError(
        f"unpaired quote {prompt[at]!r} at character {at} of the prompt {prompt!r}: {FIX}, "
        f'with an opening and a closing quote of the same kind (write 12 inch, not 12")'
    )


def _double_quoted(prompt: str) -> list[tuple[int, int]]:
    """Return the spans (start, end) between outermost double quotes."""
    spans, at = [], 0
    while at < len(prompt):
        mark = prompt[at]
        if mark == "”":
            raise _unpaired(prompt, at)
        if mark in '"“':
            end = prompt.find('"', at + 1) if mark == '"' else _curly_end(prompt, at)
            if end < 0:
                raise _unpaired(prompt, at)
            spans.append((at + 1, end))
            at = end
        at += 1
    return spans


def _curly_end(prompt: str, start: int) -> int:
    """Return the index of the ” that closes the “ at `start`, -1 if there is none."""
    depth = 0
    for at in range(start, len(prompt)):
        depth += {"“": 1, "”": -1}.get(prompt[at], 0)
        if depth == 0:
            return at
    return -1


def _single_quoted(prompt: str) -> list[tuple[int, int]]:
    """Return the spans (start, end) between single quotes that are not apostrophes."""
    spans, at = [], 0
    while at < len(prompt):
        before, after = prompt[at - 1 : at], prompt[at + 1 : at + 2]
        opens = (
            prompt[at] in _SINGLE_OPEN and not before.isalnum() and after and not after.isspace()
        )
        shortened = _SHORTENED.match(prompt, at + 1)
        if opens and shortened:
            at = shortened.end()  # also steps over the second apostrophe of 'n'
        elif opens:
            end = next(
                (i for i in range(at + 1, len(prompt)) if _closes(prompt, i, prompt[at])), -1
            )
            if end < 0:
                raise _unpaired(prompt, at)
            spans.append((at + 1, end))
            at = end
        at += 1
    return spans


def _closes(prompt: str, at: int, opener: str) -> bool:
    """Return whether the character at `at` closes a quote that `opener` opened: it must end a word
    and not start one.
    """
    pair = prompt[at] == _SINGLE_CLOSE[_SINGLE_OPEN.index(opener)]
    return pair and not prompt[at - 1].isspace() and not prompt[at + 1 : at + 2].isalnum()
