"""Ratings on the scale of 1 to 5: reading them from text, and the tokens that spell them."""

from __future__ import annotations

import re

from humpback_jax.errors import HumpbackError
from humpback_jax.text.tokenizer import Tokenizer

SCORES = (1, 2, 3, 4, 5)
_SCORE_LINE = re.compile(r"^\W*[Ss]core\W*([1-5])(?:\.\d+)?\W*$")


def parse_score(text: str) -> int | None:
    """The rating in the last non-empty line (`Score: 4`), or None.

    Only that line counts and only 1 to 5: looser patterns read years and list numbers as ratings.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    match = _SCORE_LINE.match(lines[-1].strip()) if lines else None
    return int(match.group(1)) if match else None


def score_prefix(tokenizer: Tokenizer) -> str:
    """`"Score: "` or, for vocabularies that join the space to the digit, `"Score:"`.

    After the wrong one the model would have to continue from a split that it has never seen.
    """
    split = tokenizer.encode("Score: ")
    starts_alike = all(tokenizer.encode(f"Score: {s}")[: len(split)] == split for s in SCORES)
    return "Score: " if starts_alike else "Score:"


def score_token_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """For each rating 1..5, the ids of all tokens that spell it as the continuation of the prefix.

    Several tokens can spell one digit: with and without a space before it, or as a byte.

    Raises:
      HumpbackError: this vocabulary writes a digit as several tokens.
    """
    prefix = score_prefix(tokenizer)
    offset = len(tokenizer.encode(prefix))
    found = []
    for score in SCORES:
        spelled = tokenizer.encode(f"Score: {score}")[offset:]
        if len(spelled) != 1:
            raise HumpbackError(
                f"The tokenizer writes the score {score} as {len(spelled)} tokens, so its "
                "likelihood is not that of one token; use the curator 'rubric' or 'pmi'."
            )
        names = (f"{score}", f"Ġ{score}", f"▁{score}", f"<0x{ord(str(score)):02X}>")
        ids = {tokenizer.id_of(name) for name in names} - {None}
        alike = {i for i in ids if i is not None and tokenizer.decode([i]).strip() == str(score)}
        found.append(sorted({*spelled, *alike}))
    return found
