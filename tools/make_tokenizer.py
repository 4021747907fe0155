#!/usr/bin/env python3
"""Makes the tokenizer of the built-in digits: a lower-case WordPiece of the words of their captions, other words spelled.

    pip install tokenizers
    tools/make_tokenizer.py             # writes src/data/tokenizer/digits.json

The captions are those of src/data/source/digits.rs. The file is the same every time: what pieces the library's trainer
takes of equally frequent ones changes from run to run, so the words are taken as they are.
"""
import json
import pathlib
import string

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = [
    "a handwritten {}",
    "the digit {}",
    "a {} written by hand",
    "a small grey picture of the number {}",
    "a photo of a {}",
]

names = WORDS + [str(n) for n in range(10)]
words = {word for template in TEMPLATES for name in names for word in template.format(name).split()}
characters = string.ascii_lowercase + string.digits + string.punctuation
pieces = ["[UNK]", *sorted(words | set(characters)), *sorted("##" + c for c in characters)]
tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
path = pathlib.Path(__file__).parent.parent / "src/data/tokenizer/digits.json"
path.write_text(json.dumps(json.loads(tokenizer.to_str()), indent=0, ensure_ascii=False) + "\n")
print(f"{path}: {len(pieces)} tokens, {path.stat().st_size} bytes")
