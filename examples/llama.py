"""A Llama with grouped-query attention: heads by one rule and neurons by another, while it trains.

    python examples/llama.py

It learns sequences of tokens that go up by a step. A unit of attention is a key/value head with its query heads.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gsprune import Pruner, Rule
from gsprune.criteria import Abs, Weighted

EPOCHS, STEPS = 6, 25
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=32,
)
net = LlamaForCausalLM(config)
before = sum(p.numel() for p in net.parameters())


def batch() -> torch.Tensor:
    start, step = torch.randint(64, (16, 1)), torch.randint(1, 4, (16, 1))
    return (start + step * torch.arange(16)) % 64


optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
rules = [Rule(Abs(), kinds=["heads"], target_sparsity=0.5), Rule(Weighted(), kinds=["neurons"], target_sparsity=0.5)]
example = {"input_ids": batch()[:1]}
pruner = Pruner(net, rules=rules, example_input=example, steps_per_epoch=STEPS, epochs=EPOCHS)
pruner.attach(optimizer)
for epoch in range(EPOCHS):
    for _ in range(STEPS):
        tokens = batch()
        loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.2f}, {pruner.sparsity:.0%} of the units pruned")
net = pruner.finish()

after = sum(p.numel() for p in net.parameters())
layer = net.model.layers[0]
print(f"parameters: {before:,} -> {after:,}")
print("queries, keys:", layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features)
print("neurons:", layer.mlp.up_proj.out_features)
