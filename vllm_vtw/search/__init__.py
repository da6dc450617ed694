"""Offline, on transformers: where to withdraw. Nothing here needs vLLM."""
