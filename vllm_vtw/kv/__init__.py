"""The scheduler process: how much KV cache each stage of a request holds."""
