"""Tests through a real vLLM engine on the CPU."""
