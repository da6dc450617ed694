"""vllm-vtw: visual-token withdrawal inside vLLM."""

__version__ = "0.1.0"
