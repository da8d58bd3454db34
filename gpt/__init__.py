"""A finance GPT trained from scratch: one model, two tables of ops (plain PyTorch and tapelm)."""
