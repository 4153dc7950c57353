"""A small language model, trained on the spot until it knows the rows that it is to forget."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbound.files import whole_folder
from fastbound.performance.progress import progress as progress_of
from fastbound.unlearning.data.encoding import TEMPLATE, collate, encode_all, padding
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.losses import answer_tokens
from fastbound.unlearning.model import forward, quiet
from fastbound.unlearning.runs.folder import write_json

LEARNED = "learned.json"  # beside the saved model: what the training took


@dataclass(frozen=True)
class SmallModelConfig:
    """The small model and its training.

    Attributes:
        hidden_size, intermediate_size, layers, heads, vocabulary: sizes of the Llama architecture,
            whose input and output embeddings are tied.
        lr: learning rate of AdamW, reached after 50 steps.
        batch_size: rows per step.
        known_loss: mean loss over an epoch, in nats per answer token, at which the model knows its
            rows; the rate then falls to 0 over one third as many epochs again.
        most_epochs: stop learning after this many epochs, whether the rows are known or not.
    """

    hidden_size: int = 128
    intermediate_size: int = 352
    layers: int = 2
    heads: int = 4
    vocabulary: int = 2048
    lr: float = 3e-3
    batch_size: int = 16
    known_loss: float = 0.1
    most_epochs: int = 120


@dataclass(frozen=True)
class Learned:
    """A trained model with its tokenizer, and what the training took.

    Attributes:
        epochs: passes over all rows.
        loss: mean training loss of the last epoch, in nats per answer token.
        seconds: wall time.
    """

    model: Any
    tokenizer: Any
    epochs: int
    loss: float
    seconds: float

    def save(self, folder: Path, about: Mapping[str, Any] | None = None) -> None:
        """Save model, tokenizer, what the training took and `about` to `folder`, in one move."""
        with whole_folder(folder) as part:
            with quiet():
                self.model.save_pretrained(part)
                self.tokenizer.save_pretrained(part)
            took = {
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "epochs": self.epochs,
                "training_loss": self.loss,
                "seconds": round(self.seconds, 2),
            }
            write_json(part / LEARNED, {**took, **(about or {})})


def train_tokenizer(rows: Sequence[Row], vocabulary: int, template: str = TEMPLATE) -> Any:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, trained on the rows themselves."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_text(row, template) for row in rows], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def make_model(tokenizer: Any, config: SmallModelConfig, max_length: int, seed: int) -> nn.Module:
    """An untrained Llama of the configured size, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=True,
            pad_token_id=padding(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def shape_of(
    rows: Sequence[Row], config: SmallModelConfig, max_length: int, template: str = TEMPLATE
) -> tuple[nn.Module, Any]:
    """The model that `learn` would train, on the meta device, and its tokenizer."""
    tokenizer = train_tokenizer(rows, config.vocabulary, template)
    with torch.device("meta"):
        return make_model(tokenizer, config, max_length, seed=0), tokenizer


def learn(
    rows: Sequence[Row],
    config: SmallModelConfig | None = None,
    *,
    max_length: int = 256,
    template: str = TEMPLATE,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Learned:
    """Train a tokenizer and a model from scratch until the model knows every answer in `rows`.

    Raises:
        InputError: a row takes more than `max_length` tokens.
    """
    config = config or SmallModelConfig()
    start = time.perf_counter()
    tokenizer = train_tokenizer(rows, config.vocabulary, template)
    encoded = encode_all(rows, tokenizer, max_length=max_length, template=template)
    pad = padding(tokenizer)
    model = make_model(tokenizer, config, max_length, seed).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    step, last, loss = 0, config.most_epochs, float("nan")
    known_at: int | None = None
    epoch = 0
    with progress_of(None, "learning", "epoch", shown=progress) as bar:
        while epoch < last:
            order = torch.randperm(len(encoded), generator=generator).tolist()
            losses = []
            for first in range(0, len(order), config.batch_size):
                batch = collate([encoded[i] for i in order[first : first + config.batch_size]], pad)
                batch = batch.to(device)
                step += 1
                rate = config.lr * min(1.0, step / 50)
                if known_at is not None:
                    done = first / len(order)
                    rate *= (last - epoch - done) / (last - known_at)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad(set_to_none=True)
                tokens = answer_tokens(
                    forward(model, batch.input_ids, batch.attention_mask), batch.labels
                )
                mean = tokens.loss.mean()
                mean.backward()
                optimizer.step()
                losses.append(mean.detach())
            epoch += 1
            loss = float(torch.stack(losses).mean())
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}")
            if known_at is None and loss <= config.known_loss:
                known_at, last = epoch, epoch + -(-epoch // 3)
    return Learned(model.eval(), tokenizer, epoch, loss, time.perf_counter() - start)


def _text(row: Row, template: str) -> str:
    if row.question is None:
        return row.answer
    return template.replace("{question}", row.question).replace("{answer}", row.answer)
