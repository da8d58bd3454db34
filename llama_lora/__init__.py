"""LLaMA adapted with LoRA or QLoRA: tapelm kernels inside transformers, checked before every run."""
