"""Searches offline, with transformers, for the layers at which to withdraw. Nothing here needs vLLM."""
