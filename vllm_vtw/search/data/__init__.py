"""Users' samples: files, chats and pictures, read as `vllm serve` reads requests."""
