"""The model classes of `--model-impl vtw`. Their decoders are cut into one segment for each stage."""
