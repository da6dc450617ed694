"""Reads users' samples, with their chats and images, in the way in which `vllm serve` reads requests."""
