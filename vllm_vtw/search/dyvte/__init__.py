"""DyVTE (arXiv 2411.19628): trains and evaluates gates that decide where a request's visual tokens leave."""
