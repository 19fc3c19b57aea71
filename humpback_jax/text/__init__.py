"""Text and tokens: tokenizers, the one prompt template, rubrics, tokenisation with masks."""
