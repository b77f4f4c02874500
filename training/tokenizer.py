"""The byte-level tokenizer of the shipped model and its chat template."""

from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1536
BOS, EOS, PAD, SYSTEM, USER, ASSISTANT = SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train(conversations, count=6000) -> PreTrainedTokenizerFast:
    """Learn the merges on the messages of this many conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = (m["content"] for c in islice(conversations, count) for m in c.messages)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def load(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, batch: list[list[dict]]) -> list[tuple[list[int], list[bool]]]:
    """Return the ids of each conversation, as the chat template makes them, and which are the assistant's."""
    fast = tokenizer.backend_tokenizer
    marks = {role: fast.token_to_id(f"<|{role}|>") for role in ("system", "user", "assistant")}
    bos, eos = fast.token_to_id(BOS), fast.token_to_id(EOS)
    texts = [message["content"].strip() for messages in batch for message in messages]
    pieces = iter(fast.encode_batch(texts, add_special_tokens=False))
    made = []
    for messages in batch:
        ids, spoken = [bos], [False]
        for message in messages:
            piece = next(pieces).ids
            ids += [marks[message["role"]], *piece, eos]
            spoken += [False] + [message["role"] == "assistant"] * (len(piece) + 1)
        made.append((ids, spoken))
    return made


def same_ids(tokenizer: PreTrainedTokenizerFast, batch: list[list[dict]]) -> bool:
    """Whether the chat template makes exactly the ids that training uses for these conversations."""
    made = [
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        for messages in batch
    ]
    return made == [ids for ids, _ in encode(tokenizer, batch)]
