"""The worker process: which tokens each stage computes in a step, and where their keys and values go."""
