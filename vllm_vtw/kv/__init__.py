"""The scheduler process: which KV blocks each stage of a request holds."""
