"""Small text models with their tokenizers, as Hugging Face folders."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

WORDS = "the a film plot actor is was not very good bad dull bright warm cold and but with of in"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def sentences(count):
    words = WORDS.split()
    return [" ".join(words[(i * 7 + j * (i % 5 + 1)) % len(words)] for j in range(3 + i % 6)) for i in range(count)]


def tokenizer(pad="[PAD]", **special):
    """Return a tokenizer of words, trained on the spot."""
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[END]"]
    made.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=words))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, unk_token="[UNK]", **special)


def save(model, folder, words=None):
    model.save_pretrained(folder)
    if words is not None:
        words.save_pretrained(folder)


@torch.no_grad()
def fine_tune(model):
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape).to(parameter.dtype)
    return model


def encoder(config=None):
    """Save a bare BERT as "base", and a classifier made from it as "tuned", whose names have a prefix."""
    config = config or transformers.BertConfig(vocab_size=32, max_position_embeddings=24, **SIZES)
    base = transformers.AutoModel.from_config(config)
    save(base, "base")
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained("base")
    save(fine_tune(tuned), "tuned", tokenizer())


def decoder():
    """Save two GPT-2, whose head is tied to the embedding, in bfloat16, with a tokenizer that cannot pad."""
    config = transformers.GPT2Config(vocab_size=32, n_positions=24, n_embd=16, n_layer=2, n_head=2)
    base = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    save(base, "base", tokenizer(pad=None, eos_token="[END]"))
    save(fine_tune(base), "tuned", None)
