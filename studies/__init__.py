"""Studies: one file, one claim of the paper. `python -m studies` lists them."""
