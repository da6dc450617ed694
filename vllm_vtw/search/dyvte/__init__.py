"""DyVTE (arXiv 2411.19628): gates that decide for each request when its visual tokens leave."""
