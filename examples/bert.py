"""A BERT that sorts texts by topic: train, remove half of the heads and neurons of each layer, save, load.

    python examples/bert.py

The texts are made up of words of two topics, and the network is small and begins with random weights. Yours is
`AutoModelForSequenceClassification.from_pretrained(...)` and its tokenizer.
"""

import random
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification

import gsprune

TOPICS = ("boat sail wave anchor harbour tide deck rope", "oven bread flour yeast crust butter dough knead")
SHARED = ["the", "a", "and", "with", "of", "on", "was", "in", "very", "then"]


def build() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=2
    )
    return BertForSequenceClassification(config)


def texts(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of 32 texts of 12 words, a third of them about the text's topic."""
    words = ["[PAD]", *SHARED, *" ".join(TOPICS).split()]
    batches = []
    for _ in range(count):
        labels = [random.randrange(2) for _ in range(32)]
        lines = [random.choices(SHARED, k=8) + random.choices(TOPICS[label].split(), k=4) for label in labels]
        ids = torch.tensor([[words.index(word) for word in random.sample(line, 12)] for line in lines])
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(labels)})
    return batches


random.seed(0)
torch.manual_seed(0)
training, test = texts(30), texts(10)
net = build()
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
for batch in training:
    net(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# Mappings with labels return their own loss; sparsity goes of every structure, kinds says which.
cut = gsprune.cut(
    net, training, sparsity=0.5, kinds=["heads", "neurons"], evaluate=gsprune.right_or_wrong(test), progress=False
)
for name, text in cut.rows():
    if name != "seconds":
        print(f"{name}: {text}")
print(cut.model.bert.encoder.layer[0].attention.self.query)

with tempfile.TemporaryDirectory() as folder:
    cut.save(folder)
    again = gsprune.load_pruned(folder, build())
print("loaded:", sum(p.numel() for p in again.parameters()), "parameters")
