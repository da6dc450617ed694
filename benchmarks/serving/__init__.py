"""Stock vLLM against `--model-impl vtw` at equal KV memory, through vLLM's own `vllm bench serve`."""
