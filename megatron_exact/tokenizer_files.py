"""Names of the files of a tokenizer folder.

They are at the top of the package because `data`, which hashes and reads these files, and `model`, which
copies them into checkpoints and exports, must agree on the names and may not import each other.
"""

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
"""It takes precedence over a template in tokenizer_config.json, as in transformers."""
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
"""All files of a tokenizer folder that can change tokens, which chat templates cannot. The order is part of
the hash in older records (`data.tokenizers.files_sha256`)."""
