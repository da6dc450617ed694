"""`--model-impl vtw`: the model classes, with their decoders cut into one segment a stage."""
