"""A small byte-level BPE tokenizer in CLIP's file format (vocab.json, merges.txt), trained on the captions' words."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

VOCABULARY = 2800
MAX_TOKENS = 24  # prompts are padded and cut to this length, as SD's are to 77


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters that stand for bytes, in CLIP's (GPT-2's) order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def train_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, end_of_word_suffix="</w>", min_frequency=2)
    )
    learned = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]

    # CLIP's vocabulary: the byte alphabet, the same ending a word, then one entry per merge, then the special tokens.
    alphabet = byte_alphabet()
    vocabulary = {token: i for i, token in enumerate(alphabet + [c + "</w>" for c in alphabet])}
    merges = []
    for left, right in learned:
        if left in vocabulary and right in vocabulary and left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=MAX_TOKENS,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
