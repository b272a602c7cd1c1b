"""Adapters in models: the verbs, their files, the backbone they fit, LoRA and quantization beside them."""
