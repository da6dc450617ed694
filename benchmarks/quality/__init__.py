"""A small LLaVA, trained from scratch on drawn scenes, to measure what withdrawal costs in answers."""
