"""Names of the files of a tokenizer folder: `data` hashes and reads them, `model` copies them."""

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
"""transformers takes it before a template in tokenizer_config.json."""
CHAT_TEMPLATE_FILES = (CHAT_TEMPLATE, "chat_template.json")
TOKENIZER_FILES = (
    ADDED_TOKENS,
    "merges.txt",
    "sentencepiece.bpe.model",
    SPECIAL_TOKENS_MAP,
    "spiece.model",
    TOKENIZER_JSON,
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "vocab.json",
    "vocab.txt",
)
"""Every file of a tokenizer folder that can change a token; chat templates cannot. Their order is part of
the hash in older records (`data.tokenizers.files_sha256`)."""
