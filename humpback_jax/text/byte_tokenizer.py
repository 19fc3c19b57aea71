"""A tokenizer of bytes: no file, no training, every text; for tiny models and tests."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from humpback_jax.text.tokenizer import Tokenizer

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes of UTF-8; then <|pad|> 256, <|im_start|> 257, <|im_end|> 258 (EOS).

    The chat template has no default system message: every byte costs a token here.
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, TURN_START, TURN_END])
    return Tokenizer(
        backend, {"eos_token": TURN_END, "pad_token": PAD}, chat_template=CHAT_TEMPLATE
    )


def byte_symbols() -> list[str]:
    """The printable character by which byte-level vocabularies spell each of the 256 bytes.

    Visible Latin-1 characters stand for themselves, the others for U+0100 onwards in byte order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b) if b in visible else chr(0x100 + hidden.index(b)) for b in range(256)]
