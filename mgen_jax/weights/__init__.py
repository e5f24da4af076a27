"""Public weights in and out: one file for each family, as functions of flat dicts of arrays."""
