"""Built-in plugins: one file, one thing that can be added to resprobe without touching its core."""
